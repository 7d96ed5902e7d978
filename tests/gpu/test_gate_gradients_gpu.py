"""gate_gradients on a GPU: right values, the same bits, streams and graphs."""

from __future__ import annotations

import pytest
import torch

import taylor_kernels as tk
from taylor_kernels.ops.gate_gradients import gate_gradients
from tests.helpers.cases import (
    DTYPES,
    GateCase,
    assert_close,
    gate_cases,
    gate_reference64,
    random_bias,
    random_like_case,
    same_bits,
)
from tests.helpers.graphs import NEEDS_GPU, check_replay, run_behind_a_late_copy

pytestmark = NEEDS_GPU

GATE_CASES = [
    *gate_cases(),
    GateCase("resnet", (8, 64, 56, 56), bias=True),
    GateCase("resnet_last", (8, 256, 7, 7)),
    GateCase("channels_last", (8, 64, 56, 56), layout="channels_last", bias=True),
    GateCase("tokens", (4, 1970, 768), channel_dim=2, bias=True),
    GateCase("volume", (2, 5, 40, 33, 50)),
    GateCase("heads", (2, 300, 12, 64), channel_dim=2),
    GateCase("rows_in_segments", (1, 2, 1000, 501), bias=True),
    GateCase("features", (512, 2048), bias=True),
    GateCase("features_odd", (4097, 1001), bias=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATE_CASES, ids=lambda case: case.name)
def test_gates(case: GateCase, dtype: torch.dtype, backend: str) -> None:
    y, dy = random_like_case(case, dtype, "cuda")
    bias = random_bias(case, dtype, "cuda")
    args = {"bias": bias, "channel_dim": case.channel_dim, "backend": backend}
    got = gate_gradients(y, dy, **args)
    assert_close(got, *gate_reference64(y, dy, bias, case.channel_dim))
    assert same_bits(got, gate_gradients(y, dy, **args))


def test_nan_and_infinity_stay_in_their_gate(backend: str) -> None:
    y, dy = torch.randn(2, 4, 30, 20, 20, device="cuda")
    y[0, 1, 2, 2], dy[1, 2, 0, 0] = float("nan"), float("-inf")
    assert_close(gate_gradients(y, dy, backend=backend), *gate_reference64(y, dy))


def test_graph_replay_sees_new_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # filling memory is no part of what is captured
    y, dy = torch.randn(2, 8, 600, 64, device="cuda")
    check_replay(lambda: [gate_gradients(y, dy, channel_dim=2, backend=backend)], [dy])


def test_runs_on_the_current_stream(backend: str) -> None:
    y, dy = torch.randn(2, 64, 256, 28, 28, device="cuda")
    (got,) = run_behind_a_late_copy(lambda dy: [gate_gradients(y, dy, backend=backend)], dy)
    assert same_bits(got, gate_gradients(y, dy, backend=backend))


@pytest.mark.large
def test_more_than_2_to_31_elements(backend: str) -> None:
    rows, columns = 2**16 + 1, 2**15 + 8
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    y = torch.ones(1, rows, columns, dtype=torch.bfloat16, device="cuda")
    dy = torch.zeros_like(y)
    dy[0, -1, -1], dy[0, 0, 0], dy[0, rows // 2, 5] = 3, 2, -1
    got = gate_gradients(y, dy, channel_dim=2, backend=backend)
    assert got[0, [0, 5, -1]].tolist() == [2, -1, 3]


def test_backends_agree() -> None:
    missing = [name for name in ("cuda", "triton") if not tk.available_backends()[name]]
    if missing:
        pytest.skip(f"no {missing[0]} backend here")
    for case in GATE_CASES:
        y, dy = random_like_case(case, torch.bfloat16, "cuda")
        bias = random_bias(case, torch.bfloat16, "cuda")
        args = {"bias": bias, "channel_dim": case.channel_dim}
        ours, theirs = (gate_gradients(y, dy, **args, backend=name) for name in ("cuda", "triton"))
        assert_close(ours, theirs.double(), gate_reference64(y, dy, bias, case.channel_dim)[1])
