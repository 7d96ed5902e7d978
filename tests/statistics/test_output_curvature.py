"""The root of the loss's curvature at the model's output, down to where little is left of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from taylor_kernels.statistics.output_curvature import curvature_root


def softmax_hessian(logits: torch.Tensor) -> torch.Tensor:
    """[N, K, K] float64 of a mean cross-entropy: (diag(p) − p pᵀ) / N."""
    p = logits.detach().double().softmax(1)
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)


@pytest.mark.parametrize("margin", [0, 5, 10, 20, 40, 200])
@pytest.mark.parametrize("classes", [2, 10, 40])
def test_examples_that_the_model_is_sure_of_have_a_curvature_too(margin, classes):
    labels = torch.randint(0, classes, (33,))
    logits = torch.randn(33, classes) + margin * F.one_hot(labels, classes)
    logits.requires_grad_()
    root = curvature_root(F.cross_entropy(logits, labels), logits).double()
    error = (root @ root.transpose(1, 2) - softmax_hessian(logits)).abs().max()
    assert error <= 16 * torch.finfo(torch.float32).eps / len(labels)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 11), (12, 4), (7, 8)])
def test_two_examples_that_meet_are_found_wherever_they_are(first, second):
    output = torch.randn(13, 4, requires_grad=True)
    loss = output.square().sum() + 1e-6 * (output[first] + output[second]).square().sum()
    with pytest.raises(ValueError, match="lets examples meet"):
        curvature_root(loss, output)


def test_a_curvature_that_is_not_finite_is_handed_on():
    output = torch.randn(3, 4, requires_grad=True)
    scale = torch.tensor([1.0, float("inf"), 1.0])[:, None]
    assert not curvature_root((output.square() * scale).sum(), output).isfinite().all()
