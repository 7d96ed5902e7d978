"""Second-order criteria against the Hessian itself, formed by autograd in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_kernels as tk

pytestmark = pytest.mark.usefixtures("one_thread")


def scores(model: nn.Module, criterion: str, loss: Callable[[], Tensor], **options) -> dict:
    imp = tk.Importance(model, criterion, **options)
    imp.update(closure=loss)
    result = imp.compute()
    imp.close()
    return result


def close(got: dict[str, Tensor], expected: Tensor, rtol: float = 1e-5) -> None:
    """All layers in one, relative to the greatest score."""
    flat = torch.cat(list(got.values())).double()
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(flat / scale, expected / scale, rtol=0, atol=rtol)


def gate_expansion(
    model: nn.Module, gated: dict[str, str], loss: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the loss in all gates."""
    sizes = [len(nets.filters_first(m, m.weight)) for m in map(model.get_submodule, gated)]
    ones = torch.ones(sum(sizes), dtype=torch.float64)

    def of_gates(gates: Tensor) -> Tensor:
        return nets.gated_loss(model, gated, gates, loss)

    return (
        torch.autograd.functional.jacobian(of_gates, ones),
        torch.autograd.functional.hessian(of_gates, ones),
    )


LOSSES = {
    "cross entropy": lambda out, y: F.cross_entropy(out, y),
    "summed": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
    "smoothed": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.2),
    "weighted": lambda out, y: F.cross_entropy(out, y, torch.arange(1.0, 6).to(out)),
    "mse": lambda out, y: F.mse_loss(out, F.one_hot(y, 5).to(out)),
    "bce": lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 5).to(out)),
    "huber": lambda out, y: F.huber_loss(out, 3.0 * F.one_hot(y, 5).to(out), delta=0.4),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gate_curvature_is_the_diagonal_of_the_hessian_of_a_relu_network(loss):
    model, (x, y) = nets.mixed(train=False, last=F.relu), nets.batch()

    def closure() -> Tensor:
        return LOSSES[loss](model(x), y)

    slope, hessian = gate_expansion(model, nets.GATED, closure)
    close(scores(model, "obd_bn", closure), hessian.diagonal() / 2)
    close(scores(model, "taylor_so_diag", closure), (slope - hessian.diagonal() / 2).square())


CLOSURE_ERRORS = {
    "missing": (None, ValueError, "closure: 'obd_bn' runs the model itself; call update"),
    "a tensor": (torch.ones(()), TypeError, "closure: expected a function, got Tensor"),
    "no tensor": (lambda m, x, y: 3.0, TypeError, "closure: expected it to return a tensor"),
    "no scalar": (
        lambda m, x, y: F.cross_entropy(m(x), y, reduction="none"), ValueError,
        r"closure: returned a tensor of shape \(6,\); return the loss as a scalar",
    ),
    "detached": (
        lambda m, x, y: F.cross_entropy(m(x).detach(), y), ValueError,
        "closure: its loss does not depend on the model",
    ),
    "of something else": (
        lambda m, x, y: (m(x).detach() * x.clone().requires_grad_().sum()).sum(), ValueError,
        "closure: its loss does not depend on what the model returned",
    ),
    "not called": (
        lambda m, x, y: x.clone().requires_grad_().sum(), ValueError,
        "closure: called the model 0 times",
    ),
    "called twice": (
        lambda m, x, y: (m(x) - m(x + 1)).square().sum(), ValueError,
        "closure: called the model 2 times.*taylor_so_bn",
    ),
    "examples meet": (
        lambda m, x, y: F.cross_entropy((z := m(x)) @ z.T, torch.arange(6)), ValueError,
        "closure: its loss lets examples meet.*taylor_so_bn",
    ),
    "not convex": (
        lambda m, x, y: m(x).cos().sum(), ValueError, "closure: its loss is not convex",
    ),
}  # fmt: skip


@pytest.mark.parametrize("criterion", ["obd_bn", "obd_fisher_mc"])
@pytest.mark.parametrize("wrong", CLOSURE_ERRORS)
def test_a_wrong_closure_is_one_clear_error(wrong, criterion):
    loss, error, message = CLOSURE_ERRORS[wrong]
    model, (x, y) = nets.mixed(train=False), nets.batch()
    imp = tk.Importance(model, criterion)
    assert imp.needs_closure
    closure = functools.partial(loss, model, x, y) if callable(loss) else loss
    with pytest.raises(error, match=message.replace("obd_bn", criterion)):
        imp.update(closure=closure)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    imp.update(closure=lambda: nets.loss_of(model, (x, y)))
    assert all(score.isfinite().all() for score in imp.compute().values())


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "obd_fisher", "magnitude_l2"])
def test_a_closure_where_none_is_taken_is_an_error(criterion):
    model, data = nets.mixed(), nets.batch()
    imp = tk.Importance(model, criterion)
    nets.backward(model, data)
    assert not imp.needs_closure
    with pytest.raises(ValueError, match=f"closure: '{criterion}' takes none"):
        imp.update(closure=lambda: nets.loss_of(model, data))
    imp.update()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_taylor_so_bn_takes_the_row_sums_of_the_hessian_of_all_gates(train):
    model, data = nets.mixed(train=train), nets.batch()
    # The Hessian moves running statistics, which a net in train mode does not read.
    slope, hessian = gate_expansion(model, nets.GATED, lambda: nets.loss_of(model, data))
    got = scores(model, "taylor_so_bn", lambda: nets.loss_of(model, data))
    close(got, (slope - hessian.sum(1) / 2).square())
