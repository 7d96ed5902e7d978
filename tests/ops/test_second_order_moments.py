"""second_order_moments on the CPU, beside what test_parameter_ops.py says of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
from taylor_kernels.ops.second_order_moments import second_order_sums
from tests.helpers.parameter_ops import BAD_HVPS, ONE_FOR_TWO, model_like_lists

BACKENDS = ("cpu", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_column_is_squared_and_nothing_else_changes(backend):
    lists, groups = model_like_lists(3)
    arguments = dict(dim=(0, 1), groups=groups, backend=backend)
    moments = tk.second_order_moments(*lists, **arguments)
    sums = second_order_sums(*lists, **arguments)
    for squared, signed in zip(moments, sums, strict=True):
        assert any((table[:, 0] < 0).any() for table in signed)
        for a, b in zip(squared, signed, strict=True):
            assert a[:, 0].equal(b[:, 0].square())
            assert a[:, 1].equal(b[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_loss_change_of_a_quadratic(backend):
    """L(w) = ½ (w−a)ᵀA(w−a): all filters but f at zero, q of f is exact."""
    size, filters = 30, 6
    root = torch.randn(size, size, dtype=torch.float64)
    matrix, centre = root @ root.T / size, torch.randn(size, dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return (w - centre) @ matrix @ (w - centre) / 2

    full = torch.randn(filters, size // filters, dtype=torch.float64)
    for f in range(filters):
        weight = torch.zeros_like(full)
        weight[f] = full[f]
        flat = weight.flatten()
        grad = (matrix @ (flat - centre)).view_as(weight)
        hvp = (matrix @ flat).view_as(weight)
        table = tk.second_order_moments(weight, grad, hvp, backend=backend)
        change = loss(flat) - loss(torch.zeros_like(flat))
        torch.testing.assert_close(table[f, 0], change**2)
        assert not table[torch.arange(filters) != f].any()


def test_squaring_runs_inside_torch_compile_and_under_vmap():
    tensors = torch.randn(3, 2, 6, 7)
    expected = [tk.second_order_moments(*slices) for slices in tensors.unbind(1)]
    compiled = torch.compile(tk.second_order_moments, backend="aot_eager", fullgraph=True)
    assert compiled(*tensors[:, 0]).equal(expected[0])
    assert torch.vmap(tk.second_order_moments)(*tensors).equal(torch.stack(expected))
    weight = tensors[0, 0].clone().requires_grad_()
    assert not tk.second_order_moments(weight, *tensors[1:, 0]).requires_grad


W = torch.randn(4, 6, 3, 3)
BAD_INPUTS = {
    **BAD_HVPS,
    "grad_shape": (dict(grads=W[:3]), ValueError, r"grads: shape \(3, 6, 3, 3\).*weights"),
    "device": (dict(hvps=W.to("meta")), TypeError, "hvps: a meta tensor"),
    "a_list": (dict(hvps=[W]), TypeError, "hvps: expected a torch.Tensor like weights, got list"),
    "none_in_list": (
        dict(weights=[W], grads=[W], hvps=[None]),
        TypeError,
        r"hvps\[0\].*NoneType",
    ),
    "length": (dict(weights=[W, W], grads=[W, W], hvps=[W]), ValueError, ONE_FOR_TWO),
    "mixed": (dict(weights=[W], grads=[W]), TypeError, "hvps: got one tensor for a sequence"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_one_clear_error(bad):
    arguments, error, message = BAD_INPUTS[bad]
    with pytest.raises(error, match=message):
        tk.second_order_moments(**{**dict(weights=W, grads=W, hvps=W), **arguments})
