"""The curvature of gates by few backward passes, beyond what the exact one can do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.criteria import get_criterion
from taylor_kernels.statistics import GateCurvature, find_layers, get_statistic
from tests.helpers import nets
from tests.helpers.expansions import close, deviation, gate_expansion, scores

pytestmark = pytest.mark.usefixtures("one_thread")


def unbiased(
    model: nn.Module, gated: dict[str, str], closure: Callable[[], Tensor], updates: int = 60
) -> None:
    """obd_bn is half the Hessian's diagonal in the gates of a network of ReLUs."""
    _, hessian = gate_expansion(model, gated, closure)
    imp = tk.Importance(model, "obd_bn", layers=list(gated))
    for _ in range(updates):
        imp.update(closure=closure)
    assert deviation(imp, hessian.diagonal() / 2).max() < 6


class Two(nn.Module):
    """A body and two heads; what they return is put together by `wrap`."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], object], outputs: int = 3) -> None:
        super().__init__()
        self.body, self.wide = nn.Linear(4, 6), nn.Linear(6, 5)
        self.classes, self.boxes = nn.Linear(5, outputs), nn.Linear(5, 2)
        self.wrap = wrap
        self.double()

    def forward(self, x: Tensor) -> object:
        x = F.relu(self.wide(F.relu(self.body(x))))
        return self.wrap(self.classes(x), self.boxes(x))


TWO = {name: name for name in ("body", "wide", "classes", "boxes")}
X = torch.Size([6, 4])


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(X, dtype=torch.float64), torch.randint(0, 3, X[:1])


def of_both(classes: Tensor, boxes: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(2 * classes, y) + (boxes.sin() * boxes).square().mean()


@pytest.mark.parametrize("kind", ["tuple", "dict", "inside", "list of ones"])
def test_outputs_that_hold_several_tensors(kind):
    x, y = data()
    wraps = {
        "tuple": lambda c, b: (c, None, b),
        "dict": lambda c, b: {"classes": c, "more": [b, c.detach()], "mean": c.mean()},
        "inside": lambda c, b: {"loss": of_both(c, b, y), "boxes": b},
        "list of ones": lambda c, b: [of_both(c, b, y)[None]],
    }
    reads = {
        "tuple": lambda o: of_both(o[0], o[2], y),
        "dict": lambda o: of_both(o["classes"], o["more"][0], y),
        "inside": lambda o: o["loss"],
        "list of ones": lambda o: o[0].sum(),
    }
    model = Two(wraps[kind])

    def closure() -> Tensor:
        return reads[kind](model(x))

    unbiased(model, TWO, closure)
    _, hessian = gate_expansion(model, TWO, closure)
    close(scores(model, "obd_bn_exact", closure, layers=list(TWO)), hessian.diagonal() / 2)


@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
@pytest.mark.parametrize("criterion", ["taylor_so_diag", "obd_bn"])
def test_one_output_is_exact(criterion, loss):
    """A regression, or a single logit: one pass flows back all the curvature that there is."""
    x, _ = data()
    y = (x[:, :1] > 0).double()
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double()

    def of(name: str) -> Tensor:
        return scores(model, name, lambda: loss(model(x), y), layers=["0"])["0"]

    assert of(criterion).any()
    torch.testing.assert_close(of(criterion), of(f"{criterion}_exact"))


def test_a_tensor_that_the_loss_reads_may_be_made_of_another_one():
    """Both are inputs of the loss: what flows from one to the other belongs to the model."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
            inner = self.one(x)
            out = self.two(F.relu(inner))
            both = F.cross_entropy(out, y) + inner.square().square().mean() if y is not None else 0
            return both if y is not None else (inner, out)

    (x, y), model = data(), Deep()

    def closure() -> Tensor:
        inner, out = model(x)
        return F.cross_entropy(out, y) + inner.square().square().mean()

    _, hessian = gate_expansion(model, {"one": "one", "two": "two"}, closure)
    for loss in (closure, lambda: model(x, y)):
        close(scores(model, "obd_bn_exact", loss), hessian.diagonal() / 2)
    unbiased(model, {"one": "one", "two": "two"}, lambda: model(x, y))


def test_what_ends_in_a_log_softmax_is_scored_as_its_logits_are():
    x, y = data()
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    ended = nn.Sequential(*model, nn.LogSoftmax(1))
    for criterion in ("taylor_so_diag_exact", "taylor_so_diag", "obd_fisher_mc"):
        own = scores(model, criterion, lambda: F.cross_entropy(model(x), y))
        got = scores(ended, criterion, lambda: F.nll_loss(ended(x), y))
        close(got, torch.cat(list(own.values())).double())


