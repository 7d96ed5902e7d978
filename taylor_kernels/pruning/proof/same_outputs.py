"""Whether a network without some units returns what it does while they are masked."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from taylor_kernels.pruning.proof.layer_outputs import Norms, first_other

#: Relative to what there is to compare with, in float64; of a float32 tensor that code made for
#: itself in a run in float64; and in lower precision. Rounding stays far below; half of a group's
#: channels missing from a norm or a softmax is far above.
_EXACT, _ROUNDED, _LOOSE = 1e-7, 1e-4, 2e-2
#: Numbers so many times as great as most others of a tensor are no measure for these: code writes
#: -1e9, or the least number that there is, where a mask says so.
_OUTLIER = 1e4
#: What is left of numbers that cancel is as small against the others.
_RESIDUE = 1e-5


@dataclass
class Ran:
    """What came of running a model once, or several times in two modes.

    Attributes:
        outputs: the tensors that it returned.
        norms: for each run, of what its layers put out.
    """

    outputs: list[Tensor] = field(default_factory=list)
    norms: list[Norms] = field(default_factory=list)


def difference(masked: Ran, removed: Ran, what: str, *, exact: bool) -> tuple[str, str | None]:
    """How two runs differ, "" if they do not; and the first layer that shows it, if one does.

    Args:
        what: was masked, or removed.
        exact: the runs were in float64, apart from tensors that no mode sees being made, such as
            those of `torch.Tensor(...)`.
    """
    mixes = "an operation mixes its channels: a masked one is not a removed one"
    if what == "the block":
        mixes = "without its modules the outputs are not what they are with zeros for it"
    layer = None
    for before, after in zip(masked.norms, removed.norms, strict=True):
        layer = layer or first_other(before, after, lambda dtype: _tolerance(dtype, exact=exact))
    if [one.shape for one in masked.outputs] != [other.shape for other in removed.outputs]:
        return f"removing {what} changes the shape of the output", layer
    for one, other in zip(masked.outputs, removed.outputs, strict=True):
        pair = (part.to_dense() if part.is_sparse else part for part in (one, other))
        if layer is not None or not _close(*pair, exact=exact):
            return mixes, layer
    return mixes if layer is not None else "", layer


def _tolerance(dtype: torch.dtype, *, exact: bool) -> float:
    if dtype in (torch.float64, torch.complex128):
        return _EXACT
    return _ROUNDED if exact and dtype in (torch.float32, torch.complex64) else _LOOSE


def _close(one: Tensor, other: Tensor, *, exact: bool) -> bool:
    if not one.is_floating_point() and not one.is_complex():
        return torch.equal(one, other)
    tolerance = _tolerance(one.dtype, exact=exact)
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    one, other = one.double(), other.double()
    if torch.equal(one, other):
        return True
    # Nearly all that are compared differ by rounding, which is least of what is allowed: that is
    # seen without looking at numbers one by one, of which a model of language returns millions.
    worst, sizes = float((one - other).abs_().max()), one.abs()
    if worst <= tolerance * _RESIDUE * _greatest_usual(sizes):
        return True
    differ = (one != other) & ~(one.isnan() & other.isnan())
    distance = (one[differ] - other[differ]).abs()
    if not bool(distance.isfinite().all()):
        return False
    scale = max(_scale(sizes[differ]), _RESIDUE * _scale(sizes))
    return bool((distance <= tolerance * sizes[differ].clamp(min=scale)).all())


def _greatest_usual(sizes: Tensor) -> float:
    """What `_scale` says of these, where the greatest is no outlier; else 0.0."""
    greatest = float(sizes.max())
    small = int((sizes < greatest / _OUTLIER).sum())
    zeros = sizes.numel() - int(sizes.count_nonzero())
    usual = small - zeros < -(-2 * (sizes.numel() - zeros) // 5)
    return greatest if usual and isfinite(greatest) else 0.0


def _scale(sizes: Tensor) -> float:
    """The greatest of these numbers that is no outlier, nor infinite; 0.0 where none is greater.

    What is usual is what two fifths are no greater than: so many may be all but zero, and more than
    half may be what code writes where a mask says so.
    """
    sizes = sizes[(sizes > 0) & sizes.isfinite()]
    if not sizes.numel():
        return 0.0
    usual = sizes.kthvalue(-(-2 * sizes.numel() // 5)).values
    return float(sizes[sizes <= _OUTLIER * usual].max())
