"""conv2d_fisher and linear_fisher as PyTorch calls them: traced, under vmap, with bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
from tests.helpers.programs import run_program


def test_op_contract():
    for dtype in (torch.float32, torch.bfloat16):
        x, dy, weight = torch.randn(2, 6, 5, 5), torch.randn(2, 4, 3, 3), torch.randn(4, 3, 3, 3)
        for scaled in (None, weight):
            args = (x.to(dtype), dy.to(dtype), scaled, [4, 3, 3, 3], [2, 2], [1, 1], [1, 1], 2)
            torch.library.opcheck(torch.ops.taylor_kernels.conv2d_fisher, (*args, False, None))


def test_compiles_without_graph_breaks():
    def score(x: Tensor, dy: Tensor) -> Tensor:
        return tk.conv2d_fisher(x, (4, 6, 3, 3), dy, padding=1).sum(0) * 2

    x, dy = torch.randn(2, 6, 5, 5), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(torch.compile(score, fullgraph=True)(x, dy), score(x, dy))


@pytest.mark.parametrize("mode", ["export", "compile"])
def test_traces_with_sizes_unknown(mode):
    class Score(torch.nn.Module):
        def forward(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
            return tk.conv2d_fisher(x, weight.shape, dy, padding=1, weight=weight)

    def inputs(n: int, c: int, o: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(n, c, side, side), torch.randn(n, o, side, side), torch.randn(o, c, 3, 3)

    first = inputs(2, 6, 4, 5)
    if mode == "compile":
        traced = torch.compile(Score(), fullgraph=True, dynamic=True)
        traced(*first)
    else:
        auto = torch.export.Dim.AUTO
        dims = ([auto] * 4, [auto] * 4, {0: auto, 1: auto})
        traced = torch.export.export(Score(), first, dynamic_shapes=dims, strict=False).module()
    others = inputs(3, 7, 5, 8)
    torch.testing.assert_close(traced(*others), Score()(*others))


PRECISIONS = """
import os, torch, taylor_kernels as tk
from unittest.mock import Mock, patch

