"""Linear attention whose heads have states: zeros at first, and systems of equations of each."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from tests.zoo import judging


class Delta(nn.Module):
    """The delta rule in chunks, by one of several ways to solve the system of equations of each."""

    def __init__(self, heads: int, key: int, value: int, solve: str) -> None:
        super().__init__()
        self.heads, self.solve = heads, solve
        self.q, self.k = nn.Linear(5, heads * key), nn.Linear(5, heads * key)
        self.v, self.beta = nn.Linear(5, heads * value), nn.Linear(5, heads)
        self.out = nn.Linear(heads * value, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, _ = x.shape
        q, k, v = (
            layer(x).view(n, steps, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        beta = self.beta(x).sigmoid().transpose(1, 2).unsqueeze(-1)
        state = torch.zeros(n, self.heads, q.size(-1), v.size(-1), dtype=x.dtype)
        found = []
        for part in range(0, steps, 4):
            here = slice(part, part + 4)
            keys = k[:, :, here]
            system = (beta[:, :, here] * keys) @ keys.transpose(-1, -2)
            right = beta[:, :, here] * (v[:, :, here] - keys @ state)
            new = self.solved(system, right)
            found.append(
                q[:, :, here] @ state + (q[:, :, here] @ keys.transpose(-1, -2)).tril() @ new
            )
            state = state + keys.transpose(-1, -2) @ new
        return self.out(torch.cat(found, 2).transpose(1, 2).reshape(n, steps, -1))

    def solved(self, system: Tensor, right: Tensor) -> Tensor:
        if self.solve == "general":
            return torch.linalg.solve(system.tril(-1) + torch.eye(system.size(-1)), right)
        if self.solve == "from the right":
            return torch.linalg.solve_triangular(
                system.mT, right.mT, upper=True, left=False, unitriangular=True
            ).mT
        return torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)


@pytest.mark.parametrize("solve", ["triangular", "from the right", "general"])
def test_whole_heads_go(solve):
    # The widths of keys alone, the least of the three, cannot make up for the target.
    key, *others = sorted(random.sample(range(3, 8), 3))
    heads, value = random.sample(others, 2)
    model, x = Delta(heads, key, value, solve), torch.randn(2, 8, 5)
    units = {group.size for group in tk.trace(model, x).groups}
    assert units <= {heads, key, value}
    judging.check_all_but(["out"], model.double(), x.double())
    assert model.heads < heads or model.v.out_features < heads * value
