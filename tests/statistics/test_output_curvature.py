"""Columns of the loss's curvature at what it reads, against the Hessian by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_kernels.statistics.hooks.loss_inputs import LossFunction, Place
from taylor_kernels.statistics.output_curvature import Columns, exact_columns, sampled_columns


def function(loss: Callable[..., Tensor], *inputs: Tensor) -> LossFunction:
    """The loss as a function of tensors that stand in a graph."""
    own = [z.clone().requires_grad_().view_as(z) for z in inputs]
    places = [Place.of(z) for z in own]
    return LossFunction(loss(*own), places, places)


def flat_hessian(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    def of_flat(flat: Tensor) -> Tensor:
        parts = flat.split([z.numel() for z in inputs])
        return loss(*(part.view_as(z) for part, z in zip(parts, inputs, strict=True)))

    return torch.autograd.functional.hessian(of_flat, torch.cat([z.flatten() for z in inputs]))


def outer(factor: Columns) -> Tensor:
    """Σ σ c cᵀ over everything."""
    total = torch.zeros(())
    for vectors, sign in factor.columns:
        column = torch.cat([v.reshape(-1) for v in vectors]).double()
        total = total + sign * column[:, None] * column
    return total


def softmax_hessian(logits: Tensor) -> Tensor:
    """[N, K, K] float64 of a mean cross-entropy: (diag(p) − p pᵀ) / N."""
    p = logits.double().softmax(1)
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)


def of_examples(factor: Columns, loss: LossFunction) -> Tensor:
    """[N, K, K]: Σ σ c cᵀ of each example alone, the slope's column too."""
    columns = [(vectors[0].flatten(1), sign) for vectors, sign in factor.columns]
    if factor.of_slope is not None:
        columns.append((loss.slopes[0] * factor.of_slope[:, None], 1))
    return sum(s * c.double()[:, :, None] * c.double()[:, None, :] for c, s in columns)


@pytest.mark.parametrize("margin", [0, 5, 10, 20, 40, 200])
@pytest.mark.parametrize("classes", [2, 10, 40])
def test_examples_that_the_model_is_sure_of_have_a_curvature_too(margin, classes):
    labels = torch.randint(0, classes, (33,))
    logits = torch.randn(33, classes) + margin * F.one_hot(labels, classes)
    expected = softmax_hessian(logits)
    bound = 16 * torch.finfo(torch.float32).eps / len(labels)
    loss = function(lambda z: F.cross_entropy(z, labels), logits)
    assert (of_examples(exact_columns(loss), loss) - expected).abs().max() <= bound
    # As many passes as there are columns: the closed form has nothing left to chance.
    every = of_examples(sampled_columns(loss, classes - 1, 0), loss)
    assert (every - expected).abs().max() <= 1e-3 * expected.abs().max() + bound
    sure = expected.diagonal(0, 1, 2).sum(1) < 1e-2 / len(labels)
    if sure.any():  # to their own scale, not to that of the others
        own = expected[sure].abs().amax((1, 2))
        assert ((every - expected)[sure].abs().amax((1, 2)) <= 2e-3 * own + 1e-16).all()


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_few_columns_of_a_cross_entropy_have_no_bias(passes):
    labels = torch.randint(0, 7, (6,))
    logits = 2 * torch.randn(6, 7, dtype=torch.float64)
    loss = function(lambda z: F.cross_entropy(z, labels), logits)
    draws = torch.stack(
        [of_examples(sampled_columns(loss, passes, seed), loss) for seed in range(150)]
    )
    expected = softmax_hessian(logits)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 6 * error + 1e-9).all()
    assert sampled_columns(loss, passes, 0).of_slope is not None


