"""What the meter does about passes, examples, its state and wrong use; the Gauss-Newton matrix."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.parameter_fisher.ends import Ends
from taylor_kernels.parameter_fisher.own_passes import OwnPasses
from tests.helpers.parameter_loop import by_loop, close, mean_of_own, metered

pytestmark = pytest.mark.usefixtures("one_thread")
N = 4


def network() -> nn.Module:
    return (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(4 * 16, 3),
        )
        .double()
        .eval()
    )


def images(n: int = N) -> Tensor:
    return torch.randn(n, 2, 4, 4, dtype=torch.float64)


def test_batches_are_weighed_by_their_examples_and_the_loss_scale_goes():
    model, batches = network(), [images(3), images(5), images(1)]
    meter = tk.ParameterFisher(model)
    for x in batches[:2]:
        (1024 * mean_of_own(model, x)).backward()
    meter.update(loss_scale=1024)
    mean_of_own(model, batches[2]).backward()
    meter.update()
    assert meter.examples == 9
    close(meter.compute(), by_loop(model, batches))


def test_names_that_hold_brackets_stand_for_themselves():
    model = nn.Sequential()
    model.add_module("[a]", nn.Linear(2, 2))
    model.add_module("a", nn.Linear(2, 2))
    for name in ("[a].weight", "a.weight"):
        meter = tk.ParameterFisher(model, parameters=[name])
        model(torch.randn(3, 2)).square().mean().backward()
        meter.update()
        assert name in meter.compute()
        meter.close()


def test_a_loss_that_is_a_sum():
    model, x = network(), images()
    found = metered(model, [x], lambda m, x: len(x) * mean_of_own(m, x), reduction="sum")
    close(found, by_loop(model, [x]))


def test_training_gives_the_same_bits_with_the_meter():
    model = network()
    plain, x = copy.deepcopy(model), images()
    meter = tk.ParameterFisher(model)
    for net in (model, plain):
        mean_of_own(net, x).backward()
    meter.update()
    both = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(p.grad.equal(q.grad) for p, q in both)
    before = [p.grad.clone() for p in model.parameters()]
    meter.update(closure=lambda: mean_of_own(model, x))
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), before, strict=True))


def test_backward_twice_over_one_graph_adds_gradients_up():
    model, x = network(), images()
    meter = tk.ParameterFisher(model)
    loss = mean_of_own(model, x)
    loss.backward(retain_graph=True)
    loss.backward()
    meter.update()
    expected = by_loop(model, [x])
    close(meter.compute(), {name: 4 * value for name, value in expected.items()})


def test_chosen_and_frozen_parameters():
    model, x = network(), images()
    model[0].bias.requires_grad_(False)
    expected = by_loop(model, [x])
    assert "0.bias" not in expected
    close(metered(model, [x]), expected)
    chosen = metered(model, [x], parameters=["*.weight"])
    close(chosen, {name: v for name, v in expected.items() if name.endswith("weight")})
    meter = tk.ParameterFisher(model)
    with tk.scoring(model), pytest.raises(RuntimeError, match=r"0.weight.* are frozen now"):
        model(x)
    meter.close()


def test_parameters_that_no_gradient_reaches_are_zero():
    model = network()
    model.unused = nn.Linear(2, 2)
    x = images()
    found = metered(nn.Sequential(*model[:-1]), [x])
    assert not any(name.startswith("unused") for name in found)
    meter = tk.ParameterFisher(model)
    forward = model.forward
    model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*[*model][:-1]), x)
    mean_of_own(model, x).backward()
    model.forward = forward
    meter.update()
    found = meter.compute()
    assert not found["unused.weight"].any()
    assert found["0.weight"].any()


def test_state_goes_on_where_it_was_and_wrong_state_changes_nothing():
    model, batches = network(), [images(3), images(2)]
    meter = tk.ParameterFisher(model)
    meter.update(closure=lambda: mean_of_own(model, batches[0]))
    state = meter.state_dict()
    other = tk.ParameterFisher(copy.deepcopy(network()))
    other.load_state_dict(state)
    meter.update(closure=lambda: mean_of_own(model, batches[1]))
    again = tk.ParameterFisher(model)
    again.load_state_dict(state)
    again.update(closure=lambda: mean_of_own(model, batches[1]))
    close(again.compute(), meter.compute(), 0)
    small = tk.ParameterFisher(nn.Linear(2, 2))
    wrong = {**state, "version": 7}
    for broken, message in ((state, "which is not here"), (wrong, "version"), ({}, "version")):
        with pytest.raises(ValueError, match=message):
            small.load_state_dict(broken)
    assert small.examples == 0
    meter.reset()
    with pytest.raises(RuntimeError, match="call update"):
        meter.compute()


def test_skipped_passes_do_not_count_and_a_closed_meter_leaves_no_hook():
    model, x = network(), images()
    meter = tk.ParameterFisher(model)
    mean_of_own(model, images()).backward()
    meter.skip()
    mean_of_own(model, x).backward()
    meter.update()
    close(meter.compute(), by_loop(model, [x]))
    meter.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="closed"):
        meter.update()
    tk.ParameterFisher(model)
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_other_meters_do_not_count_its_passes():
    model, x = network(), images()
    scores = tk.Importance(model, "obd_fisher")
    meter = tk.ParameterFisher(model)
    meter.update(closure=lambda: mean_of_own(model, x))
    with pytest.raises(RuntimeError, match="no forward and backward pass"):
        scores.update()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"parameters": ["conv*"]}, ValueError, "'conv.' matches no trained parameter"),
        ({"parameters": "0.weight"}, ValueError, "got the string"),
        ({"reduction": "none"}, ValueError, "'none' is not one of mean, sum"),
        ({"matrix": "hessian"}, ValueError, "'hessian' is not one of empirical, gauss_newton"),
        ({"samples": 3}, ValueError, "samples: 3"),
        ({"backend": "fast"}, ValueError, "'fast' is not one of"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        tk.ParameterFisher(network(), **options)


def test_wrong_use():
    with pytest.raises(ValueError, match="no trained parameter"):
        tk.ParameterFisher(nn.ReLU())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        tk.ParameterFisher(lambda x: x)  # type: ignore[arg-type]
    meter = tk.ParameterFisher(network())
    with pytest.raises(RuntimeError, match="no forward and backward pass"):
        meter.update()
    with pytest.raises(RuntimeError, match="did not call the model"):
        meter.update(closure=lambda: torch.ones((), requires_grad=True) * 2)
    newton = tk.ParameterFisher(network(), matrix="gauss_newton")
    with pytest.raises(ValueError, match="closure"):
        newton.update()


def exact_gauss_newton(model: nn.Module, x: Tensor, root) -> dict[str, Tensor]:
    """mean_n diag(J_nᵀ H_n J_n) by whole Jacobians; root(z): V with V Vᵀ = H."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for one in x.split(1):
        z = model(one)[0]
        for column in root(z.detach()).T:
            grads = torch.autograd.grad(z @ column, [*parameters.values()], retain_graph=True)
            for name, grad in zip(total, grads, strict=True):
                total[name] += grad.square() / len(x)
    return total


