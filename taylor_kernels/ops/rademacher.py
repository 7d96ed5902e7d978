"""rademacher_like: random signs for weights, the same on every backend and device.

Element e of a tensor gets −1 where a bit of Philox4x32-10 is set, else 1: bit e % 128 of what the
generator makes of the counter (⌊e / 128⌋ in 64 bits, stream, 0) and the key `seed` (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011). Elements are numbered as they lie in memory
if the tensor is contiguous or channels_last, else in contiguous order. So a kernel that knows
the seed draws them again where it needs them, and nothing depends on threads, devices or the list.

They are the probes of `hutchinson_moments`. Kernels:
csrc/common/rademacher.h, csrc/common/philox.h, backends/triton/rademacher.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from taylor_kernels.backends import check_name, kernel
from taylor_kernels.layout import RademacherItem, in_order_of
from taylor_kernels.ops._checks import check_seed, check_streams, check_tensor
from taylor_kernels.ops._library import define


@overload
def rademacher_like(
    tensors: Tensor,
    *,
    seed: int,
    streams: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def rademacher_like(
    tensors: Sequence[Tensor],
    *,
    seed: int,
    streams: Sequence[int] | None = None,
    backend: str | None = None,
) -> list[Tensor]: ...
def rademacher_like(
    tensors: Tensor | Sequence[Tensor],
    *,
    seed: int,
    streams: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Tensors of 1 and −1, each with probability ½, for a tensor or for a list.

    Bits of Philox4x32-10 (Salmon et al., SC 2011): the probes of `hutchinson_moments`.

    Args:
        tensors: what the result resembles (float32, float16, bfloat16 or float64), any shape.
        seed: 64 bits; equal seeds give equal signs on every backend and device.
        streams: a number from 0 to 2**32 - 1 for each tensor, which tells tensors of one seed
            apart; by default the place in the list.
        backend: one of `taylor_kernels.available_backends()`; None picks by device.

    Returns:
        A tensor or a list of them, of the same shapes, dtypes and devices; in the same strides if
        those are contiguous or channels_last, else contiguous. Views of one buffer per dtype, which
        one launch fills.

    Raises:
        TypeError: not a tensor; integer, complex, sparse or meta tensors; a seed that is no int.
        ValueError: a seed or stream out of range, or not as many streams as tensors.
        RuntimeError: the named backend cannot run here.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> tk.rademacher_like(torch.empty(2, 3), seed=0).tolist()
        [[-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]]
        >>> signs = tk.rademacher_like([torch.empty(8, 4, 3, 3), torch.empty(8)], seed=0)
        >>> [tuple(each.shape) for each in signs]
        [(8, 4, 3, 3), (8,)]
    """
    check_name(backend)
    seed = check_seed(seed)
    single = isinstance(tensors, Tensor)
    if not single and not isinstance(tensors, Sequence):
        raise TypeError(
            f"tensors: expected a tensor or a sequence of tensors, got {type(tensors).__name__}"
        )
    every = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for i, tensor in enumerate(every):
        check_tensor(tensor, "tensors" if single else f"tensors[{i}]")
    streams = check_streams(streams, len(every))
    found = list(every)
    parts: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(every):
        parts.setdefault((tensor.device, tensor.dtype), []).append(i)
    for part in parts.values():
        counts = [every[i].numel() for i in part]
        packed = _op(every[part[0]], counts, seed, [streams[i] for i in part], backend)
        for i, signs in zip(part, _pieces(packed, counts), strict=True):
            found[i] = in_order_of(every[i], signs)
    return found[0] if single else found


def _run(
    like: Tensor, counts: Sequence[int], seed: int, streams: Sequence[int], backend: str | None
) -> Tensor:
    """The op itself: vectors of so many signs in one buffer, each from a 128-byte address on."""
    check_tensor(like, "like")
    if any(count < 0 for count in counts):
        raise ValueError(f"counts: {min(counts)} is negative")
    check_streams(streams, len(counts))
    out = _empty(like, counts)
    items = [
        RademacherItem(signs, signs.numel(), signs.dtype, stream)
        for signs, stream in zip(_pieces(out, counts), streams, strict=True)
        if signs.numel()
    ]
    run = kernel("rademacher", out.device, out.dtype, backend)
    if items:
        run(items, seed)
    return out


def _empty(like: Tensor, counts: Sequence[int], *_: Any) -> Tensor:
    return like.new_empty(sum(_padded(counts)))


def _padded(counts: Sequence[int]) -> list[int]:
    return [-(-count // 64) * 64 for count in counts]


def _pieces(packed: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The vectors without what stands between them."""
    padded = packed.split(_padded(counts))
    return [piece[:count] for piece, count in zip(padded, counts, strict=True)]


_op = define(
    "rademacher(Tensor like, SymInt[] counts, int seed, int[] streams, str? backend) -> Tensor",
    _run,
    _empty,
)