LOSSES = {
    "softmax of positions": lambda z: F.cross_entropy(z, torch.ones(3, 2).long()),
    "softmax, classes last": lambda z: F.cross_entropy(z.flatten(0, 1), torch.ones(12).long()),
    "of each alone": lambda z: F.binary_cross_entropy_with_logits(z, z.detach().sign().relu()),
    "bent both ways": lambda z: (z.cos() + 0.1 * z.square()).sum(),
    "all meet": lambda z: z.flatten(1).cumsum(0).sin().sum() + z.sum().square(),
    "dice": lambda z: 1 - 2 * z.sigmoid()[:, 0].sum() / (z.sigmoid().sum() + 1),
    "ignored": lambda z: F.cross_entropy(z, torch.tensor([[1, -100], [-100, 0], [0, 1]])),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_columns_of_any_loss_have_no_bias(loss):
    z = torch.randn(3, 4, 2, dtype=torch.float64)
    at = function(LOSSES[loss], z)
    expected = flat_hessian(LOSSES[loss], z)
    draws = torch.stack([outer(sampled_columns(at, 2, s, apart=False)) for s in range(150)])
    error = draws.std(0) / len(draws) ** 0.5
    scale = expected.abs().max()
    assert scale > 0
    assert ((draws.mean(0) - expected).abs() <= 6 * error + 1e-6 * scale).all()


ONES = torch.ones(2).long()
#: What is easily mistaken for a softmax: of one number there is none, and what the loss is looked
#: at with is 0 where an example's numbers are greatest.
NO_SOFTMAX = {
    "one number": ((5, 1), lambda z: F.mse_loss(z, torch.zeros_like(z))),
    "one logit": ((5, 1), lambda z: F.softplus(-z).mean()),
    "one logit of positions": ((3, 1, 2, 2), lambda z: F.softplus(z).mean()),
    "the greatest": ((4, 3), lambda z: z.amax(1).square().mean()),
    "some": ((4, 3), lambda z: F.cross_entropy(z[:2], ONES) + z[2:].amax(1).exp().sum()),
}


@pytest.mark.parametrize("loss", NO_SOFTMAX)
def test_what_is_no_softmax_is_not_taken_for_one(loss):
    shape, of = NO_SOFTMAX[loss]
    z = torch.randn(shape, dtype=torch.float64)
    at, size = function(of, z), z[0].numel()
    expected = flat_hessian(of, z).view(len(z), size, len(z), size).diagonal(0, 0, 2).movedim(2, 0)
    # Of losses of each example as many columns as outputs leave nothing to chance.
    every = of_examples(sampled_columns(at, size, 0), at)
    assert expected.any()
    torch.testing.assert_close(every, expected)
    torch.testing.assert_close(of_examples(exact_columns(at), at), expected)


@pytest.mark.parametrize("smoothing", [1e-4, 3e-3, 0.011])
@pytest.mark.parametrize("fitted", [False, True])
def test_a_target_that_is_nearly_a_label_is_none_to_a_model_that_is_as_sure(smoothing, fitted):
    """Label smoothing, or a sure teacher: the slope may then be 0 where the curvature is not."""
    labels = torch.randint(0, 6, (8,))
    target = (1 - smoothing) * F.one_hot(labels, 6) + smoothing / 6
    logits = torch.randn(8, 6, dtype=torch.float64)
    logits = 0.1 * logits + target.double().log() if fitted else logits
    at = function(lambda z: F.cross_entropy(z, target.to(z)), logits)
    every = of_examples(sampled_columns(at, 5, 0), at)
    expected = softmax_hessian(logits)
    own = expected.abs().amax((1, 2), keepdim=True)
    assert ((every - expected).abs() <= 0.02 * own).all()


def test_columns_over_several_tensors_have_no_bias():
    logits, boxes = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 2).double()
    labels = torch.randint(0, 3, (5,))

    def loss(z: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(z, labels) + F.smooth_l1_loss(b * z[:4, :2].sigmoid(), b.detach())

    at = function(loss, logits, boxes)
    assert at.examples is None
    expected = flat_hessian(loss, logits, boxes)
    draws = torch.stack([outer(sampled_columns(at, 1, s)) for s in range(200)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 6 * error + 1e-6 * expected.abs().max()).all()
    with pytest.raises(ValueError, match=r"\(5, 3\), \(4, 2\).*same examples.*taylor_so_diag"):
        exact_columns(at)


@pytest.mark.parametrize("seed", range(3))
def test_columns_of_a_seed_are_the_same_bits_and_others_of_another(seed):
    at = function(LOSSES["all meet"], torch.randn(3, 4, 2))
    state = torch.get_rng_state()
    first, again, other = (outer(sampled_columns(at, 2, s)) for s in (seed, seed, seed + 1))
    assert first.equal(again)
    assert not first.equal(other)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 11), (12, 4), (7, 8)])
