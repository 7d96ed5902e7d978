"""Whether a network without some units returns what it does while they are masked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Relative to the greatest output, in float64; of a float32 tensor that code made for itself in a
#: run in float64; and in lower precision. Rounding stays far below; half of a group's channels
#: missing from a norm or a softmax is far above.
_EXACT, _ROUNDED, _LOOSE = 1e-7, 1e-4, 2e-2


def difference(
    masked: Sequence[Tensor], removed: Sequence[Tensor], what: str, *, exact: bool
) -> str:
    """How the outputs of two runs differ; "" if they are the same.

    Args:
        what: was masked, or removed.
        exact: the runs were in float64, apart from tensors that no mode sees being made, such as
            those of `torch.Tensor(...)`.
    """
    if [one.shape for one in masked] != [other.shape for other in removed]:
        return f"removing {what} changes the shape of the output"
    for one, other in zip(masked, removed, strict=True):
        pair = (part.to_dense() if part.is_sparse else part for part in (one, other))
        if not _close(*pair, exact=exact):
            if what == "the block":
                return "without its modules the outputs are not what they are with zeros for it"
            return "an operation mixes its channels: a masked one is not a removed one"
    return ""


def _close(one: Tensor, other: Tensor, *, exact: bool) -> bool:
    if not one.is_floating_point() and not one.is_complex():
        return torch.equal(one, other)
    tolerance = _LOOSE
    if one.dtype in (torch.float64, torch.complex128):
        tolerance = _EXACT
    elif exact and one.dtype in (torch.float32, torch.complex64):
        tolerance = _ROUNDED
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    scale = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=scale * tolerance, equal_nan=True)
