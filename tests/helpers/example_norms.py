"""Per-example squared gradient norms in float64, for every backend's tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.fisher_cases import FisherCase


def norms_reference64(x: Tensor, dy: Tensor, case: FisherCase) -> tuple[Tensor, Tensor]:
    """Σ_k g_{n,k}² of each example, and its bound: that of the absolute values of all factors.

    A gradient that cancels keeps the rounding of its terms, so no way is held to a share of it.
    """
    if not x.size(0):
        return x.new_zeros(0).double(), x.new_zeros(0).double()
    found: list[list[Tensor]] = [[], []]
    for a, b in zip(x.double().split(1), dy.double().split(1), strict=True):
        columns = F.unfold(a, case.size[2:], case.dilation, case.padding, case.stride)
        columns = columns.view(case.groups, -1, columns.size(2))
        rows = b.reshape(case.groups, case.size[0] // case.groups, -1)
        found[0].append(torch.bmm(rows, columns.mT).square().sum())
        found[1].append(torch.bmm(rows.abs(), columns.abs().mT).square().sum())
    return torch.stack(found[0]), torch.stack(found[1])
