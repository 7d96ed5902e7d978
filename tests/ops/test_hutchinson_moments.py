"""hutchinson_moments on the CPU, beside what test_parameter_ops.py says of it."""

from __future__ import annotations

import pytest
import torch

import taylor_kernels as tk
from tests.helpers import cases
from tests.helpers.parameter_ops import BAD_HVPS, HUTCHINSON, ONE_FOR_TWO

BACKENDS = ("cpu", "reference")


@pytest.mark.parametrize("shape", [(3, 9001), (70, 1500), (520, 13, 3, 3), (5000,)], ids=str)
def test_signs_hold_across_windows_strips_and_tasks(shape, each_isa):
    tensors = [torch.randn(shape) for _ in range(2)]
    for dim in (0,) if len(shape) == 1 else (0, 1, (0, 1)):
        HUTCHINSON.check(tensors, dim, 1, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_its_signs_are_those_of_rademacher_like(backend, layout):
    """With Hz = z the sum is Σ w², whatever the signs are: one wrong sign shows."""
    weights = [
        cases.lay_out(torch.randn(shape), layout if len(shape) > 1 else "contiguous")
        for shape in ((9, 5, 3, 3), (200,), (40, 70), (3, 2, 8, 8))
    ]
    z = tk.rademacher_like(weights, seed=17)
    for weight, got in zip(
        weights, tk.hutchinson_moments(weights, z, seed=17, backend=backend), strict=True
    ):
        squares = weight.double().square().reshape(len(weight), -1).sum(1, keepdim=True)
        cases.assert_close(got[:, None], squares, squares)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_probe_is_exact_for_a_diagonal_hessian(backend):
    """L(w) = ½ Σ h_k w_k²: Hz by autograd, and half a moment is OBD's saliency."""
    weights = [torch.randn(shape, requires_grad=True) for shape in ((6, 4, 3, 3), (5, 30))]
    diagonals = [torch.randn_like(w) for w in weights]
    loss = sum((h * w.square()).sum() / 2 for h, w in zip(diagonals, weights, strict=True))
    grads = torch.autograd.grad(loss, weights, create_graph=True)
    z = tk.rademacher_like(weights, seed=0)
    hvps = torch.autograd.grad(grads, weights, z)
    moments = tk.hutchinson_moments(weights, hvps, seed=0, backend=backend)
    for got, w, h in zip(moments, weights, diagonals, strict=True):
        terms = h.double() * w.detach().double().square()
        cases.assert_close(got[:, None], *cases.sums64([terms], 0))


def test_the_mean_over_probes_is_the_curvature():
    """A full Hessian: the mean of N probes within six of its known standard deviations.

    A moment is zᵀAz with A_kj = w_k² H_kj for the filter's k, so its variance is 2 Σ_{j≠k} S_jk²,
    S = (A + Aᵀ)/2.
    """
    filters, size, probes = 4, 24, 500
    root = torch.randn(size, size, dtype=torch.float64)
    hessian, weight = root @ root.T, torch.randn(filters, size // filters, dtype=torch.float64)
    total = torch.zeros(filters, dtype=torch.float64)
    for seed in range(probes):
        z = tk.rademacher_like(weight, seed=seed)
        hvp = (hessian @ z.flatten()).view_as(weight)
        total += tk.hutchinson_moments(weight, hvp, seed=seed)
    for f in range(filters):
        kept = torch.zeros_like(weight)
        kept[f] = weight[f].square()
        a = kept.flatten()[:, None] * hessian
        s = (a + a.T) / 2
        variance = 2 * (s - s.diag().diag()).square().sum()
        assert (total[f] / probes - a.trace()).abs() < 6 * (variance / probes).sqrt()


def test_streams_are_places_in_the_callers_list():
    """Also where dtypes split the list into launches."""
    weights = [torch.randn(3, 40, dtype=dtype) for dtype in (torch.float32, torch.float64) * 2]
    z = tk.rademacher_like(weights, seed=5)
    for weight, got in zip(weights, tk.hutchinson_moments(weights, z, seed=5), strict=True):
        expected = weight.double().square().sum(1)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_a_moment_is_one_number():
    weight = torch.randn(4, 5, requires_grad=True)
    moments = tk.hutchinson_moments(weight, torch.randn(4, 5), seed=0)
    assert (moments.shape, moments.requires_grad) == ((4,), False)


W = torch.randn(4, 6, 3, 3)
BAD_INPUTS = {
    **BAD_HVPS,
    "nothing": (dict(weights=None), TypeError, "weights: expected a tensor or a sequence"),
    "length": (dict(weights=[W, W], hvps=[W]), ValueError, ONE_FOR_TWO),
    "seed": (dict(seed=0.5), TypeError, "seed: expected an int, got float"),
    "large_seed": (dict(seed=2**64), ValueError, "seed: 18446744073709551616 does not fit"),
    "streams": (dict(streams=[0, 1]), ValueError, "streams: 2 values for 1 tensors"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_one_clear_error(bad):
    arguments, error, message = BAD_INPUTS[bad]
    with pytest.raises(error, match=message):
        tk.hutchinson_moments(**{**dict(weights=W, hvps=W, seed=0), **arguments})