def call():
    tk.conv2d_fisher(torch.ones(1, 1, 1, 1), (1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    tk.linear_fisher(torch.ones(1, 1), torch.ones(1, 1))

def asks():  # what a kernel is told of a convolution, then of a linear layer
    with (
        patch("taylor_kernels.backends.native.plans_calls", False),
        patch("taylor_kernels.backends.native.conv2d_fisher") as kernel,
    ):
        call()
    with patch("taylor_kernels.ops.conv2d_fisher.one_output") as direct:
        call()
    plans = [Mock(), Mock()]
    for plan, run in zip(plans, direct.call_args_list):
        run.args[-1](plan)  # as a GPU would have it
    told = [run.args[0].tf32 for run in kernel.call_args_list]
    assert not direct.called or told == [plan.set_tf32.call_args.args[0] for plan in plans]
    return told

def check(setting, *expected):  # in a process of its own: new words cannot be taken back in old
    if os.fork() == 0:
        exec("torch." + setting)
        print("torch." + setting, asks())
        os._exit(asks() != list(expected))
    assert os.wait()[1] == 0, setting

check("backends.cudnn.allow_tf32 = True", True, False)
check("backends.cudnn.allow_tf32 = False", False, False)
check("backends.cuda.matmul.allow_tf32 = True", True, True)
check("set_float32_matmul_precision('high')", True, True)
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # from PyTorch 2.9 on
    check("backends.fp32_precision = 'tf32'", True, True)
    check("backends.fp32_precision = 'ieee'", False, False)
    check("backends.cudnn.conv.fp32_precision = 'ieee'", False, False)
    check("backends.cuda.matmul.fp32_precision = 'tf32'", True, True)
"""


def test_tf32_is_asked_in_whichever_words_the_user_has():
    run = run_program(PRECISIONS)
    assert run.returncode == 0, run.stdout + run.stderr


def test_result_is_not_differentiable():
    x, dy = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)
    assert not tk.conv2d_fisher(x, (5, 3, 1, 1), dy).requires_grad
    geometry = [1, 1], [0, 0], [1, 1], 1, False
    for backend in ("cpu", "reference"):
        got = torch.ops.taylor_kernels.conv2d_fisher(x, dy, None, (5, 3, 1, 1), *geometry, backend)
        assert got.equal(tk.conv2d_fisher(x, (5, 3, 1, 1), dy, backend=backend))
        assert not got.requires_grad


def test_vmap_gives_the_bits_of_each_slice():
    x, dy, weight = torch.randn(3, 4, 7), torch.randn(3, 4, 5), torch.randn(5, 7)

    def fisher(x, dy):
        return tk.linear_fisher(x, dy, weight=weight)

    got = torch.vmap(fisher)(x, dy)
    assert got.equal(torch.stack([fisher(*slices) for slices in zip(x, dy, strict=True)]))


X, DY, SIZE = torch.randn(2, 6, 8, 8), torch.randn(2, 4, 8, 8), (4, 6, 3, 3)
GOOD = {"input": X, "weight_size": SIZE, "grad_output": DY, "padding": 1}
BAD_INPUTS = {
    "grad_size": ({"padding": 0}, ValueError, r"give an output of \(2, 4, 6, 6\)"),
    "grad_filters": ({"weight_size": (5, 6, 3, 3)}, ValueError, r"output of \(2, 5, 8, 8\)"),
    "grad_batch": ({"grad_output": DY[:1]}, ValueError, r"output of \(2, 4, 8, 8\)"),
    "channels": ({"groups": 2}, ValueError, "input: has 6 channels, but .* takes 12"),
    "groups": ({"groups": 3}, ValueError, "groups: 3 is not a positive integer that divides the 4"),
    "kernel": ({"weight_size": (4, 6, 11, 3)}, ValueError, "weight_size: a kernel of .*not fit"),
    "size": ({"weight_size": (4, 6, 3)}, ValueError, "weight_size: expected 4 integers from 1"),
    "size_int": ({"weight_size": 4}, ValueError, "weight_size: expected 4 integers"),
    "stride": ({"stride": 0}, ValueError, "stride: expected an integer or a pair"),
    "stride_float": ({"stride": 1.5}, ValueError, "stride: expected an integer"),
    "padding": ({"padding": -1}, ValueError, "padding: expected .* from 0 on"),
    "padding_same": ({"padding": "same"}, ValueError, "padding: .*as numbers"),
    "dilation": ({"dilation": (1, 2, 3)}, ValueError, "dilation: expected"),
    "unbatched": ({"input": X[0]}, ValueError, r"input: .*single example as \[1, C, H, W\]"),
    "grad_unbatched": ({"grad_output": DY[0]}, ValueError, "grad_output: has shape"),
    "dtype": ({"grad_output": DY.half()}, ValueError, "grad_output: dtype torch.float16"),
    "integers": ({"input": X.int()}, TypeError, "input: dtype torch.int32"),
    "sparse": ({"input": X.to_sparse()}, TypeError, "input: layout"),
    "meta": ({"input": X.to("meta")}, TypeError, "input: a meta tensor"),
    "none": ({"grad_output": None}, TypeError, "grad_output: .*NoneType"),
    "weight": ({"weight": torch.randn(4, 6, 3, 2)}, ValueError, r"weight: shape .*expected \(4, 6"),
    "weight_type": ({"weight": 3}, TypeError, "weight: expected a torch.Tensor"),
    "backend": ({"backend": "trition"}, ValueError, "'trition' is not one of"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_one_clear_error(bad):
    changed, error, message = BAD_INPUTS[bad]
    with pytest.raises(error, match=message):
        tk.conv2d_fisher(**{**GOOD, **changed})


BAD_LINEAR = {
    "tokens": (
        (torch.randn(2, 3, 4), torch.randn(2, 4, 5)),
        {},
        r"gives an output of \(2, 3, 'out",
    ),
    "vector": ((torch.randn(4), torch.randn(5)), {}, r"input: has shape \(4,\)"),
    "weight": (
        (torch.randn(2, 4), torch.randn(2, 5)),
        {"weight": torch.randn(4, 5)},
        r"weight: shape \(4, 5\) .*expected \(5, 4\)",
    ),
}


@pytest.mark.parametrize("bad", BAD_LINEAR)
def test_bad_linear_input_is_one_clear_error(bad):
    args, kwargs, message = BAD_LINEAR[bad]
    with pytest.raises(ValueError, match=message):
        tk.linear_fisher(*args, **kwargs)
