"""Per-example norms as PyTorch calls them: traced, under vmap, of nothing, with bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk


def test_op_contract():
    op = torch.ops.taylor_kernels.conv_example_norms
    for dtype in (torch.float32, torch.bfloat16):
        for dims in (1, 2, 3):
            x = torch.randn(2, 6, *[5] * dims, dtype=dtype)
            dy = torch.randn(2, 4, *[3] * dims, dtype=dtype)
            geometry = [2] * dims, [1] * dims, [1] * dims, 2, False, None
            torch.library.opcheck(op, (x, dy, [4, 3, *[3] * dims], *geometry))


def test_compiles_without_graph_breaks():
    def norms(x: Tensor, dy: Tensor) -> Tensor:
        return tk.conv2d_example_norms(x, (4, 6, 3, 3), dy, padding=1).sqrt() * 2

    x, dy = torch.randn(2, 6, 5, 5), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(torch.compile(norms, fullgraph=True)(x, dy), norms(x, dy))


def test_traces_with_sizes_unknown():
    class Norms(torch.nn.Module):
        def forward(self, x: Tensor, dy: Tensor) -> Tensor:
            return tk.linear_example_norms(x, dy)

    auto = torch.export.Dim.AUTO
    first = torch.randn(2, 3, 7), torch.randn(2, 3, 5)
    shapes = ([auto] * 3, [auto] * 3)
    traced = torch.export.export(Norms(), first, dynamic_shapes=shapes, strict=False).module()
    others = torch.randn(4, 9, 6), torch.randn(4, 9, 8)
    torch.testing.assert_close(traced(*others), Norms()(*others))


def test_result_is_not_differentiable():
    x, dy = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)
    for backend in (None, "cpu", "reference"):
        assert not tk.conv2d_example_norms(x, (5, 3, 1, 1), dy, backend=backend).requires_grad


def test_vmap_gives_the_bits_of_each_slice():
    x, dy = torch.randn(3, 4, 7), torch.randn(3, 4, 5)
    got = torch.vmap(tk.linear_example_norms)(x, dy)
    each = [tk.linear_example_norms(*slices) for slices in zip(x, dy, strict=True)]
    assert got.equal(torch.stack(each))


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_without_channels_or_filters_norms_are_zero(backend):
    for inputs, outputs in ((0, 5), (7, 0)):
        x, dy = torch.randn(3, 2, inputs), torch.randn(3, 2, outputs)
        assert tk.linear_example_norms(x, dy, backend=backend).tolist() == [0, 0, 0]


X, DY, SIZE = torch.randn(2, 6, 8, 8), torch.randn(2, 4, 8, 8), (4, 6, 3, 3)
GOOD = {"input": X, "weight_size": SIZE, "grad_output": DY, "padding": 1}
BAD = {
    "grad_size": ({"padding": 0}, ValueError, r"give an output of \(2, 4, 6, 6\)"),
    "channels": ({"groups": 2}, ValueError, "input: has 6 channels, but .* takes 12"),
    "kernel": ({"weight_size": (4, 6, 11, 3)}, ValueError, "weight_size: a kernel of .*not fit"),
    "size": ({"weight_size": (4, 6, 3)}, ValueError, "weight_size: expected 4 integers from 1"),
    "stride": ({"stride": 0}, ValueError, "stride: expected an integer or a pair"),
    "padding_same": ({"padding": "same"}, ValueError, "padding: .*as numbers"),
    "unbatched": ({"input": X[0]}, ValueError, r"input: .*single example as \[1, C, H, W\]"),
    "dtype": ({"grad_output": DY.half()}, ValueError, "grad_output: dtype torch.float16"),
    "integers": ({"input": X.int()}, TypeError, "input: dtype torch.int32"),
    "none": ({"grad_output": None}, TypeError, "grad_output: .*NoneType"),
    "backend": ({"backend": "trition"}, ValueError, "'trition' is not one of"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_clear_error(bad):
    changed, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        tk.conv2d_example_norms(**{**GOOD, **changed})


def test_bad_input_of_other_dimensions_is_told_in_these():
    line, size = torch.randn(2, 6, 8), (4, 6, 3)
    with pytest.raises(ValueError, match=r"input: .*expected \[N, C, L\]"):
        tk.conv1d_example_norms(X, size, line)
    with pytest.raises(ValueError, match="dilation: expected an integer or a list of one from 1"):
        tk.conv1d_example_norms(line, size, line, dilation=(1, 1))
    with pytest.raises(ValueError, match=r"input: .*expected \[N, C, D, H, W\]"):
        tk.conv3d_example_norms(X, (4, 6, 3, 3, 3), DY)
    with pytest.raises(ValueError, match="stride: expected an integer or three integers from 1"):
        tk.conv3d_example_norms(X, (4, 6, 3, 3, 3), DY, stride=(1, 1))
    with pytest.raises(ValueError, match=r"gives an output of \(2, 3, 'out"):
        tk.linear_example_norms(torch.randn(2, 3, 4), torch.randn(2, 4, 5))