def test_two_examples_that_meet_are_found_wherever_they_are(first, second):
    def loss(z: Tensor) -> Tensor:
        return z.square().sum() + 1e-6 * (z[first] + z[second]).square().sum()

    at = function(loss, torch.randn(13, 4))
    with pytest.raises(ValueError, match="lets examples meet"):
        exact_columns(at)
    assert not sampled_columns(at, 1, 0).apart


@pytest.mark.parametrize("output", range(4))
def test_examples_that_meet_in_one_output_are_found(output):
    at = function(lambda z: z.square().sum() + z[:, output].sum().square(), torch.randn(3, 4))
    with pytest.raises(ValueError, match="lets examples meet"):
        exact_columns(at)


def test_a_curvature_that_is_not_finite_is_handed_on():
    scale = torch.tensor([1.0, float("inf"), 1.0])[:, None]
    at = function(lambda z: (z.square() * scale).sum(), torch.randn(3, 4))
    assert not outer(exact_columns(at)).isfinite().all()
    assert not outer(sampled_columns(at, 1, 0)).isfinite().all()


APART = [
    "softmax of positions",
    "softmax, classes last",
    "of each alone",
    "bent both ways",
    "ignored",
]


@pytest.mark.parametrize("loss", APART)
def test_all_columns_are_the_hessian(loss):
    z = torch.randn(3, 4, 2, dtype=torch.float64)
    at = function(LOSSES[loss], z)
    blocks = flat_hessian(LOSSES[loss], z).unflatten(0, (3, 8)).unflatten(2, (3, 8))
    expected = torch.stack([blocks[n, :, n] for n in range(3)])
    found = of_examples(exact_columns(at), at)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_all_columns_over_two_heads():
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, 2, dtype=torch.float64)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(a, torch.ones(5).long()) + 3 * F.cross_entropy(
            b, torch.zeros(5, 2).long()
        )

    at = function(loss, x, y)
    blocks = flat_hessian(loss, x, y)
    joined = [
        torch.cat([v[0].reshape(5, -1), v[1].reshape(5, -1)], 1)
        for v, _ in exact_columns(at).columns
    ]
    assert len(joined) == 2 + 2
    found = sum(c[:, :, None] * c[:, None, :] for c in joined)
    places = torch.cat([torch.arange(15).view(5, 3), 15 + torch.arange(20).view(5, 4)], 1)
    for n in range(5):
        expected = blocks[places[n]][:, places[n]]
        assert (found[n] - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_comes_on_top_of_a_cross_entropy_is_not_left_out(dtype):
    """A penalty whose curvature is 1e-4 of it: small enough to be left out by sampled columns."""
    z, labels = torch.randn(6, 5).to(dtype), torch.randint(0, 5, (6,))
    loss = lambda z: F.cross_entropy(z, labels) + 1e-4 * z.logsumexp(1).square().mean()  # noqa: E731
    at = function(loss, z)
    blocks = flat_hessian(loss, z.double()).unflatten(0, (6, 5)).unflatten(2, (6, 5))
    expected = torch.stack([blocks[n, :, n] for n in range(6)])
    found = of_examples(exact_columns(at), at)
    assert (found - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()


def test_many_columns_where_they_have_a_closed_form():
    labels = torch.randint(0, 700, (3, 2))
    z = torch.randn(3, 2, 700)
    at = function(lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="sum"), z)
    with pytest.raises(ValueError, match="1400 outputs per example"):
        exact_columns(at)
    diagonal, count = torch.zeros(3, 2, 700), 0
    for (column,), _ in exact_columns(at, many=True).columns:
        assert (column.flatten(2).abs().sum(2) > 0).sum(1).max() == 1  # one token at a time
        diagonal += column.square()
        count += 1
    assert count == 2 * 699
    p = z.softmax(2)
    torch.testing.assert_close(diagonal, p - p.square(), rtol=1e-5, atol=1e-8)
    squares = function(lambda z: (z - 1).square().sum(), torch.randn(2, 1100))
    assert sum(1 for _ in exact_columns(squares, many=True).columns) == 1100
    coupled = function(lambda z: z.sum(1).square().sum(), torch.randn(2, 1100))
    with pytest.raises(ValueError, match="1100 outputs per example"):
        exact_columns(coupled, many=True)
