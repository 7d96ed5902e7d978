"""GSM as an optimizer: the paper's step, exactly Q active weights, and the verbs of torch.optim."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.methods import GSM

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    )


def minibatch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 2, 4, 4), torch.randint(0, 5, (16,))


def backward(model: nn.Module, batch: tuple[Tensor, Tensor] | None = None) -> Tensor:
    images, labels = batch or minibatch()
    model.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss


def state(model: nn.Module, optimizer: GSM) -> list[Tensor]:
    momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return [t.detach().clone() for t in (*model.parameters(), *momenta)]


def test_steps_are_those_of_the_paper():
    """Against a few lines in float64, whose ranking sees the float32 products."""
    model = network()
    lr, beta, decay, compression = 0.05, 0.9, 0.01, 7.0
    optimizer = GSM(model.parameters(), lr, beta, decay, compression)
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters if p.dim() in (2, 4))
    assert optimizer.active == int(total / compression)
    momenta = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for _ in range(12):
        backward(model)
        scores = torch.cat(
            [(p.grad * p).detach().abs().flatten() for p in parameters if p.dim() > 1]
        )
        active = torch.zeros_like(scores, dtype=torch.bool)
        active[scores.sort(descending=True, stable=True).indices[: optimizer.active]] = True
        masks = iter(active.split([p.numel() for p in parameters if p.dim() > 1]))
        expected = []
        for i, p in enumerate(parameters):
            w, g = p.detach().double(), p.grad.double()
            if p.dim() > 1:
                g = g * next(masks).view(p.shape) + decay * w
            momenta[i] = beta * momenta[i] + g
            expected.append(w - lr * momenta[i])
        optimizer.step()
        for p, want in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.detach().double(), want, rtol=1e-6, atol=1e-7)
        momenta = [optimizer.state[p]["momentum_buffer"].double() for p in parameters]


@settings(max_examples=25)
@given(st.data())
def test_exactly_q_are_active_whatever_the_ties(data):
    """With momentum and decay at 0, a weight has moved only if its gradient reached it."""
    shapes = data.draw(
        st.lists(st.sampled_from([(3, 4), (2, 1, 3, 3), (1, 1)]), min_size=1, max_size=4)
    )
    values = st.sampled_from([0.5, 1.0, -1.0, 2.0])
    drawn = [
        torch.tensor(data.draw(st.lists(values, min_size=math.prod(s), max_size=math.prod(s))))
        for s in shapes
    ]
    parameters = [nn.Parameter(t.view(s)) for t, s in zip(drawn, shapes, strict=True)]
    total = sum(p.numel() for p in parameters)
    compression = data.draw(st.floats(1, total))
    optimizer = GSM(parameters, 0.1, 0.0, 0.0, compression)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = sum(int((a != b).sum()) for a, b in zip(parameters, before, strict=True))
    assert moved == optimizer.active == max(int(total / compression), 1)


def test_passive_weights_decay_as_the_trap_says():
    """By the greater eigenvalue of the step's matrix, near exp(−α·η/(1 − β)), once z settled."""
    alpha, beta, eta, steps = 0.1, 0.9, 0.01, 400
    weight = nn.Parameter(torch.ones(1, 2))
    optimizer = GSM([weight], alpha, beta, eta, compression=2)
    sizes = []
    for _ in range(steps):
        weight.grad = torch.tensor([[1e-6, 0.0]])
        optimizer.step()
        sizes.append(math.log(weight[0, 1].item()))
    matrix = torch.tensor([[beta, eta], [-alpha * beta, 1 - alpha * eta]], dtype=torch.float64)
    rate = math.log(torch.linalg.eigvals(matrix).real.max().item())
    assert rate == pytest.approx(-alpha * eta / (1 - beta), rel=0.15)
    assert sizes[-1] - sizes[steps // 2] == pytest.approx(rate * (steps // 2 - 1), rel=1e-3)


def test_finish_cuts_to_q_by_magnitude():
    model = network()
    optimizer = GSM(model.parameters(), compression=9)
    backward(model)
    optimizer.step()
    dense = copy.deepcopy(model)
    masks = optimizer.finish()
    weights = list(optimizer.ranked_parameters())
    assert sum(int(p.count_nonzero()) for p in weights) == optimizer.active
    kept = [p.detach().abs()[mask] for p, mask in zip(dense_weights(dense), masks, strict=True)]
    cut = [p.detach().abs()[~mask] for p, mask in zip(dense_weights(dense), masks, strict=True)]
    assert torch.cat(kept).min() >= torch.cat(cut).max()
    for p, old, mask in zip(weights, dense_weights(dense), masks, strict=True):
        assert p[mask].equal(old[mask])
        assert not optimizer.state[p]["momentum_buffer"][~mask].any()
    assert model[1].bias.equal(dense[1].bias)


def dense_weights(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.dim() in (2, 4)]


def test_a_run_that_was_killed_goes_on_to_the_same_bits():
    torch.manual_seed(3)
    batches = [minibatch() for _ in range(8)]
    model = network()

    def make(model: nn.Module):
        groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[1:].parameters()}]
        optimizer = GSM(groups, 0.1, 0.9, 0.01, 5)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)

    optimizer, schedule = make(model)
    for i, batch in enumerate(batches):
        if i == 4:
            file = io.BytesIO()
            parts = (model, optimizer, schedule)
            torch.save([part.state_dict() for part in parts], file)
        backward(model, batch)
        optimizer.step()
        schedule.step()
    file.seek(0)
    other = network()
    again, its_schedule = make(other)
    for part, saved in zip((other, again, its_schedule), torch.load(file), strict=True):
        part.load_state_dict(saved)
    for batch in batches[4:]:
        backward(other, batch)
        again.step()
        its_schedule.step()
    assert all(
        a.equal(b) for a, b in zip(state(model, optimizer), state(other, again), strict=True)
    )


