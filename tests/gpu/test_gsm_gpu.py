"""global_threshold, sparse_momentum and GSM on a GPU: the reference's bits, and no wait."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.methods import GSM
from taylor_kernels.ops.global_threshold import global_threshold
from taylor_kernels.ops.sparse_momentum import sparse_momentum
from tests.helpers.graphs import NEEDS_GPU
from tests.helpers.list_steps import RANKED, SIZES

pytestmark = NEEDS_GPU
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: ResNet-50's largest layers, and what ends within a chunk.
LARGE = [(2048, 512, 1, 1), (512, 512, 3, 3), (1000, 2048), (1000,), (64, 3, 7, 7)]


def random(shapes, dtype: torch.dtype, ties: bool) -> list[Tensor]:
    found = [torch.randn(s, device="cuda") for s in shapes]
    return [(t.round() if ties else t).to(dtype) for t in found]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_references_bits(backend, ties, dtype):
    for shapes, ranked in ((LARGE, [True, True, True, False, True]), (SIZES, list(RANKED))):
        w, g, z = (random(shapes, dtype, ties) for _ in range(3))
        total = sum(t.numel() for t, each in zip(w, ranked, strict=True) if each)
        for count in (1, total // 60, total - 1, total):
            tables = [
                global_threshold(w, count, factors=g, ranked=ranked, backend=name)
                for name in ("reference", backend)
            ]
            assert tables[0].equal(tables[1]), count
        each = {"lr": [0.1] * 5, "momentum": [0.9] * 5, "weight_decay": [0.01] * 5}
        found = []
        for name in ("reference", backend):
            mine, momenta = ([t.clone() for t in lists] for lists in (w, z))
            sparse_momentum(mine, g, momenta, tables[0], ranked=ranked, backend=name, **each)
            found.append(mine + momenta)
        assert all(a.equal(b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_steps_wait_for_nothing_and_say_later_what_was_not_finite(backend):
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10)).cuda()
    optimizer = GSM(model.parameters(), 0.01, compression=10, backend=backend)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error" if backend == "cuda" else "default")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before = [p.detach().clone() for p in model.parameters()]
    model[2].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert all(p.equal(old) for p, old in zip(model.parameters(), before, strict=True))
    with pytest.raises(FloatingPointError, match=r"\['params'\]\[2\]"):
        optimizer.check()
