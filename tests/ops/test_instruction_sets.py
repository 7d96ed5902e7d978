"""What the instruction sets of a processor promise each other, and how one is chosen."""

from __future__ import annotations

import pytest
import torch

import taylor_kernels as tk
from taylor_kernels.backends.native import _native
from tests.helpers.cases import DTYPES, GateCase, filter_moments_cases, random_like_case
from tests.helpers.parameter_ops import EVERY_OP, ParameterOp
from tests.helpers.programs import Run, run_program

#: Those that fuse a multiplication and an addition.
FUSED = [isa for isa in _native.cpu_isas() if isa != "baseline"]


@pytest.fixture(params=EVERY_OP, ids=lambda op: op.name)
def op(request: pytest.FixtureRequest) -> ParameterOp:
    return request.param


def on_each(run) -> list[torch.Tensor]:
    """run() on every set of FUSED."""
    before, found = _native.cpu_isa(), []
    try:
        for isa in FUSED:
            _native.set_cpu_isa(isa)
            found.append(run())
    finally:
        _native.set_cpu_isa(before)
    return found


needs_two = pytest.mark.skipif(len(FUSED) < 2, reason=f"this processor has {FUSED} alone")


@needs_two
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_sets_that_fuse_give_the_same_bits(op, dtype):
    long = [torch.randn(op.lists, *shape) for shape in ((3, 9001), (130, 515), (2049, 24))]
    inputs = [tuple(t.to(dtype)) for t in long]
    inputs += [random_like_case(c, dtype, count=op.lists) for c in filter_moments_cases()]
    for tensors in inputs:
        dim = (0, 1) if tensors[0].dim() > 1 else 0
        for axes in {0, dim}:
            first, *others = on_each(
                lambda t=tensors, a=axes: torch.cat([x.flatten() for x in op.run(t, a)])
            )
            for other in others:
                assert other.equal(first), (tensors[0].shape, axes)


@needs_two
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bias", [False, True])
def test_gates_of_sets_that_fuse_give_the_same_bits(layout, bias):
    for dtype in DTYPES:
        for shape in ((3, 70, 7, 7), (2, 13, 30, 41), (2, 200, 17, 3)):
            y, dy, *_ = random_like_case(GateCase("any", shape, 1, layout), dtype, count=2)
            b = torch.randn(shape[1]).to(dtype) if bias else None
            first, *others = on_each(lambda y=y, dy=dy, b=b: tk.gate_gradients(y, dy, bias=b))
            for other in others:
                assert other.equal(first)


def started_with(name: str) -> Run:
    ask = "import taylor_kernels.backends.native as n; print(n._native.cpu_isa())"
    return run_program(ask, TAYLOR_KERNELS_ISA=name)


def test_the_environment_chooses_a_set():
    for isa in _native.cpu_isas():
        run = started_with(isa)
        assert (run.returncode, run.stdout.strip()) == (0, isa), run.stderr
    assert started_with("").stdout.strip() == _native.cpu_isas()[0]


def test_a_set_that_the_processor_lacks_is_an_error_that_lists_what_it_has():
    run = started_with("sse9")
    assert run.returncode != 0
    assert "TAYLOR_KERNELS_ISA is 'sse9'; this processor can run" in run.stderr
    assert _native.cpu_isas()[0] in run.stderr
