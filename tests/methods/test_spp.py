"""What SPP promises of weights and masks, and of runs that are resumed."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import taylor_kernels as tk
from taylor_kernels.methods.probabilities import drawn


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )


LAYERS = ["0", "3", "5"]


def in_mid_run(model: nn.Module, **options: object) -> tk.methods.SPP:
    """An SPP whose probabilities are anything."""
    spp = tk.methods.SPP(model, layers=LAYERS, **options)
    state = spp.state_dict()
    for p in state["probabilities"].values():
        p.copy_(torch.rand_like(p).sub_(0.2).clamp_(0, 0.99))
    spp.load_state_dict(state)
    return spp


def columns_of(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """For each weight the number of its column."""
    number = torch.empty(weight.shape, dtype=torch.long)
    rows, width = weight.size(0) // groups, weight[0].numel()
    for i in range(weight.size(0)):
        number[i] = (torch.arange(width) + (i // rows) * width).view(weight[0].shape)
    return number


def test_one_iteration_is_that_of_a_masked_copy():
    torch.manual_seed(1)
    model = small_network().double()
    spp = in_mid_run(model, every=50)
    masks = drawn([spp.probabilities()[name] for name in LAYERS], 0, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = torch.randn(3, 4, 6, 6, dtype=torch.float64), torch.tensor([0, 3, 4])

    reference = {name: p.clone().requires_grad_() for name, p in before.items()}
    keep = {}
    for name, mask in zip(LAYERS, masks, strict=True):
        groups = 2 if name == "3" else 1
        weight = reference[f"{name}.weight"]
        keep[f"{name}.weight"] = (~mask)[columns_of(weight, groups)].double()
    state = {name: p * keep.get(name, 1) for name, p in reference.items()}
    loss = F.cross_entropy(functional_call(copy.deepcopy(model), state, x), y)
    loss.backward()

    with spp.masked():
        found = F.cross_entropy(model(x), y)
        found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-12)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert torch.allclose(p.grad, reference[name].grad, rtol=1e-10, atol=1e-14), name
    assert all((keep[name] == 0).any() for name in keep)


def test_scores_are_the_l1_norms_of_columns():
    torch.manual_seed(2)
    model = small_network()
    model[3].weight.data = model[3].weight.data.to(memory_format=torch.channels_last)
    spp = tk.methods.SPP(model, layers=LAYERS)
    for each in spp._groups:
        weight = model.get_submodule(each.name).weight.detach().double()
        number = columns_of(weight, 2 if each.name == "3" else 1)
        expected = torch.zeros(each.count, dtype=torch.float64)
        expected.index_add_(0, number.flatten(), weight.abs().flatten())
        assert torch.allclose(each.scores().double(), expected, rtol=1e-5)


def test_an_error_inside_loses_nothing():
    model = small_network()
    spp = in_mid_run(model, every=1)
    before, state = copy.deepcopy(model.state_dict()), spp.state_dict()

    def fail() -> None:
        with spp.masked():
            assert not torch.equal(model[0].weight, before["0.weight"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert spp.iteration == state["iteration"]
    with spp.evaluated(), pytest.raises(RuntimeError, match="inside one another"), spp.masked():
        pass
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="'3' are not finite"), spp.masked():
        pass
    for name, p in spp.probabilities().items():
        assert torch.equal(p, state["probabilities"][name])


def train(model, spp, optimizer, iterations, seed):
    for i in range(iterations):
        torch.manual_seed(seed + i)
        x = torch.randn(8, 4, 6, 6)
        optimizer.zero_grad()
        with spp.masked():
            model(x).square().mean().backward()
        optimizer.step()


def test_what_is_gone_stays_gone_and_a_resumed_run_has_the_same_bits():
    torch.manual_seed(3)
    model = small_network()
    kept = copy.deepcopy(model)

    def begin(network):
        spp = tk.methods.SPP(network, {"0": 0.5, "3": 0.75}, layers=["0", "3"], every=2, step=0.4)
        return spp, torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=0.1)

    spp, optimizer = begin(model)
    train(model, spp, optimizer, 30, 0)
    files = copy.deepcopy((model.state_dict(), optimizer.state_dict(), spp.state_dict()))
    while not spp.done:
        train(model, spp, optimizer, 10, 30 + spp.iteration)
    stopped = spp.iteration

    other, other_optimizer = begin(kept)
    for target, state in zip((kept, other_optimizer, other), files, strict=True):
        target.load_state_dict(state)
    while not other.done:
        train(kept, other, other_optimizer, 10, 30 + other.iteration)
    assert other.iteration == stopped
    for one, two in zip(model.parameters(), kept.parameters(), strict=True):
        assert torch.equal(one, two)

    gone = spp.gone()
    assert int(gone["0"].sum()) == 18
    assert int(gone["3"].sum()) == 54
    for _ in range(3):  # retraining, without masks
        optimizer.zero_grad()
        model(torch.randn(8, 4, 6, 6)).square().mean().backward()
        optimizer.step()
    for name, groups in (("0", 1), ("3", 2)):
        weight = model.get_submodule(name).weight
        assert (weight[gone[name][columns_of(weight, groups)]] == 0).all()
    with pytest.raises(ValueError, match="targets"):
        tk.methods.SPP(model, 0.3).load_state_dict(spp.state_dict())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 10, 3, padding=1)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.inner_norm = nn.BatchNorm2d(10)
        self.outer = nn.Conv2d(10, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner_norm(self.depthwise(self.inner(x)))))
        return self.head(x.mean((2, 3)))


def test_filters_that_are_gone_are_removed_as_they_were_masked():
    torch.manual_seed(4)
    model, x = Residual(), torch.randn(6, 3, 5, 5)
    nn.init.normal_(model.norm.bias)
    nn.init.normal_(model.inner_norm.bias)
    spp = tk.methods.SPP(model, 0.5, groups="filters", example_inputs=x[:1], every=1, step=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    while not spp.done:
        optimizer.zero_grad()
        with spp.masked():
            model(x).square().mean().backward()
        optimizer.step()
    expected = model.eval()(x)
    spp.compact(optimizer=optimizer)
    assert (model.stem.out_channels, model.inner.out_channels) == (4, 5)
    assert model.depthwise.groups == 5
    assert torch.allclose(model(x), expected, atol=1e-6)
    model(x).sum().backward()
    optimizer.step()


def test_expected_masks_scale_and_thresholded_ones_cut():
    model = small_network()
    spp = in_mid_run(model)
    before = model[0].weight.detach().clone()
    p = spp.probabilities()["0"].view(4, 3, 3)
    with spp.evaluated("expected"):
        assert torch.allclose(model[0].weight, before * (1 - p))
    with spp.evaluated("thresholded"):
        assert torch.equal(model[0].weight, before * (p < 0.5))
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="mask: expected"), spp.evaluated("none"):
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": {"0": 0.5}}, "none for '3'"),
        ({"ratio": {"0": 0.5, "3": 0.5, "7": 0.5}}, "'7'"),
        ({"every": 0}, "every"),
        ({"step": 0.0}, "step"),
        ({"decay": 1.0}, "decay"),
        ({"groups": "rows"}, "groups"),
        ({"groups": "filters"}, "example_inputs"),
        ({"layers": ["1"]}, "BatchNorm2d"),
        ({"layers": ["9"]}, "no module '9'"),
        ({"groups": "filters", "example_inputs": torch.zeros(1, 4, 6, 6), "layers": ["5"]}, "'5'"),
    ],
)
def test_bad_arguments_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        tk.methods.SPP(small_network(), **options)


def test_a_step_inside_is_refused_and_a_broken_state_changes_nothing():
    model = small_network()
    spp = in_mid_run(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)

    def step_inside() -> None:
        with spp.masked():
            other.step()
            model(torch.randn(2, 4, 6, 6)).sum().backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match="inside masked"):
        step_inside()
    before = spp.state_dict()
    broken = [
        {key: value for key, value in before.items() if key != "seed"},
        {**before, "probabilities": {n: p * math.nan for n, p in before["probabilities"].items()}},
    ]
    for state in broken:
        with pytest.raises(ValueError, match="state: "):
            spp.load_state_dict(state)
        for name, p in spp.probabilities().items():
            assert torch.equal(p, before["probabilities"][name])


def test_layers_may_be_any_iterable_but_not_empty():
    model = small_network()
    found = tk.methods.SPP(model, layers=(name for name in LAYERS)).probabilities()
    assert list(found) == LAYERS
    with pytest.raises(ValueError, match="names none"):
        tk.methods.SPP(model, layers=[])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_autocast_or_weights_come_back_bit_for_bit(dtype):
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).to(dtype)
    spp = tk.methods.SPP(model, 0.5, every=1000)
    state = spp.state_dict()
    for p in state["probabilities"].values():
        p.fill_(0.5)  # what is masked depends on this, the seed and the iteration alone
    spp.load_state_dict(state)
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        model.zero_grad()
        with spp.masked(), torch.autocast("cpu", torch.bfloat16):
            off = model[0].weight == 0
            assert off.any()
            model(torch.randn(4, 2, 8, 8)).float().square().mean().backward()
        for p, old in zip(model.parameters(), before, strict=True):
            assert p.equal(old)
            assert p.grad.isfinite().all()
        assert not model[0].weight.grad[off].any()
