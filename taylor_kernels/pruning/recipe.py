"""Pruned models as files: their tensors, and what cuts a fresh model so that it can hold them."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.files import write_atomically
from taylor_kernels.pruning.pruner import Pruner
from taylor_kernels.pruning.removal import Tensors, set_attributes, smaller
from taylor_kernels.pruning.state import first_line
from taylor_kernels.tracing.blocks import Place, replace_modules
from taylor_kernels.tracing.caches import renew

#: The one entry of the file's metadata: of several the order, and so the bytes, would vary.
_KEY, _VERSION = "taylor_kernels.pruned", "1"
#: The version of files of models that whole residual blocks were removed from.
_WITH_BLOCKS = "2"


def save_pruned(path: str | bytes | os.PathLike[str], pruner: Pruner) -> None:
    """Write a compacted model as safetensors, with the recipe that cuts a fresh model to its shape.

    The file holds the model's state_dict, a tensor that has several names once, and in its metadata
    which indices went from which dimension of which tensor and what attributes of modules became.
    Nothing in it can run code. `load_pruned` reads it.

    Args:
        path: of the file; it is replaced all at once.
        pruner: its model has been compacted.

    Raises:
        TypeError: `path` is no path, or `pruner` no tk.Pruner.
        ValueError: filters are masked and not removed yet, or the model's state holds more than
            tensors.
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such folder.

    Example:
        >>> import os, tempfile, torch, taylor_kernels as tk
        >>> def make():
        ...     return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
        >>> pruner = tk.Pruner(make(), torch.randn(1, 3), "magnitude_l2", filters=0.5, every=1)
        >>> while not pruner.done:
        ...     _ = pruner.step()
        >>> model = pruner.compact()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "pruned.safetensors")
        ...     tk.save_pruned(path, pruner)
        ...     again = tk.load_pruned(make(), path)
        >>> x = torch.randn(5, 3)
        >>> again[0].out_features, torch.equal(again(x), model(x))
        (4, True)
    """
    _check_path(path)
    if not isinstance(pruner, Pruner):
        raise TypeError(
            f"pruner: expected the tk.Pruner of the model, got {type(pruner).__name__}; call "
            "save_pruned(path, pruner)"
        )
    _require_safetensors()
    from safetensors.torch import save

    cuts, attributes, places = pruner.removal()
    content, aliases = _unique_tensors(pruner.model)
    shapes = _shapes_before(Tensors(pruner.model), cuts)
    lists: dict[tuple[int, ...], int] = {}  # most lists of indices are those of several tensors
    table = {
        name: {
            dim: lists.setdefault(tuple(index.tolist()), len(lists)) for dim, index in own.items()
        }
        for name, own in cuts.items()
    }
    recipe = {
        "version": _VERSION if not places else _WITH_BLOCKS,
        "shapes": shapes,
        "indices": list(lists),
        "cuts": table,
        "attributes": attributes,
        "aliases": aliases,
        **({"places": [list(place) for place in map(astuple, places)]} if places else {}),
    }
    metadata = {_KEY: json.dumps(recipe, separators=(",", ":"))}
    write_atomically(path, lambda file: file.write(save(content, metadata)))


def load_pruned(model: nn.Module, path: str | bytes | os.PathLike[str]) -> nn.Module:
    """Cut a fresh model as the one was that `save_pruned` wrote, and load its values, in place.

    Args:
        model: made as the original one was, before it was pruned; its own values do not matter.
        path: what `save_pruned` wrote.

    Returns:
        The model. Its parameters are new ones: make optimizers afterwards.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the model is none, or `path` is no path.
        ValueError: the file is damaged or of another kind, or would set what is no number of
            channels, or the model is another than the original. Nothing has changed.
        ImportError: safetensors is not installed.

    Example:
        >>> import os, tempfile, torch, taylor_kernels as tk
        >>> def make():
        ...     return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
        >>> pruner = tk.Pruner(make(), torch.randn(1, 3), "magnitude_l2", params=0.6, every=1)
        >>> while not pruner.done:
        ...     _ = pruner.step()
        >>> _ = pruner.compact()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "pruned.safetensors")
        ...     tk.save_pruned(path, pruner)
        ...     tk.load_pruned(make(), path)[1]
        Linear(in_features=4, out_features=2, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _check_path(path)
    file = _read(os.fsdecode(path))
    _check_model(model, Tensors(model), file)
    cut_model(model, file.cuts, file.attributes, file.places)
    model.load_state_dict(file.state)
    renew(model.modules())
    return model


def _check_path(path: object) -> None:
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"path: expected a path of a file, got {type(path).__name__}")


def cut_model(
    model: nn.Module,
    cuts: Mapping[str, Mapping[int, Tensor]],
    attributes: Mapping[str, Mapping[str, Any]],
    places: Sequence[Place] = (),
) -> None:
    """Take off a whole model what `Pruner.removal` says, in place."""
    replace_modules(model, places)
    tensors, modules = Tensors(model), dict(model.named_modules())
    tensors.put({name: smaller(tensors[name], own) for name, own in cuts.items()})
    for name, own in attributes.items():
        like = {key: _like(getattr(modules[name], key), value) for key, value in own.items()}
        set_attributes(modules, {name: like})


@dataclass(frozen=True)
class _File:
    """What a file holds.

    Attributes:
        state: the state_dict, all names.
        shapes: tensor that is cut -> its shape before.
        cuts: tensor -> dimension -> indices [n] int64.
        attributes: module -> attribute -> value, sequences as lists.
        places: what whole blocks have left of modules.
    """

    path: str
    state: dict[str, Tensor]
    shapes: dict[str, list[int]]
    cuts: dict[str, dict[int, Tensor]]
    attributes: dict[str, dict[str, Any]]
    places: tuple[Place, ...]


