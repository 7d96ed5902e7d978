"""Criteria from the loss's curvature at the output, against Hessians by autograd in float64."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_kernels as tk
from tests.helpers import nets
from tests.helpers.expansions import close, deviation, gate_expansion, scores

pytestmark = pytest.mark.usefixtures("one_thread")


LOSSES = {
    "cross entropy": lambda out, y: F.cross_entropy(out, y),
    "summed": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
    "smoothed": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.2),
    "weighted": lambda out, y: F.cross_entropy(out, y, torch.arange(1.0, 6).to(out)),
    "mse": lambda out, y: F.mse_loss(out, F.one_hot(y, 5).to(out)),
    "bce": lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 5).to(out)),
    "huber": lambda out, y: F.huber_loss(out, 3.0 * F.one_hot(y, 5).to(out), delta=0.4),
    "bent both ways": lambda out, y: out.cos().sum() + out[:, 0].square().sum(),
    "of sums": lambda out, y: (out.cumsum(1) - y[:, None]).square().mean() + out.prod(1).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gate_curvature_is_the_diagonal_of_the_hessian_of_a_relu_network(loss):
    model, (x, y) = nets.mixed(train=False, last=F.relu), nets.batch()

    def closure() -> Tensor:
        return LOSSES[loss](model(x), y)

    slope, hessian = gate_expansion(model, nets.GATED, closure)
    bend = hessian.diagonal() / 2
    close(scores(model, "obd_bn_exact", closure), bend)
    close(scores(model, "taylor_so_diag_exact", closure), (slope - bend).square())
    imp = tk.Importance(model, "obd_bn")
    for _ in range(50):
        imp.update(closure=closure)
    assert deviation(imp, bend).max() < 6


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
        "closure: its loss does not depend on what the model returned",
    ),
    "examples meet": (
        lambda m, x, y: F.cross_entropy((z := m(x)) @ z.T, torch.arange(6)), ValueError,
        "closure: its loss lets examples meet.*taylor_so_diag",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("criterion", "wrong"),
    [
        (criterion, wrong)
        for criterion in ("obd_bn", "obd_bn_exact", "obd_fisher_mc")
        for wrong in CLOSURE_ERRORS
        if (criterion, wrong) != ("obd_bn", "examples meet")  # which it scores
    ],
)
def test_a_wrong_closure_is_one_clear_error(criterion, wrong):
    loss, error, message = CLOSURE_ERRORS[wrong]
    model, (x, y) = nets.mixed(train=False), nets.batch()
    imp = tk.Importance(model, criterion)
    assert imp.needs_closure
    closure = functools.partial(loss, model, x, y) if callable(loss) else loss
    with pytest.raises(error, match=message.replace("'obd_bn'", f"'{criterion}'")):
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


def test_obd_fisher_mc_is_the_gauss_newton_diagonal_without_bias():
    model, (x, y) = nets.mixed(train=False), nets.batch(4)
    names = ["stem", "fc"]
    weights = [model.get_submodule(name).weight for name in names]

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y)

    expected = [torch.zeros_like(w) for w in weights]
    for one in x:
        out = model(one[None])[0]
        p = out.detach().softmax(0)
        rows = [torch.autograd.grad(o, weights, retain_graph=True) for o in out]
        for i in range(len(weights)):
            jacobian = torch.stack([row[i] for row in rows])
            mean = torch.tensordot(p, jacobian, 1)
            expected[i] += (torch.tensordot(p, jacobian.square(), 1) - mean.square()) / len(x)
    expected = torch.cat(
        [
            (e * w.detach().square()).flatten(1).sum(1) / 2
            for e, w in zip(expected, weights, strict=True)
        ]
    )
    imp = tk.Importance(model, "obd_fisher_mc", layers=names)
    for _ in range(100):
        imp.update(closure=closure)
    assert deviation(imp, expected).max() < 6


def test_obd_fisher_with_drawn_labels_is_the_fisher_of_a_linear_softmax_model():
    """In closed form: Σ_k w_k² mean_n p(1 − p) x_k²."""
    model = nn.Linear(6, 4, bias=False).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    p = model(x).softmax(1).detach()
    diagonal = torch.einsum("no,ni->oi", p * (1 - p), x.square()) / len(x)
    expected = (diagonal * model.weight.detach().square()).sum(1) / 2
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    imp = tk.Importance(model, "obd_fisher")
    for _ in range(300):
        out = model(x)
        F.cross_entropy(out, tk.draw_labels(out, generator=generator)).backward()
        imp.update()
    assert deviation(imp, expected).max() < 6

    probed = tk.Importance(model, "obd_fisher_mc")
    for _ in range(300):
        probed.update(closure=lambda: F.cross_entropy(model(x), torch.zeros(30, dtype=torch.int64)))
    assert deviation(probed, expected).max() < 6


def test_draw_labels():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(40, 50, 3)
    generator = torch.Generator().manual_seed(1)
    labels = tk.draw_labels(logits, generator=generator)
    assert labels.shape == (40, 50)
    assert labels.dtype == torch.int64
    counts = torch.bincount(labels.flatten(), minlength=3) / 2000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.7]), rtol=0, atol=0.06)
    assert tk.draw_labels(logits, generator=generator.manual_seed(1)).equal(labels)
    assert tk.draw_labels(logits.half().requires_grad_()).shape == (40, 50)
    assert tk.draw_labels(torch.zeros(0, 4, 3)).shape == (0, 4)
    for bad, error, message in (
        (torch.zeros(3, dtype=torch.int64), TypeError, "logits: expected a floating tensor"),
        ([1.0], TypeError, "logits: expected a floating tensor, got list"),
        (torch.zeros(()), ValueError, r"logits: has shape \(\)"),
        (torch.zeros(3, 0), ValueError, r"logits: has shape \(3, 0\)"),
    ):
        with pytest.raises(error, match=message):
            tk.draw_labels(bad)


def test_outputs_beyond_what_the_curvature_is_formed_of():
    model = nn.Linear(3, 1025)
    with pytest.raises(ValueError, match=r"1025 outputs per example.*use taylor_so_diag"):
        scores(model, "obd_bn_exact", lambda: model(torch.randn(2, 3)).square().mean())


@pytest.mark.parametrize("criterion", ["obd_bn_exact", "obd_fisher_mc"])
def test_layers_whose_examples_are_not_those_of_the_output(criterion):
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.tokens(x.flatten(0, 1)).view(*x.shape[:2], 5).mean(1))

    model, x = Flat(), torch.randn(3, 6, 4)
    with pytest.raises(RuntimeError, match=r"tokens: was given 18 examples .* returned 3"):
        scores(model, criterion, lambda: model(x).square().mean())
    got = scores(model, criterion, lambda: model(x).square().mean(), layers=["head"])
    assert (got["head"] > 0).all()


@pytest.mark.parametrize("criterion", ["obd_bn", "taylor_so_diag_exact", "obd_fisher_mc"])
def test_what_is_not_finite_reaches_the_scores(criterion):
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    x[2, 1] = float("nan")
    got = scores(model, criterion, lambda: F.cross_entropy(model(x), torch.zeros(5).long()))
    assert got[""].isnan().all()


@pytest.mark.parametrize("criterion", ["obd_bn", "obd_fisher_mc"])
@pytest.mark.filterwarnings("ignore:closure. its loss is linear")
def test_a_loss_without_curvature_at_the_output(criterion):
    model = nn.Linear(4, 3)
    got = scores(model, criterion, lambda: model(torch.randn(5, 4)).abs().sum())
    assert got[""].equal(torch.zeros(3))


@pytest.mark.parametrize("criterion", ["obd_bn", "taylor_so_diag_exact", "obd_fisher_mc"])
def test_a_loss_that_is_linear_in_the_output_is_warned_of(criterion):
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    labels = torch.zeros(5, dtype=torch.int64)
    with pytest.warns(UserWarning, match=r"linear in what the model's last layers") as seen:
        tk.Importance(model, criterion).update(closure=lambda: F.l1_loss(model(x), x[:, :3] + 9))
    assert seen[0].filename == __file__
    sure = x.new_tensor([300.0, 0.0, 0.0])  # has lost its curvature to rounding
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores(model, criterion, lambda: F.cross_entropy(model(x) + sure, labels))