def softmax_root(z: Tensor) -> Tensor:
    p = z.softmax(0)
    values, vectors = torch.linalg.eigh(p.diag() - p[:, None] * p)
    return vectors * values.clamp(min=0).sqrt()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gauss_newton_matrix_of_cross_entropy(reduction):
    model, x, y = network(), images(), torch.randint(0, 3, (N,))
    meter = tk.ParameterFisher(model, matrix="gauss_newton", reduction=reduction)
    for part in (slice(0, 1), slice(1, N)):
        closure = lambda: F.cross_entropy(model(x[part]), y[part], reduction=reduction)  # noqa: B023, E731
        meter.update(closure=closure)
    close(meter.compute(), exact_gauss_newton(model, x, softmax_root))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z + z.new_tensor([5e3, 0, -5e3]), torch.zeros(N).long()),
        lambda z: F.cross_entropy(z, torch.full((N,), -100), reduction="sum"),
        lambda z: F.l1_loss(z, torch.full_like(z, 9)),
    ],
    ids=["saturated", "ignored", "straight"],
)
def test_a_batch_whose_loss_has_no_curvature_counts_as_zeros(loss):
    model, x, y = network(), images(), torch.randint(0, 3, (N,))
    meter = tk.ParameterFisher(model, matrix="gauss_newton")
    meter.update(closure=lambda: loss(model(x)))
    assert meter.examples == N
    assert not any(found.any() for found in meter.compute().values())
    meter.update(closure=lambda: F.cross_entropy(model(x), y))
    half = {n: found / 2 for n, found in exact_gauss_newton(model, x, softmax_root).items()}
    close(meter.compute(), half)


