"""Models whose quantized weights are stored in bits, as safetensors files.

For a quantized tensor `name` the file holds `name.packed`, a uint8 vector of codes, and
`name.scale`, α in the tensor's dtype. Weights follow each other in the order of indices, lowest
bits first: 1 bit where 1 is α and 0 is −α; 2 bits where 0 is 0, 1 is α and 2 is −α. Whatever else
the model's state has is stored as it is. The header's metadata says of each quantized tensor its
shape, dtype and bits, and which names are other names of one tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.files import write_atomically
from taylor_kernels.layout import FLOATS
from taylor_kernels.pruning.saving.pruned_file import by_first_name

_FORMAT = "taylor_kernels.packed.1"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of 1 or 2 bits, packed into a uint8 vector, lowest bits first.

    Example:
        >>> import torch
        >>> from taylor_kernels.methods.packed import pack, unpack
        >>> packed = pack(torch.tensor([1, 0, 2, 1, 2]), bits=2)
        >>> packed.tolist(), unpack(packed, 5, bits=2).tolist()
        ([97, 2], [1, 0, 2, 1, 2])
    """
    each = 8 // bits
    flat = codes.reshape(-1).to(torch.uint8)
    padded = flat.new_zeros(-(-flat.numel() // each) * each)
    padded[: flat.numel()] = flat
    places = torch.arange(each, dtype=torch.uint8, device=flat.device) * bits
    return (padded.view(-1, each) << places).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The first `count` codes of `pack`, a uint8 vector."""
    places = torch.arange(8 // bits, dtype=torch.uint8, device=packed.device) * bits
    return (packed[:, None] >> places & (1 << bits) - 1).view(-1)[:count]


def save_packed(
    model: nn.Module, binary: Mapping[Tensor, bool], path: str | os.PathLike[str]
) -> int:
    """Write the state of a model; the parameters of `binary` hold rounded weights.

    Args:
        binary: parameter -> whether it has two levels, else three.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: a parameter is none of the model's, or its state holds more than tensors.
    """
    save = _safetensors().save
    bits_of = {id(param): 1 if two else 2 for param, two in binary.items()}
    tensors: dict[str, Tensor] = {}
    quantized: dict[str, dict[str, Any]] = {}
    named, other_names = by_first_name(model.state_dict(keep_vars=True))
    for name, value in named.items():
        bits = bits_of.pop(id(value), 0)
        value = value.detach()
        if not bits:
            # Of a tensor that shares memory with another, each has a copy of its own.
            tensors[name] = value.cpu().contiguous().clone()
            continue
        codes = (value > 0).to(torch.uint8) + (2 * (value < 0) if bits == 2 else 0)
        tensors[f"{name}.packed"] = pack(codes, bits).cpu()
        tensors[f"{name}.scale"] = value.abs().max().reshape(1).cpu()
        dtype = str(value.dtype).removeprefix("torch.")
        quantized[name] = {"shape": list(value.shape), "dtype": dtype, "bits": bits}
    if bits_of:
        raise ValueError(
            f"model: {len(bits_of)} of the {len(binary)} quantized parameters are none of its own; "
            "pass the model that the optimizer was made for"
        )
    header = {"quantized": quantized, "other_names": other_names}
    data = save(tensors, {"format": _FORMAT, "layout": json.dumps(header)})
    write_atomically(path, lambda file: file.write(data))
    return len(data)


def load_packed(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Fill a plain model with the weights of a file that `MirrorDescent.export` wrote.

    Args:
        model: of the architecture that was exported, on any device.
        path: the file.

    Returns:
        The model, in which quantized weights are α times their level: its outputs are those of the
        rounded model, bit for bit.

    Raises:
        ValueError: no such file format, or it does not fit the model; the model is as it was.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> net = torch.nn.Linear(256, 256)
        >>> optimizer = tk.methods.MirrorDescent(net.parameters())
        >>> report = optimizer.quantize()
        >>> size = optimizer.export(net, "net.safetensors")
        >>> size < 256 * 256 * 4 / 16
        True
        >>> plain = tk.methods.load_packed(torch.nn.Linear(256, 256), "net.safetensors")
        >>> plain.weight.equal(net.weight)
        True
    """
    tensors, layout = _read(path)
    state = model.state_dict(keep_vars=True)
    values: dict[str, Tensor] = {}
    for name, about in layout["quantized"].items():
        values[name] = _unpacked(name, about, tensors)
        for part in ("packed", "scale"):
            del tensors[f"{name}.{part}"]
    values.update(tensors)
    for name, first in layout["other_names"].items():
        if first not in values:
            raise ValueError(f"path: {name!r} is another name of {first!r}, which is not there")
        values[name] = values[first]
    if values.keys() != state.keys():
        missing = sorted(state.keys() - values.keys())
        unknown = sorted(values.keys() - state.keys())
        raise ValueError(
            f"model: the file lacks {missing[:3]} and has {unknown[:3]} that the model has not"
        )
    for name, value in values.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"model: {name!r} has shape {tuple(state[name].shape)}, in the file "
                f"{tuple(value.shape)}"
            )
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
    return model


def _unpacked(name: str, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """The weights of a quantized tensor."""
    packed, scale = (tensors.get(f"{name}.{part}") for part in ("packed", "scale"))
    bits, dtype = about.get("bits"), _DTYPES.get(str(about.get("dtype")))
    shape = about.get("shape")
    if packed is None or scale is None or bits not in (1, 2) or dtype is None or shape is None:
        raise ValueError(f"path: the description of {name!r} is not complete: {about}")
    count = math.prod(shape)
    wanted = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or packed.shape != (wanted,) or scale.shape != (1,):
        raise ValueError(
            f"path: {name!r} has {packed.numel()} bytes of weights and {scale.numel()} scales; "
            f"{wanted} and 1 belong to shape {tuple(shape)}"
        )
    codes = unpack(packed, count, bits)
    if bits == 2 and bool((codes == 3).any()):
        raise ValueError(f"path: {name!r} has codes of no level; the file is damaged")
    levels = (
        codes.to(dtype) * 2 - 1 if bits == 1 else (codes == 1).to(dtype) - (codes == 2).to(dtype)
    )
    return (levels * scale.to(dtype)).view(shape)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what its metadata says of them."""
    safe_open = _safetensors(torch_part=False).safe_open
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError(
                    f"path: {os.fspath(path)!r} was not written by export: its format is "
                    f"{about.get('format')!r}, not {_FORMAT!r}"
                )
            layout = _layout(path, about.get("layout"))
            return {name: file.get_tensor(name) for name in file.keys()}, layout  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"path: there is no file {os.fspath(path)!r}") from None
    except _safetensors(torch_part=False).SafetensorError as error:
        raise ValueError(f"path: {os.fspath(path)!r} is no safetensors file: {error}") from None


def _layout(path: str | os.PathLike[str], text: str | None) -> dict[str, Any]:
    """What the metadata says of quantized tensors and of other names, if it says both."""
    try:
        layout = json.loads(text or "")
    except json.JSONDecodeError:
        layout = None
    parts = ("quantized", "other_names")
    if not isinstance(layout, dict) or not all(isinstance(layout.get(p), dict) for p in parts):
        raise ValueError(
            f"path: the metadata of {os.fspath(path)!r} has no layout of its tensors that can be "
            "read; the file is damaged, write it once more with export()"
        )
    return layout


def _safetensors(torch_part: bool = True) -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError("packed models need safetensors; pip install safetensors") from None
    return safetensors.torch if torch_part else safetensors
