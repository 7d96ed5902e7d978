"""Scores of new networks against references in float64, and the masks that are cut of them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

import taylor_kernels as tk
from taylor_kernels.methods import pruning_at_init as module
from taylor_kernels.methods.masks import Held, masks_of, ranked_weights, shuffled

pytestmark = pytest.mark.usefixtures("one_thread")


def network(depth: int = 2, width: int = 12) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    sizes = [36, *[width] * depth]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 5))


def batch(size: int = 24) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 1, 5, 5), torch.randint(0, 5, (size,))


def loss64(model: nn.Module, data: tuple[Tensor, Tensor], temperature: float = 1.0):
    """The loss as a function of all ranked weights, in float64, by torch.func."""
    twin = copy.deepcopy(model).double()
    fixed = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    weights = {name: fixed[name].detach() for name in ranked_weights(model)}

    def loss(changed: dict[str, Tensor]) -> Tensor:
        state = {name: t.detach().clone() for name, t in fixed.items()} | changed
        outputs = functional_call(twin, state, (data[0].double(),))
        return F.cross_entropy(outputs / temperature, data[1])

    return loss, weights


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    for name, want in expected.items():
        scale = want.abs().max()
        assert scale > 0
        assert (found[name].double() - want).abs().max() <= tolerance * scale, name


def test_snip_is_the_change_of_the_loss():
    model, data = network(), batch()
    loss, weights = loss64(model, data)
    gradients = grad(loss)(weights)
    expected = {name: (w * gradients[name]).abs() for name, w in weights.items()}
    close(module.snip(model, [data], F.cross_entropy), expected, 1e-4)


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient():
    """H·g as the derivative of the gradient along the gradient: forward over reverse."""
    model, data = network().eval(), batch()
    loss, weights = loss64(model, data, module.TEMPERATURE)
    gradients = grad(loss)(weights)
    _, product = jvp(grad(loss), (weights,), (gradients,))
    expected = {name: w * product[name] for name, w in weights.items()}
    close(module.grasp(model, [data], F.cross_entropy), expected, 1e-3)


def test_grasp_removes_what_would_lower_the_gradient_least():
    """By its sign: |g|² after removing a weight is |g|² − 2·w·(Hg), to first order."""
    model, data = network(1, 4).eval(), batch()
    loss, weights = loss64(model, data, module.TEMPERATURE)
    norm = lambda w: sum(g.square().sum() for g in grad(loss)(w).values())  # noqa: E731
    scores = module.grasp(model, [data], F.cross_entropy)
    name = "4.weight"
    at = scores[name].abs().flatten().argmax()
    step = {k: w.clone() for k, w in weights.items()}
    step[name].view(-1)[at] *= 1 - 1e-4
    change = float(norm(step) - norm(weights))
    assert change == pytest.approx(-2e-4 * float(scores[name].flatten()[at]), rel=0.02)


def test_synflow_is_the_flow_through_absolute_weights():
    model = network()
    model(batch()[0])  # BatchNorm's statistics move
    before = copy.deepcopy(model.state_dict())
    found = module.synflow(model, [batch()])
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for t in (*twin.parameters(), *twin.buffers()):
            t.abs_()
    twin(torch.ones(1, 1, 5, 5).double()).sum().backward()
    flows = {name: (p * p.grad).abs().detach() for name, p in ranked_weights(twin).items()}
    most = max(flow.max() for flow in flows.values())
    close(found, {name: flow / most for name, flow in flows.items()}, 1e-6)
    # What flows through a layer with no bias behind it is the same as through the next.
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_synflow_keeps_every_layer_where_one_round_and_snip_lose_one():
    """At 99.5% of a deep network: SynFlow never empties a layer, one round of it always does."""
    empty = {"synflow": 0, "synflow, one round": 0, "snip": 0}
    for seed in range(4):
        torch.manual_seed(seed)
        model, data = network(depth=12, width=32), batch(64)
        for layer in model:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.zeros_(layer.bias)  # a bias feeds what is behind it, whatever is in front
        for name in empty:
            rounds = 1 if "one round" in name else None
            masks = tk.methods.at_init(
                model, name.split(",")[0], 0.005, [data], F.cross_entropy, rounds=rounds
            )
            empty[name] += any(not mask.any() for mask in masks.values())
    assert empty["synflow"] == 0
    assert empty["synflow, one round"] == 4
    assert empty["snip"] > 0


@pytest.mark.parametrize("criterion", module.CRITERIA)
@pytest.mark.parametrize("rounds", [1, 5])
def test_exactly_so_many_are_kept_and_the_model_stays(criterion, rounds):
    model, data = network(), batch()
    model[4].weight.grad = torch.ones_like(model[4].weight)
    before = copy.deepcopy(model.state_dict())
    masks = tk.methods.at_init(model, criterion, 0.1, [data], F.cross_entropy, rounds=rounds)
    total = sum(p.numel() for p in ranked_weights(model).values())
    assert sum(int(mask.sum()) for mask in masks.values()) == int(0.1 * total)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model[4].weight.grad.eq(1).all()
    assert model[0].weight.grad is None


def test_scopes_and_filters():
    scores = {"a": torch.randn(6, 10), "b": torch.randn(8, 2, 3, 3)}
    local = masks_of(scores, 0.25, scope="local")
    assert [int(mask.sum()) for mask in local.values()] == [15, 36]
    filters = masks_of(scores, 0.5, granularity="filter")
    rows = torch.cat([mask.flatten(1).float().mean(1) for mask in filters.values()])
    assert rows.unique().tolist() == [0.0, 1.0]
    sums = torch.cat([score.flatten(1).sum(1) for score in scores.values()])
    assert rows.bool().equal(torch.zeros(14).index_fill(0, sums.topk(7).indices, 1).bool())


def test_a_shuffled_mask_keeps_as_many_of_each_layer():
    masks = {"a": torch.rand(40, 30) < 0.1, "b": torch.rand(7, 5, 3, 3) < 0.4}
    found = shuffled(masks, torch.Generator().manual_seed(0))
    again = shuffled(masks, torch.Generator().manual_seed(0))
    for name, mask in masks.items():
        assert found[name].sum() == mask.sum()
        assert not found[name].equal(mask)
        assert found[name].equal(again[name])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.AdamW(p, 0.01),
    ],
    ids=["sgd", "adamw"],
)
def test_held_weights_stay_zero_and_the_others_learn(make):
    model = network()
    masks = tk.methods.at_init(model, "random", 0.3)
    held, optimizer = Held(model, masks), make(model.parameters())
    before = {name: w.detach().clone() for name, w in ranked_weights(model).items()}
    for _ in range(3):
        optimizer.zero_grad()
        images, labels = batch()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for name, weight in ranked_weights(model).items():
        assert not weight[~masks[name]].any()
        assert (weight[masks[name]] != before[name][masks[name]]).any()
    held.close()
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    assert model[4].weight.grad[~masks["4.weight"]].any()


def test_mistakes_are_named():
    model, data = network(), [batch()]
    for call, message in (
        (
            lambda: tk.methods.at_init(model, "snap", 0.1, data, F.cross_entropy),
            "'snap' is not one",
        ),
        (lambda: tk.methods.at_init(model, "snip", 0.0, data, F.cross_entropy), "keep: .*got 0"),
        (lambda: tk.methods.at_init(model, "snip", 0.1), "batches: snip reads data"),
        (lambda: tk.methods.at_init(model, "grasp", 0.1, data), "loss: grasp needs one"),
        (lambda: tk.methods.at_init(model, "random", 0.1, rounds=0), "rounds: .*got 0"),
        (lambda: tk.methods.at_init(model, "random", 0.1, scope="all"), "scope: 'all'"),
        (lambda: tk.methods.at_init(nn.ReLU(), "random", 0.1), "model: none"),
        (lambda: Held(model, {"4.weight": torch.ones(2) > 0}), "fits no parameter"),
        (
            lambda: masks_of({"a": torch.tensor([[torch.nan]])}, 0.5),
            "those of 'a' are not finite",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
def test_batches_are_summed(criterion):
    torch.manual_seed(0)
    model = network().double().eval()
    images, labels = batch()
    images = images.double()

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    score = module.CRITERIA[criterion].score
    whole = score(model, [(images, labels)], total)
    parts = score(model, [(images[:7], labels[:7]), (images[7:], labels[7:])], total)
    close(parts, whole, 1e-12)


@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounds_take_filters_and_half_types(granularity, dtype):
    model = network().to(dtype)
    masks = tk.methods.at_init(model, "magnitude", 0.25, rounds=3, granularity=granularity)
    units = [mask.flatten(1).any(1) if granularity == "filter" else mask for mask in masks.values()]
    assert sum(int(u.sum()) for u in units) == sum(u.numel() for u in units) // 4


def test_frozen_layers_are_ranked_and_stay_frozen_and_buffers_stay():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.body(x)

    model = Counting()
    model.body[0].requires_grad_(False)
    masks = tk.methods.at_init(model, "snip", 0.3, [batch()], F.cross_entropy, rounds=2)
    assert masks["body.0.weight"].any()
    assert not model.body[0].weight.requires_grad
    assert model.body[4].weight.requires_grad
    assert model.calls == 0


def test_later_masks_lie_inside_of_earlier_ones():
    model = network()
    first = tk.methods.at_init(model, "grasp", 0.8, [batch()], F.cross_entropy)
    second = tk.methods.at_init(model, "grasp", 0.79, [batch()], F.cross_entropy, masks=first)
    assert all(not (second[name] & ~first[name]).any() for name in first)


def test_masks_that_are_refused_change_nothing():
    model = network()
    before = copy.deepcopy(model.state_dict())
    masks = {
        name: torch.zeros_like(w, dtype=torch.bool) for name, w in ranked_weights(model).items()
    }
    last = list(masks)[-1]
    masks[last] = masks[last].float()
    with pytest.raises(ValueError, match=r"must be torch\.bool"):
        Held(model, masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
