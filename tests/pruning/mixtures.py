"""A small network with a mixture of experts, whose weights are stacked."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, NEURONS = 8, 6


class Router(nn.Module):
    """Sends each token to its best experts."""

    def __init__(self, experts: int, top_k: int, normalised: bool, biased: bool = False) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.normalised = experts, top_k, normalised
        self.weight = nn.Parameter(torch.randn(experts, WIDTH))
        self.bias = nn.Parameter(torch.randn(experts)) if biased else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(x, self.weight, self.bias)
        values, chosen = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        if self.normalised:
            values = values / values.sum(-1, keepdim=True)
        return logits, values, chosen


class Experts(nn.Module):
    """Two stacks of weights."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.up = nn.Parameter(torch.randn(experts, NEURONS, WIDTH))
        self.down = nn.Parameter(torch.randn(experts, WIDTH, NEURONS))

    def forward(self, x: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in chosen.unique():
            token, place = torch.where(chosen == expert)
            hidden = functional.linear(x[token], self.up[expert]).tanh()
            part = functional.linear(hidden, self.down[expert]) * values[token, place, None]
            y.index_add_(0, token, part)
        return y


class Mixture(nn.Module):
    def __init__(self, experts: int, top_k: int, normalised: bool) -> None:
        super().__init__()
        self.gate = Router(experts, top_k, normalised)
        self.experts = Experts(experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        _, values, chosen = self.gate(flat)
        return self.experts(flat, chosen, values).view_as(x)


class Model(nn.Module):
    def __init__(self, experts: int = 5, top_k: int = 2, normalised: bool = True) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.norm, self.mixture = nn.LayerNorm(WIDTH), Mixture(experts, top_k, normalised)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x + self.mixture(self.norm(x)))


class Biased(Experts):
    """Experts with vectors that are added behind each product."""

    def __init__(self, experts: int) -> None:
        super().__init__(experts)
        self.up_bias = nn.Parameter(torch.randn(experts, NEURONS))
        self.down_bias = nn.Parameter(torch.randn(experts, WIDTH))
        self.gates: tuple[Tensor | float, ...] = 1.0, [1.0] * experts

    def forward(self, x: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in chosen.unique():
            token, place = torch.where(chosen == expert)
            hidden = functional.linear(x[token], self.up[expert], self.up_bias[expert])
            hidden = hidden.tanh() * self.gates[0]
            part = functional.linear(hidden, self.down[expert], self.down_bias[expert])
            part = part * values[token, place, None] * self.gates[1][expert]
            y = y.index_add(0, token, part)
        return y