def _read(path: str) -> _File:
    _require_safetensors()
    from safetensors import SafetensorError, safe_open

    if not os.path.exists(path):
        raise FileNotFoundError(f"path: there is no file {path!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {path!r} is damaged or no safetensors file") from error
    if _KEY not in metadata:
        raise ValueError(f"path: {path!r} was not written by save_pruned")
    try:
        recipe = json.loads(metadata[_KEY])
        version = recipe["version"]
        if version in (_VERSION, _WITH_BLOCKS):
            indices = [torch.tensor(entry, dtype=torch.int64) for entry in recipe["indices"]]
            cuts = {
                name: {int(dim): indices[number] for dim, number in own.items()}
                for name, own in recipe["cuts"].items()
            }
            for name, own in cuts.items():
                _check_indices(name, recipe["shapes"][name], own)
            state |= {alias: state[name] for alias, name in recipe["aliases"].items()}
            attributes = {name: dict(own) for name, own in recipe["attributes"].items()}
            places = tuple(_place(*entry) for entry in recipe.get("places", []))
            return _File(path, state, recipe["shapes"], cuts, attributes, places)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"path: {path!r} is damaged ({first_line(error)})") from error
    raise ValueError(
        f"path: {path!r} has version {version} of the format, this release reads {_VERSION}"
    )


def _place(module: Any, like: Any, returned: Any) -> Place:
    """What a file says that a block has left of a module."""
    fits = isinstance(module, str) and (like is None or _is_integer(like) or isinstance(like, str))
    path = tuple(returned)
    if not fits or not all(map(_is_integer, path)) or len(path) not in (0, 2):
        raise ValueError(f"what is left of module {module!r:.80} is not known")
    return Place(module, like, path)


def _check_indices(name: str, shape: list[int], cuts: Mapping[int, Tensor]) -> None:
    """What the file says goes from a tensor can go; nothing is made of the size of an index."""
    for dim, index in cuts.items():
        if not 0 <= dim < len(shape):
            raise ValueError(f"{name} has no dimension {dim}, its shape is {shape}")
        if index.dim() != 1:
            raise ValueError(f"the indices of {name} are no list of integers")
        if not index.numel():
            continue
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= shape[dim]:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} has {shape[dim]} in dimension {dim}, an index is {wrong}")
        if index.unique().numel() < index.numel():
            raise ValueError(f"an index of {name} is there twice")


def _check_attributes(modules: Mapping[str, nn.Module], file: _File) -> None:
    """Only counts of channels become others: an attribute could be a method or a whole module.

    Raises:
        ValueError: the file would set something else.
    """
    for name, own in file.attributes.items():
        for attribute, value in own.items():
            old = vars(modules[name]).get(attribute)
            if not (_counts(old) and _counts(value) and _is_integer(old) == _is_integer(value)):
                raise ValueError(
                    f"path: {file.path!r} would set {f'{name}.{attribute}'.lstrip('.')} to "
                    f"{value!r:.80}; it may only set numbers of channels, which modules hold as "
                    "integers; take a file that save_pruned wrote"
                )


def _counts(value: object) -> bool:
    """Whether it is an integer, or a list or tuple of integers."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_integer, value))
    return _is_integer(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_model(model: nn.Module, tensors: Tensors, file: _File) -> None:
    """The model is as the original was before anything went."""
    modules = dict(model.named_modules())
    gone = tuple(f"{place.module}." for place in file.places)
    known = {name for name in tensors if not name.startswith(gone)}
    differing = [place.module for place in file.places if place.module not in modules]
    differing += [
        name
        for name, shape in file.shapes.items()
        if name not in known or list(tensors[name].shape) != shape
    ]
    differing += [
        f"{name}.{attribute}"
        for name, own in file.attributes.items()
        for attribute in own
        if name not in modules or not hasattr(modules[name], attribute)
    ]
    after: dict[int, tuple[int, ...]] = {}
    for name, cuts in file.cuts.items():
        if name in known and name not in differing:
            after[id(tensors[name])] = tuple(
                size - cuts[dim].numel() if dim in cuts else size
                for dim, size in enumerate(tensors[name].shape)
            )
    shapes = {
        name: after.get(id(value), tuple(value.shape))
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not name.startswith(gone)
    }
    saved = {name: tuple(value.shape) for name, value in file.state.items()}
    differing += sorted(
        name
        for name in shapes.keys() | saved.keys()
        if shapes.get(name) != saved.get(name) and name not in differing
    )
    if differing:
        raise ValueError(
            f"model: {file.path!r} was pruned from another model; {len(differing)} entries "
            f"differ, among them {', '.join(differing[:3])}; make it as it was made before pruning"
        )
    _check_attributes(modules, file)


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state_dict with every tensor once, on the CPU; and its other names -> the first."""
    firsts: dict[int, str] = {}
    content: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model: {name!r} of its state_dict is a {type(value).__name__}, not a tensor, "
                "which safetensors cannot hold; use save_checkpoint"
            )
        first = firsts.setdefault(id(value), name)
        if first == name:
            # A copy: two tensors that share memory, as views of one, are saved on their own.
            content[name] = value.detach().cpu().contiguous().clone()
        else:
            aliases[name] = first
    return content, aliases


def _shapes_before(
    tensors: Tensors, cuts: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, list[int]]:
    return {
        name: [
            size + (own[dim].numel() if dim in own else 0)
            for dim, size in enumerate(tensors[name].shape)
        ]
        for name, own in cuts.items()
    }


def _require_safetensors() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError("safetensors is not installed; pip install 'taylor-kernels[demo]'")


def _like(old: Any, value: Any) -> Any:
    """A value out of JSON, of the type that the attribute has."""
    return tuple(value) if isinstance(old, tuple) else value