def test_what_is_not_ranked_takes_sgds_steps():
    model = network()
    twin = copy.deepcopy(model)
    mine = GSM(model.parameters(), 0.1, 0.9, 0.5, 3)
    theirs = torch.optim.SGD(twin.parameters(), 0.1, 0.9)
    for _ in range(3):
        batch = minibatch()
        backward(model, batch)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        mine.step()
        theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.dim() == 1:
            torch.testing.assert_close(p, q)


def test_compression_1_is_sgd():
    model = network()
    twin = copy.deepcopy(model)
    mine = GSM(model.parameters(), 0.1, 0.9, 0.01, 1)
    decayed = [p for p in twin.parameters() if p.dim() > 1]
    others = [p for p in twin.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others}]
    theirs = torch.optim.SGD(groups, 0.1, 0.9)
    for _ in range(3):
        batch = minibatch()
        for one, optimizer in ((model, mine), (twin, theirs)):
            backward(one, batch)
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["0.weight", "1.bias", "4.weight"])
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(bad, which):
    model = network()
    optimizer = GSM(model.parameters(), compression=4)
    backward(model)
    optimizer.step()
    backward(model)
    before = state(model, optimizer)
    index = [name for name, _ in model.named_parameters()].index(which)
    list(model.parameters())[index].grad.view(-1)[1] = bad
    with pytest.raises(FloatingPointError, match=rf"param_groups\[0\]\['params'\]\[{index}\]"):
        optimizer.step()
    assert all(a.equal(b) for a, b in zip(state(model, optimizer), before, strict=True))


def test_names_are_those_that_the_optimizer_was_given():
    model = network()
    try:
        optimizer = GSM(model.named_parameters(), compression=4)
    except TypeError:
        pytest.skip("this PyTorch gives optimizers no names")
    backward(model)
    model[4].weight.grad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"^4\.weight: its gradient"):
        optimizer.step()


def test_frozen_parameters_stay_and_a_closure_is_called():
    model = network()
    model[0].requires_grad_(False)
    optimizer = GSM(model.parameters(), 0.1, compression=2)
    before = model[0].weight.clone()
    batch = minibatch()
    loss = optimizer.step(lambda: backward(model, batch))
    assert loss.item() > 0
    assert model[0].weight.equal(before)
    model.zero_grad()
    after = copy.deepcopy(model.state_dict())
    assert optimizer.step() is None
    assert all(value.equal(after[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["bfloat16", "autocast", "channels_last"])
def test_other_dtypes_and_layouts_learn(kind):
    torch.manual_seed(0)
    model = network()
    images, labels = minibatch()
    if kind == "bfloat16":
        model, images = model.bfloat16(), images.bfloat16()
    elif kind == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    optimizer = GSM(model.parameters(), 0.05, 0.9, 1e-4, 2)
    losses = []
    for _ in range(30):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression": 0.5}, "compression: 0.5 is out of range; it must be at least 1"),
        ({"compression": math.nan}, "compression: nan"),
        ({"lr": -1.0}, "lr: -1.0 is out of range"),
        ({"momentum": 1.0}, r"momentum: 1.0 is out of range; it must be in \[0, 1\)"),
        ({"weight_decay": math.inf}, "weight_decay: inf"),
    ],
)
def test_numbers_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        GSM(network().parameters(), **changes)


def test_other_mistakes():
    with pytest.raises(ValueError, match="params: none has 2 or 4 dimensions"):
        GSM([nn.Parameter(torch.ones(3))])
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "compression": 3.0}]
    with pytest.raises(ValueError, match="compression: one for all groups"):
        GSM(groups, compression=2.0)
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = tk.methods.GSM(embedding.parameters(), compression=2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="its gradient is sparse"):
        optimizer.step()


def test_a_copy_and_a_pickled_optimizer_go_on():
    model = network()
    optimizer = GSM(model.parameters(), lr=0.1, compression=4)
    backward(model)
    optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    third, another = pickle.loads(pickle.dumps((model, optimizer)))
    batch = minibatch()
    for net, its in ((model, optimizer), (twin, other), (third, another)):
        backward(net, batch)
        its.step()
        its.finish()
    for network_, its in ((twin, other), (third, another)):
        for one, two in zip(state(model, optimizer), state(network_, its), strict=True):
            assert torch.equal(one, two)


def test_frozen_weights_are_neither_counted_nor_cut():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].requires_grad_(False)
    optimizer = GSM(model.parameters(), compression=2)
    assert optimizer.active == 8
    optimizer.finish()
    assert int(model[0].weight.count_nonzero()) == 16
    assert int(model[1].weight.count_nonzero()) == 8
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    before = model[1].weight.detach().clone()
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.finish()
    assert torch.equal(model[1].weight.isnan(), before.isnan())
    assert torch.equal(model[1].weight.nan_to_num(), before.nan_to_num())
