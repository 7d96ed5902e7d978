"""Second-order criteria against the Hessian itself, formed by autograd in float64."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import taylor_kernels as tk

pytestmark = pytest.mark.usefixtures("one_thread")


def scores(
    model: nn.Module, criterion: str, loss: Callable[[], Tensor], *, updates: int = 1, **options
) -> dict[str, Tensor]:
    imp = tk.Importance(model, criterion, **options)
    for _ in range(updates):
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


def deviation(imp: tk.Importance, expected: Tensor) -> Tensor:
    """How many standard errors the scores are away; some are hit exactly, as those of a filter
    that is off, whose score is 0 but for rounding."""
    got, error = (
        torch.cat(list(values.values())).double()
        for values in (imp.compute(), imp.standard_error())
    )
    assert error.max() > 0
    return (got - expected).abs() / (error + 1e-6 * expected.abs().max())


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


def weight_expansion(
    model: nn.Module, names: list[str], loss: Callable[[], Tensor]
) -> tuple[list[Tensor], Tensor, Tensor, Callable[[Tensor], list[Tensor]]]:
    """Weights, gradient and Hessian of the loss in the weights of these layers, and how to split
    what has the length of all of them into [filters, rest] per layer."""
    layers = [model.get_submodule(name) for name in names]
    weights = [layer.weight for layer in layers]
    grads = torch.autograd.grad(loss(), weights, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [torch.autograd.grad(entry, weights, retain_graph=True) for entry in flat]
    hessian = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])

    def split(values: Tensor) -> list[Tensor]:
        parts = values.split([w.numel() for w in weights])
        return [
            nets.filters_first(layer, part.view_as(layer.weight))
            for layer, part in zip(layers, parts, strict=True)
        ]

    return [w.detach() for w in weights], flat.detach(), hessian, split


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_taylor_so_expands_the_loss_in_all_scored_weights(train):
    model, data = nets.mixed(train=train), nets.batch()
    names = ["stem", "up", "fc"]

    def closure() -> Tensor:
        return nets.loss_of(model, data)

    weights, slope, hessian, split = weight_expansion(model, names, closure)
    w = torch.cat([weight.flatten() for weight in weights])
    q = split(slope * w - w * (hessian @ w) / 2)
    close(
        scores(model, "taylor_so", closure, layers=names),
        torch.cat([part.square().sum(1) for part in q]),
    )
    joint = tk.Criterion("joint", "weight_products", lambda table: table[:, 0])
    close(scores(model, joint, closure, layers=names), torch.cat([part.sum(1) for part in q]))


def test_obd_hutchinson_probes_the_hessian_with_new_signs_at_every_update():
    model, data = nets.mixed(train=False), nets.batch()
    names = ["stem", "up", "fc"]

    def closure() -> Tensor:
        return nets.loss_of(model, data)

    weights, _, hessian, split = weight_expansion(model, names, closure)
    w = torch.cat([weight.flatten() for weight in weights])
    expected = torch.zeros(8 + 6 + 5, dtype=torch.float64)
    for number in range(3):
        z = torch.cat([part.flatten() for part in tk.rademacher_like(weights, seed=number)])
        probed = split(w.square() * z * (hessian @ z) / 2)
        expected += torch.cat([part.sum(1) for part in probed]) / 3
    close(scores(model, "obd_hutchinson", closure, updates=3, layers=names), expected)


def test_obd_hutchinson_is_exact_for_a_diagonal_hessian():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)).double()
    curvature = torch.rand(4, 3, 1, 1, dtype=torch.float64)

    def closure() -> Tensor:
        model(torch.randn(2, 3, 5, 5, dtype=torch.float64))
        return (curvature * model[0].weight.square()).sum() / 2

    expected = (curvature * model[0].weight.detach().square()).flatten(1).sum(1) / 2
    close(scores(model, "obd_hutchinson", closure), expected)


def test_layers_that_share_a_weight_have_one_parameter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    x = torch.randn(5, 4, dtype=torch.float64)

    def closure() -> Tensor:
        return model(x).square().mean()

    _, slope, hessian, split = weight_expansion(model, ["0"], closure)
    w = model[0].weight.detach().flatten()
    (q,) = split(slope * w - w * (hessian @ w) / 2)
    close(scores(model, "taylor_so", closure), torch.cat([q.square().sum(1)] * 2))


def test_a_convolution_and_its_transpose_see_other_filters_in_one_weight():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 2), nn.ConvTranspose2d(4, 3, 2)
            self.up.weight = self.down.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x).sigmoid())

    model, x = Tied().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def closure() -> Tensor:
        return F.mse_loss(model(x), x)

    weights, slope, hessian, _ = weight_expansion(model, ["down"], closure)
    w = weights[0].flatten()
    q = (slope * w - w * (hessian @ w) / 2).view_as(weights[0]).square()
    close(
        scores(model, "taylor_so", closure),
        torch.cat([q.sum((1, 2, 3)), q.sum((0, 2, 3))]),
    )
    z = tk.rademacher_like(w.view_as(weights[0]), seed=0).flatten()
    h = (w.square() * z * (hessian @ z) / 2).view_as(weights[0])
    close(
        scores(model, "obd_hutchinson", closure),
        torch.cat([h.sum((1, 2, 3)), h.sum((0, 2, 3))]),
    )


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh().square())


ONCE = {
    "once_differentiable": (Once.apply, "whose backward is marked once_differentiable"),
    "cdist": (lambda x: torch.cdist(x[None], x[None])[0], "_cdist_backward.* is not implemented"),
}


@pytest.mark.parametrize("operation", ONCE)
@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_bn", "obd_hutchinson"])
def test_a_model_that_cannot_be_differentiated_twice_is_one_clear_error(criterion, operation):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
            self.operation = ONCE[operation][0]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.operation(self.a(x)))

    model, x = Net(), torch.randn(5, 4)
    message = rf"differentiated twice: .*{ONCE[operation][1]}.*use taylor_so_diag or obd_fisher"
    with pytest.raises(RuntimeError, match=message):
        scores(model, criterion, lambda: model(x).square().mean())
    instead = scores(model, "taylor_so_diag", lambda: model(x).square().mean())
    assert all(score.isfinite().all() for score in instead.values())


class OnceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x / x.numel()


ONCE_LOSSES = {
    "once_differentiable": OnceLoss.apply,
    "ctc": lambda x: F.ctc_loss(
        x.log_softmax(2).transpose(0, 1), torch.tensor([[1, 2]] * 5), [4] * 5, [2] * 5
    ),
    "behind a sum": lambda x: Once.apply(x).sum(),
}


@pytest.mark.parametrize("loss", ONCE_LOSSES)
@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_bn", "obd_bn", "obd_fisher_mc"])
def test_a_loss_that_cannot_be_differentiated_twice_is_one_clear_error(criterion, loss):
    """Also where the gradient that its last function is given needs none itself."""
    model, x = nn.Linear(6, 3), torch.randn(5, 4, 6)
    with pytest.raises(RuntimeError, match=r"be differentiated twice: .*; use .*obd_fisher"):
        scores(model, criterion, lambda: ONCE_LOSSES[loss](model(x)))


def test_a_compiled_model_in_the_closure_is_one_clear_error():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(5, 4)
    imp = tk.Importance(model, "taylor_so")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"twice: torch\.compile .*use taylor_so_diag or obd"):
        imp.update(closure=lambda: compiled(x).square().mean())


@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_bn"])
def test_fused_attention_is_no_obstacle(criterion):
    class Attention(nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)
            self.fused = fused

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            if self.fused:
                x = F.scaled_dot_product_attention(q, k, v)
            else:
                x = (q @ k.mT / 8**0.5).softmax(-1) @ v
            return self.out(x.mean(1))

    fused, plain = Attention(True).double(), Attention(False).double()
    fused.load_state_dict(plain.state_dict())
    x, y = torch.randn(4, 6, 8, dtype=torch.float64), torch.randint(0, 3, (4,))
    expected = scores(plain, criterion, lambda: F.cross_entropy(plain(x), y))
    got = scores(fused, criterion, lambda: F.cross_entropy(fused(x), y))
    close(got, torch.cat(list(expected.values())).double())


def test_a_computed_weight_is_an_error_that_says_so():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(RuntimeError, match=r"0\.weight is computed from other parameters"):
        scores(model, "taylor_so", lambda: model(torch.randn(2, 4)).sum())


@pytest.mark.parametrize("criterion", ["taylor_so", "obd_hutchinson", "taylor_fo"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_computed_by_a_hook_is_an_error_whatever_ran_before(criterion):
    masked = nn.Linear(4, 3)
    prune.random_unstructured(masked, "weight", 0.5)
    for layer in (masked, nn.utils.weight_norm(nn.Linear(4, 3))):
        model = nn.Sequential(layer)
        imp = tk.Importance(model, criterion)
        with torch.no_grad():
            model(torch.randn(2, 4))  # leaves a weight without a graph
        closure = {"closure": lambda m=model: m(torch.randn(2, 4)).sum()}
        with pytest.raises(RuntimeError, match=r"0\.weight is computed from other parameters"):
            imp.update(**(closure if imp.needs_closure else {}))


@pytest.mark.parametrize("classes", [33, 40])
def test_many_outputs_are_probed_without_bias(classes):
    """Above 32 outputs the curvature of gates comes from random combinations of its root."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes)).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randint(0, classes, (5,))

    def closure() -> Tensor:
        return F.cross_entropy(3 * model(x), y)

    _, hessian = gate_expansion(model, {"0": "0", "2": "2"}, closure)
    imp = tk.Importance(model, "obd_bn")
    for _ in range(60):
        imp.update(closure=closure)
    expected = hessian.diagonal() / 2
    assert deviation(imp, expected).max() < 6
    spread = torch.cat(list(imp.standard_error().values())) * 60**0.5
    assert spread.norm() < expected.norm()  # one update alone tells the order of magnitude


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
    with pytest.raises(ValueError, match=r"1025 outputs per example.*use taylor_so_bn"):
        scores(model, "obd_bn", lambda: model(torch.randn(2, 3)).square().mean())
    model = nn.Linear(3, 200).double()  # images of classes, say: all of an example are its outputs
    x = torch.randn(3, 3, dtype=torch.float64)

    def closure() -> Tensor:
        return model(x).view(3, 4, 50).logsumexp(1).sum()

    weights, _, _, _ = weight_expansion(model, [""], closure)
    imp = tk.Importance(model, "obd_bn")
    for _ in range(40):
        imp.update(closure=closure)
    ones = torch.ones(200, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(
        lambda g: (
            (F.linear(x, weights[0], model.bias.detach()) * g).view(3, 4, 50).logsumexp(1).sum()
        ),
        ones,
    )
    assert deviation(imp, hessian.diagonal() / 2).max() < 6


@pytest.mark.parametrize("criterion", ["obd_bn", "obd_fisher_mc"])
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


@pytest.mark.parametrize("criterion", ["obd_bn", "taylor_so_diag", "obd_fisher_mc"])
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


@pytest.mark.parametrize("criterion", ["obd_bn", "taylor_so_diag", "obd_fisher_mc"])
def test_a_loss_that_is_linear_in_the_output_is_warned_of(criterion):
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    labels = torch.zeros(5, dtype=torch.int64)
    ended = nn.Sequential(model, nn.LogSoftmax(1))
    with pytest.warns(UserWarning, match=r"linear in what the model returned.*log_softmax") as seen:
        scores(ended, criterion, lambda: F.nll_loss(ended(x), labels))
    assert seen[0].filename == __file__
    sure = x.new_tensor([300.0, 0.0, 0.0])  # has lost its curvature to rounding
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores(model, criterion, lambda: F.cross_entropy(model(x) + sure, labels))


CRITERIA = ["taylor_so", "taylor_so_bn", "taylor_so_diag", "obd_bn", "obd_fisher_mc"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_bfloat16_autocast(criterion):
    torch.manual_seed(0)
    model, (x, y) = nets.mixed(train=False).float(), nets.batch(16)
    x = x.float()

    def closure(enabled: bool) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return F.cross_entropy(model(x), y)

        return loss

    updates = 100 if criterion == "obd_fisher_mc" else 1  # the root of H turns with rounding
    exact, rounded = (scores(model, criterion, closure(b), updates=updates) for b in (False, True))
    for name, expected in exact.items():
        got = rounded[name]
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.15 * expected.norm(), name
