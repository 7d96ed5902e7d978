"""What einsum is made of: reshapes by sizes that no code has written, and products of stacks."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import judging


class LinearAttention(nn.Module):
    """Heads as wide as the stream over their number; products over positions come first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, width = x.shape
        shape = (n, steps, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        q, k = q.sigmoid(), k.sigmoid()
        mixed = torch.einsum("bhnd,bhne->bhde", k, v)
        scale = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
        y = torch.einsum("bhnd,bhde,bhn->bhne", q, mixed, scale)
        return self.out(y.transpose(1, 2).reshape(n, steps, width))


class Filters(nn.Module):
    """A filter for each channel, made of a few states, as that of S4D."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, states))
        self.decay = nn.Parameter(torch.rand(width, states))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.size(1), dtype=x.dtype)
        kernel = torch.einsum("hn,hnl->hl", self.weight, torch.exp(-self.decay[..., None] * steps))
        return self.out(torch.tensordot(x * kernel.T, self.out.weight, ([2], [1])).tanh())


@pytest.mark.parametrize("kind", ["attention", "filters"])
def test_products_of_many_dimensions_keep_no_channel(kind):
    heads, width = random.randint(2, 4), random.randint(2, 4)
    stream = heads * width
    inner = LinearAttention(stream, heads) if kind == "attention" else Filters(stream, width)
    model = nn.Sequential(nn.Linear(5, stream), inner, nn.Linear(stream, 6), nn.Linear(6, 2))
    judging.check_all_but(["3"], model, torch.randn(2, 4, 5))


#: Two products with weights of their own, and what shape these have.
WEIGHTS = {
    "rows": ("...i,oi->...o", (9, 5), "...i,oi->...o", (3, 9)),
    "columns": ("...i,io->...o", (5, 9), "...i,io->...o", (9, 3)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_einsum_are_layers(kind):
    one, first, other, second = WEIGHTS[kind]
    torch.manual_seed(random.randrange(2**31))

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(s) / 3) for s in (first, second))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(other, torch.einsum(one, x, self.up).sigmoid(), self.down)

    judging.check_all_but(["down"], Products(), torch.randn(2, 4, 5))


def test_stacks_of_weights_in_a_batched_product_are_layers():
    """All of a stack lose the same neurons; the wrapped ones of vmap are such a stack too."""

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.middle = (
                nn.Parameter(torch.randn(3, 7, 5)),
                nn.Parameter(torch.randn(3, 7, 8)),
            )
            self.down = nn.Parameter(torch.randn(3, 8, 2))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.vmap(lambda w: torch.nn.functional.linear(x, w).relu())(self.up)
            return (torch.bmm(y, self.middle).tanh() @ self.down).mean(0)

    judging.check_all_but(["down"], Ensemble(), torch.randn(6, 5))
