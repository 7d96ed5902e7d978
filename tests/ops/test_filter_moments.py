"""filter_moments on the CPU, beside what test_parameter_ops.py says of it."""

from __future__ import annotations

import pytest
import torch

import taylor_kernels as tk
from tests.helpers import cases

BACKENDS = ("cpu", "reference")


def test_error_is_at_most_twice_that_of_eager_sums():
    """In the root mean square over 2,048 filters: that varies by 3%, the greatest by a third."""
    squares = torch.zeros(2, 5, dtype=torch.float64)  # ours, eager
    for _ in range(8):
        weight, grad = torch.randn(2, 256, 2304)
        ref, bound = cases.reference64(weight, grad, 0)
        gw = weight * grad
        terms = torch.stack((gw, gw * gw, gw.abs(), weight * weight, grad * grad), -1)
        for of, sums in zip(
            squares, (tk.filter_moments(weight, grad, backend="cpu"), terms.sum(1)), strict=True
        ):
            of += ((sums - ref) / bound).square().sum(0)
    ours, eager = squares.sqrt()
    assert (ours <= 2 * eager).all(), (ours, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_products_do_not_underflow(backend):
    weight = torch.full((3, 100), 1e-3, dtype=torch.float16)
    grad = torch.full((3, 100), 1e-4, dtype=torch.float16)
    table = tk.filter_moments(weight, grad, backend=backend)
    expected = 100 * (weight[0, 0].double() * grad[0, 0].double()) ** 2
    assert (weight * grad).square().sum() == 0  # what half arithmetic makes of it
    torch.testing.assert_close(table[:, 1].double(), expected.expand(3), rtol=1e-5, atol=0)


W = torch.randn(4, 6, 3, 3)
BAD_INPUTS = {
    "shape": (dict(weights=W, grads=W[:3]), ValueError, r"grads: shape \(3, 6, 3, 3\).*weights"),
    "dtype": (dict(weights=W, grads=W.half()), ValueError, "grads: dtype"),
    "device": (dict(weights=W, grads=W.to("meta")), TypeError, "grads: a meta tensor"),
    "meta": (dict(weights=W.to("meta"), grads=W), TypeError, "weights: a meta tensor"),
    "integer": (dict(weights=W.int(), grads=W.int()), TypeError, "weights: dtype torch.int32"),
    "complex": (dict(weights=W.cfloat(), grads=W.cfloat()), TypeError, "dtype torch.complex64"),
    "sparse": (dict(weights=W.to_sparse(), grads=W), TypeError, "layout torch.sparse_coo"),
    "none": (dict(weights=[W, W], grads=[W, None]), TypeError, r"grads\[1\].*NoneType.*backward"),
    "length": (dict(weights=[W, W], grads=[W]), ValueError, "grads: 1 gradients for 2 weights"),
    "mixed": (dict(weights=[W], grads=W), TypeError, "grads: got one tensor for a sequence"),
    "dim": (dict(weights=W, grads=W, dim=2), ValueError, "dim: 2 is not one of"),
    "dims": (dict(weights=W, grads=W, dim=(1, 0)), ValueError, r"dim: \(1, 0\)"),
    "vector": (dict(weights=W[0, 0, 0], grads=W[0, 0, 0], dim=1), ValueError, "no dim 1"),
    "scalar": (dict(weights=W.sum(), grads=W.sum()), ValueError, "has 0 dimensions"),
    "groups": (dict(weights=W, grads=W, dim=1, groups=3), ValueError, "groups: 3 does not divide"),
    "no_groups": (dict(weights=W, grads=W, groups=0), ValueError, "groups: 0 is not a positive"),
    "nothing": (dict(weights=None, grads=None), TypeError, "weights: expected a tensor or a seq"),
    "no_grads": (dict(weights=[W], grads=None), TypeError, "grads: expected a tensor or a seq"),
    "no_dim": (dict(weights=W, grads=W, dim=None), ValueError, "dim: None is not one of"),
    "odd_groups": (dict(weights=W, grads=W, groups=None), TypeError, "groups: expected an int"),
    "odd_backend": (dict(weights=W, grads=W, backend=3), TypeError, "backend: 3 is not one of"),
    "backend": (dict(weights=W, grads=W, backend="cudnn"), ValueError, "backend: 'cudnn'.*cuda"),
    "gpu_backend": (dict(weights=W, grads=W, backend="cuda"), ValueError, "does not run on cpu"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_one_clear_error(bad):
    arguments, error, message = BAD_INPUTS[bad]
    with pytest.raises(error, match=message):
        tk.filter_moments(**arguments)
