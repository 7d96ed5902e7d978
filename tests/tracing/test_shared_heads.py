"""Attention of which heads of keys and values serve several heads of queries."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from taylor_kernels.tracing import trace
from tests.tracing.removal import faults
from tests.zoo import judging


class SharedHeads(nn.Module):
    """Queries of `heads` heads, keys and values of `shared`.

    Args:
        how: one head is broadcast by PyTorch, repeated by the number that an attribute holds, as
            transformers' repeat_kv does, or repeated and multiplied by matmul.
        fused: one layer makes queries, keys and values, whose sizes attributes hold.
        norm: queries and keys are normalised over all their heads, as in OLMo 2.
    """

    def __init__(
        self, heads: int, shared: int, dim: int, how: str, *, fused: bool, norm: bool
    ) -> None:
        super().__init__()
        self.how, self.head_dim, self.repeats = how, dim, heads // shared
        self.query_size, self.shared_size = heads * dim, shared * dim
        self.read = nn.Linear(5, 7)
        sizes = [self.query_size, self.shared_size, self.shared_size]
        parts = [sum(sizes)] if fused else sizes
        self.qkv = nn.ModuleList(nn.Linear(7, size) for size in parts)
        self.norms = nn.ModuleList(
            nn.RMSNorm(size) if norm else nn.Identity() for size in sizes[:2]
        )
        self.write = nn.Linear(self.query_size, 6)
        self.leave = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x)
        if len(self.qkv) == 1:
            sizes = (self.query_size, self.shared_size, self.shared_size)
            q, k, v = self.qkv[0](y).split(sizes, -1)
        else:
            q, k, v = (layer(y) for layer in self.qkv)
        q, k = (norm(part) for norm, part in zip(self.norms, (q, k), strict=True))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.how != "broadcast":
            k, v = self.repeated(k), self.repeated(v)
        if self.how == "matmul":
            z = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        else:
            z = functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.leave(self.write(z.transpose(1, 2).flatten(2)).tanh())

    def repeated(self, x: Tensor) -> Tensor:
        n, shared, length, dim = x.shape
        x = x[:, :, None].expand(n, shared, self.repeats, length, dim)
        return x.reshape(n, shared * self.repeats, length, dim)


@pytest.mark.sample(8)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", ["broadcast", "repeated", "matmul"])
def test_heads_of_queries_that_share_one_go(how, fused, seed):
    draw = random.Random(f"{how} {fused} {seed}")
    torch.manual_seed(seed)
    heads, dim = draw.randint(3, 6), draw.choice([7, 8, 9])
    model, x = SharedHeads(heads, 1, dim, how, fused=fused, norm=False), torch.randn(1, 4, 5)
    channels = trace(model, x)
    assert list(channels.skipped) == ["leave"]
    assert not faults(model, x, channels, every=False)
    judging.check_all_but(["leave"], model, x)


@pytest.mark.parametrize("seed", range(4))
def test_one_of_two_shared_heads_goes_where_a_norm_reads_them(seed):
    """What is left of a norm is one head of several channels, not one channel."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dim, repeats = draw.choice([3, 4, 5]), draw.choice([2, 3])
    model = SharedHeads(2 * repeats, 2, dim, "repeated", fused=False, norm=True)
    judging.check_all_but(["leave"], model, torch.randn(1, 4, 5))


class Grouped(nn.Module):
    """One layer makes queries, a key and a value for each of `shared` groups, as Falcon's does.

    PyTorch counts the groups; how many queries there are in one is worked out from attributes.
    """

    def __init__(self, heads: int, shared: int, dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, shared, dim
        self.read, self.qkv = nn.Linear(5, 11), nn.Linear(11, (heads + 2 * shared) * dim)
        self.write, self.leave = nn.Linear(heads * dim, 13), nn.Linear(13, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, _ = x.shape
        per = self.num_heads // self.num_kv_heads
        parts = self.qkv(self.read(x)).view(n, steps, -1, per + 2, self.head_dim)
        q, k, v = parts[..., :-2, :], parts[..., [-2], :], parts[..., [-1], :]
        k, v = k.broadcast_to(q.shape), v.broadcast_to(q.shape)
        q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        z = functional.scaled_dot_product_attention(q, k, v)
        z = z.transpose(1, 2).reshape(n, steps, self.num_heads * self.head_dim)
        return self.leave(self.write(z).tanh())


@pytest.mark.parametrize(("heads", "shared", "dim"), [(6, 2, 5), (12, 3, 7), (10, 5, 3)])
def test_groups_of_heads_that_pytorch_counts_can_go(heads, shared, dim):
    judging.check_all_but(["leave"], Grouped(heads, shared, dim), torch.randn(1, 4, 5))


class Latent(nn.Module):
    """Latent attention as DeepSeek's: a part of the key is one for all heads, beside their own."""

    def __init__(self, heads: int, *, stacked: bool) -> None:
        super().__init__()
        self.heads, self.stacked = heads, stacked
        self.query, self.down = nn.Linear(11, heads * 6), nn.Linear(11, 5)
        self.shared, self.up = nn.Linear(11, 3), nn.Linear(5, heads * 10)
        self.out, self.leave = nn.Linear(heads * 7, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, steps, _ = x.shape
        query = self.query(x).view(n, steps, self.heads, -1).transpose(1, 2)
        own, value = self.up(self.down(x)).view(n, steps, self.heads, -1).split([3, 7], -1)
        shared = self.shared(x)[:, :, None].expand(-1, -1, self.heads, -1)
        join = (
            (lambda parts: torch.stack(parts, -1).flatten(-2))
            if self.stacked
            else (lambda parts: torch.cat(parts, -1))
        )
        key = join([own, shared]).transpose(1, 2)
        y = functional.scaled_dot_product_attention(query, key, value.transpose(1, 2))
        return self.leave(self.out(y.transpose(1, 2).reshape(n, steps, -1)).tanh())


@pytest.mark.parametrize("stacked", [True, False])
def test_heads_go_beside_a_key_that_all_of_them_share(stacked):
    model = Latent(random.randint(3, 5), stacked=stacked)
    pruner, optimizer = judging.new_pruner(model, torch.randn(2, 8, 11), 0.6)
    assert set(pruner.skipped) == {"shared", "leave"}
    verdict = judging.prune(model, torch.randn(2, 8, 11), pruner, optimizer)
    assert verdict.reached
    assert verdict.error < 1e-12