def test_an_output_that_the_loss_does_not_read_changes_nothing():
    x, y = data()
    model = Two(lambda c, b: c)
    expected = scores(model, "taylor_so_diag", lambda: F.cross_entropy(model(x), y))
    assert not expected.pop("boxes").any()
    model.wrap = lambda c, b: {"boxes": b, "classes": c}
    got = scores(model, "taylor_so_diag", lambda: F.cross_entropy(model(x)["classes"], y))
    assert not got.pop("boxes").any()
    assert all(got[name].equal(score) for name, score in expected.items())


class Tokens(nn.Module):
    """Logits [N, T, 300] of T tokens: 1,500 outputs per example."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.up, self.head = nn.Linear(8, 10), nn.Linear(10, 300)
        self.flat = flat
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.embedding(x)
        z = F.relu(self.up(z.flatten(0, 1)).view(*x.shape, 10) if self.flat else self.up(z))
        return self.head(z.cumsum(1))


@pytest.mark.parametrize("flat", [False, True])
def test_a_language_model_has_more_outputs_than_a_matrix_is_formed_of(flat):
    model, x = Tokens(flat), torch.randint(0, 9, (4, 5))

    def closure() -> Tensor:
        logits = 3 * model(x)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), ignore_index=0)

    imp = tk.Importance(model, "obd_bn", layers=["up"])
    for _ in range(100):
        imp.update(closure=closure)
    _, hessian = gate_expansion(model, {"up": "up"}, closure)
    assert deviation(imp, hessian.diagonal() / 2).max() < 6
    spread = imp.standard_error()["up"] * 100**0.5  # one update tells the order of magnitude
    assert spread.norm() < 4 * hessian.diagonal().norm() / 2


@pytest.mark.parametrize("last", ["cross entropy", "bce", "dice"])
def test_a_segmentation_net(last):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).double()
    x, y = torch.randn(3, 2, 26, 24, dtype=torch.float64), torch.randint(0, 3, (3, 22, 20))
    of = F.one_hot(y, 3).movedim(-1, 1).double()
    losses = {
        "cross entropy": lambda z: F.cross_entropy(z, y),
        "bce": lambda z: F.binary_cross_entropy_with_logits(z, of),
        "dice": lambda z: 1 - 2 * (z.softmax(1) * of).sum() / (z.softmax(1) + of).sum(),
    }
    assert model(x)[0].numel() > 1024
    unbiased(model, {"0": "0", "2": "2"}, lambda: losses[last](model(x)))


def test_a_model_that_is_called_twice_and_examples_that_meet():
    x, _ = data()
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    gated = {"0": "0", "2": "2"}
    unbiased(model, gated, lambda: (model(x) - model(x + 1)).square().sum())
    unbiased(model, gated, lambda: (model(x).sum(0) - model(x[:2]).sum(0)).square().sum())
    unbiased(model, gated, lambda: F.cross_entropy((z := model(x)) @ z.T, torch.arange(6)), 200)


def test_gates_that_are_turned_together_add_up_before_they_are_squared():
    """Rows of coupled filters added make the row of their shared gate, whatever the columns."""
    x, y = data()
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    statistic = get_statistic("gate_curvature")(
        model, find_layers(model, None, trainable_only=False)
    )
    pair = [1, 4]

    def shared(gate: Tensor) -> Tensor:
        g = torch.ones(6, dtype=torch.float64)
        g = g.index_put((torch.tensor(pair),), gate.expand(2))
        return losses(model[2](F.relu(model[0](x)) * g))

    def losses(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + z.cos().mean()

    criterion = get_criterion("obd_bn")
    draws = []
    for _ in range(60):
        table = statistic.collect(closure=lambda: losses(model(x)))[0]
        draws.append(criterion.observations(table[pair].sum(0, keepdim=True))[0, 0])
    found = torch.stack(draws)
    expected = torch.autograd.functional.hessian(shared, torch.ones((), dtype=torch.float64)) / 2
    error = found.std() / len(found) ** 0.5
    assert (found.mean() - expected).abs() < 6 * error + 1e-6 * expected.abs()


def test_more_passes_are_a_subclass():
    name = f"curvature_of_three_{int(torch.randint(10**9, ()))}"
    more = type("Three", (GateCurvature,), {"name": name, "passes": 3})
    tk.register_statistic(more)
    obd = get_criterion("obd_bn")
    criterion = tk.Criterion(name, name, obd.score)
    model, batch = nets.mixed(train=False, last=F.relu), nets.batch()
    spread = []
    for one in (obd, criterion):
        imp = tk.Importance(model, one)
        for _ in range(40):
            imp.update(closure=lambda: nets.loss_of(model, batch))
        spread.append(torch.cat(list(imp.standard_error().values())).norm())
    # Of five classes the label is free, and three are all others.
    assert spread[1] < 1e-4 * spread[0]
