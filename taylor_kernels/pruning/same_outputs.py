"""Whether a network without some units returns what it does while they are masked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Relative to the greatest output, in float64 and in lower precision. Rounding stays far below;
#: half of a group's channels missing from a norm or a softmax is far above.
_EXACT, _LOOSE = 1e-7, 2e-2


def difference(masked: Sequence[Tensor], removed: Sequence[Tensor], what: str) -> str:
    """How the outputs of two runs differ; "" if they are the same.

    Args:
        what: was masked, or removed.
    """
    if [one.shape for one in masked] != [other.shape for other in removed]:
        return f"removing {what} changes the shape of the output"
    for one, other in zip(masked, removed, strict=True):
        if not _close(*(part.to_dense() if part.is_sparse else part for part in (one, other))):
            if what == "the block":
                return "without its modules the outputs are not what they are with zeros for it"
            return "an operation mixes its channels: a masked one is not a removed one"
    return ""


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point() and not one.is_complex():
        return torch.equal(one, other)
    exact = one.dtype in (torch.float64, torch.complex128)
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    scale = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
    atol = scale * (_EXACT if exact else _LOOSE)
    return torch.allclose(one, other, rtol=0.0, atol=atol, equal_nan=True)