def test_its_estimate_by_probes_has_it_for_a_mean():
    model, x, y = network(), images(), torch.randint(0, 3, (N,))
    meter = tk.ParameterFisher(model, matrix="gauss_newton", samples=8)
    for _ in range(60):
        meter.update(closure=lambda: F.cross_entropy(model(x), y))
    expected = exact_gauss_newton(model, x, softmax_root)
    for name, found in meter.compute().items():
        assert (found - expected[name]).norm() < 0.2 * expected[name].norm(), name


def test_it_waits_for_the_other_kinds_too():
    """Modules run again, and modules called twice, in each of the backward passes."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.act = nn.PReLU(4)
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.act(self.inner(self.inner(x).sin())))

    model = Net().double()
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    meter = tk.ParameterFisher(model, matrix="gauss_newton", reduction="sum")
    with pytest.warns(UserWarning, match="act.weight"):
        meter.update(closure=lambda: F.mse_loss(model(x), y, reduction="sum"))
    identity = lambda z: 2**0.5 * torch.eye(3, dtype=z.dtype)  # noqa: E731
    close(meter.compute(), exact_gauss_newton(model, x, identity))


class Doubled(torch.autograd.Function):
    """2·x, whose backward pass looks at a number, which is not to be had of several at once."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return 2 * dy if dy.sum().item() < 1e30 else dy


class Mixed(nn.Module):
    """Known kinds, called twice too, and one that is run again; its outputs are 3 × 5."""

    def __init__(self, *, own_function: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.act = nn.PReLU(4)
        self.last = nn.LayerNorm(4)
        self.out = nn.Linear(4, 5)
        self.own_function = own_function

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids).transpose(1, 2))
        x = self.act(self.conv(self.conv(x).tanh()))
        x = self.last(x.transpose(1, 2))
        return self.out(Doubled.apply(x) if self.own_function else 2 * x)


@pytest.mark.filterwarnings("ignore:act.weight")
@pytest.mark.parametrize("own_function", [False, True])
@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("loss", ["cross_entropy", "both ways"])
def test_several_columns_at_once_are_what_they_are_one_by_one(
    loss, samples, own_function, monkeypatch
):
    model = Mixed(own_function=own_function).double().eval()
    ids, labels = torch.randint(0, 7, (N, 3)), torch.randint(0, 5, (N, 3))

    def closure() -> Tensor:
        z = model(ids)
        if loss == "cross_entropy":
            return F.cross_entropy(z.flatten(0, 1), labels.flatten())
        return (z.cos() + 0.1 * z.square()).sum()  # bent upwards and downwards

    found, flowed = [], []
    batched = OwnPasses._flow_together
    monkeypatch.setattr(
        OwnPasses,
        "_flow_together",
        lambda *arguments: flowed.append(batched(*arguments)) or flowed[-1],
    )
    for at_once in (1, 3, 100):
        monkeypatch.setattr(Ends, "passes_at_once", lambda *_, at_once=at_once: at_once)
        meter = tk.ParameterFisher(model, matrix="gauss_newton", samples=samples, seed=5)
        meter.update(closure=closure)
        found.append(meter.compute())
        meter.close()
    for other in found[1:]:
        for name, value in found[0].items():
            scale = value.abs().max()
            assert scale > 0, name
            assert (other[name] - value).abs().max() <= 1e-12 * scale, name
    assert flowed
    assert all(done != own_function for done in flowed)


def test_columns_flow_together_where_they_take_less_room_than_the_parameters():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), torch.randn(2, 64)
    meter = tk.ParameterFisher(model, matrix="gauss_newton", reduction="sum")
    counted = []
    meter._watch.reduce, reduce = lambda: counted.append(1) or reduce(), meter._watch.reduce
    meter.update(closure=lambda: model(x).square().sum())
    assert len(counted) <= 2  # of the eight columns, and at the end
    meter.close()
