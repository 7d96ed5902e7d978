"""Whole residual blocks: which are found, what they score, and that removal is what masking was."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import taylor_kernels as tk
from taylor_kernels.pruning import Pruner
from taylor_kernels.studies.networks import DigitsResNet
from taylor_kernels.tracing import trace

WIDTH = 6


class Basic(nn.Module):
    """As in ResNet, added in place, with one ReLU module for everything."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Inverted(nn.Module):
    """As in MobileNetV2: a linear bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width), nn.ReLU6(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width), nn.ReLU6(),
            nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Excitation(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(width, width, 1)

    def forward(self, y: Tensor) -> Tensor:
        return y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()


class Scaled(nn.Module):
    """A branch behind its norm, with an excitation, scaled by a number on its way to the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.gate = Excitation(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.conv(F.relu(self.norm(x))))
        return 0.3 * y + x


class Attention(nn.Module):
    """Before or after its norm; returns its weights too."""

    def __init__(self, width: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) if self.norm_first else x
        y, _ = self.attend(y, y, y, need_weights=False)
        return x + self.drop(y) if self.norm_first else self.norm(x + self.drop(y))


class Feed(nn.Module):
    """A gated feed-forward branch in front of which stands a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate = nn.Linear(width, 9), nn.Linear(width, 9)
        self.down = nn.Linear(9, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def images(*blocks: nn.Module) -> nn.Sequential:
    """A network of image blocks."""
    stem = [nn.Conv2d(2, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))


def tokens(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, WIDTH), *blocks, nn.Linear(WIDTH, 3))


KINDS = {
    "basic": lambda: (images(*(Basic(WIDTH) for _ in range(3))), (2, 5, 5)),
    "inverted": lambda: (images(Inverted(WIDTH), Inverted(WIDTH)), (2, 5, 5)),
    "scaled": lambda: (images(Scaled(WIDTH), Basic(WIDTH), Scaled(WIDTH)), (2, 5, 5)),
    "resnet": lambda: (DigitsResNet(4, 2), (1, 8, 8)),
    "pre-norm": lambda: (tokens(Attention(WIDTH, True), Feed(WIDTH)), (5, 4)),
    "post-norm": lambda: (tokens(Attention(WIDTH, False), Feed(WIDTH)), (5, 4)),
    "torch": lambda: (
        tokens(nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, norm_first=True)), (5, 4)
    ),
}  # fmt: skip
#: What each of them can lose.
FOUND = {
    "basic": ["3", "4", "5"],
    "inverted": ["3", "4"],
    "scaled": ["3", "4.bn2", "5"],  # behind what is no ReLU a block's own ReLU has to stay
    "resnet": ["blocks.0", "blocks.1", "blocks.3", "blocks.5"],
    "pre-norm": ["1", "2"],
    "post-norm": ["1.drop", "2"],
    "torch": ["1.dropout1", "1.dropout2"],
}


def built(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(len(kind))
    model, shape = KINDS[kind]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.to(dtype), torch.randn(6, *shape, dtype=dtype)


def weaken(model: nn.Module, kind: str) -> None:
    """Let the branch of the second block add next to nothing."""
    last = model.get_submodule({"basic": "4.bn2", "scaled": "4.bn2", "pre-norm": "2.down"}[kind])
    with torch.no_grad():
        last.weight.mul_(1e-4), last.bias.mul_(1e-4)


def step(model, optimizer, x, pruner=None):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    record = pruner.step() if pruner else None
    optimizer.step()
    return loss.item(), record


def make(model, x, criterion="taylor_fo_gate", **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)
    given = {"params": 0.4, "every": 1, "per_step": 0.25} | options
    return optimizer, Pruner(model, x[:2], criterion, blocks=True, optimizer=optimizer, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_found_masked_and_removed(kind):
    model, x = built(kind)
    optimizer, pruner = make(model, x)
    assert list(pruner.blocks) == FOUND[kind]
    went: list[str] = []
    while not pruner.done:
        _, record = step(model, optimizer, x, pruner)
        went += record.blocks
        assert record.params == pruner.cost.params
    assert set(went) | set(pruner.blocks) == set(FOUND[kind])
    model.eval()
    expected, cost = model(x), pruner.cost
    pruner.compact()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in model.parameters()) == cost.params
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }
    assert set(optimizer.state) <= set(model.parameters())
    step(model.train(), optimizer, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x[:2])
    assert counter.get_total_flops() == cost.flops


@pytest.mark.parametrize("kind", ["basic", "scaled", "pre-norm"])
def test_training_goes_on_as_it_would_have_masked(kind):
    model, x = built(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    weaken(model, kind)
    optimizer, pruner = make(model, x, params=0.5, per_step=0.5)
    while not pruner.done:
        step(model, optimizer, x, pruner)
    assert len(pruner.blocks) < len(FOUND[kind])
    twin_run = []
    state, momenta = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(4):
        twin_run.append(step(model, optimizer, x)[0])
    model.load_state_dict(state)
    optimizer.load_state_dict(momenta)
    pruner.compact()
    for expected in twin_run:
        assert step(model, optimizer, x)[0] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", ["basic", "inverted", "scaled", "pre-norm"])
@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate"])
def test_a_blocks_gate_is_that_of_a_factor_on_its_branch(kind, criterion):
    model, x = built(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _, pruner = make(model, x, criterion, params=0.9, per_step=1)
    outputs = [block.output.module for block in pruner._network.blocks]
    paths = [block.output.returned for block in pruner._network.blocks]
    twin = copy.deepcopy(model)
    gates = torch.ones(len(x), len(outputs), dtype=x.dtype, requires_grad=True)
    for number, (name, path) in enumerate(zip(outputs, paths, strict=True)):

        def scaled(_, __, output, number=number, path=path):
            gate = gates[:, number]
            if path:
                return (output[0] * gate[:, None, None], *output[1:])
            return output * gate.view(-1, *[1] * (output.dim() - 1))

        twin.get_submodule(name).register_forward_hook(scaled)
    twin(x).square().mean().backward()
    slopes = gates.grad.sum(0) ** 2
    if criterion == "taylor_fo_gate":
        slopes = gates.grad.square().mean(0)
    model(x).square().mean().backward()
    pruner.step()
    found = pruner.block_scores()
    for name, expected in zip(FOUND[kind], slopes.tolist(), strict=True):
        if name in found:
            assert found[name] == pytest.approx(expected, rel=1e-9, abs=1e-18)
    assert len(found) >= len(outputs) - 1


@pytest.mark.parametrize("tokens_first", [False, True])
def test_padding_does_not_count_in_the_scores_of_blocks(tokens_first):
    """Of two passes, each with its mask; in dim 0 are sequences, or the tokens of all of them."""
    model, _ = built("pre-norm")
    if tokens_first:
        torch.manual_seed(1)
        model = tokens(Feed(WIDTH), Feed(WIDTH)).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(model)
    passes = [torch.randn(5, 3, 4, dtype=torch.float64) for _ in range(2)]
    if tokens_first:
        masks = [torch.rand(5, 3) < 0.6 for _ in range(2)]
        real = [x[mask] for x, mask in zip(passes, masks, strict=True)]
        passes = [x.flatten(0, 1) for x in passes]
        counts = [mask.flatten() for mask in masks]
    else:
        masks = counts = [torch.arange(5) < n for n in (2, 4)]
        real = [x[mask] for x, mask in zip(passes, masks, strict=True)]
    found = []
    for net, inputs, counted in ((model, passes, counts), (twin, real, None)):
        _, pruner = make(net, passes[0], params=0.9, per_step=1)
        for number, x in enumerate(inputs):
            outputs = net(x) if counted is None else net(x)[counted[number]]
            outputs.square().sum().backward()
        assert pruner.step(mask=None if counted is None else masks) is not None
        found.append(pruner.block_scores())
    assert len(found[0]) >= 1
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_of_weights_a_block_is_the_sum_of_its_filters():
    model, x = built("basic")
    _, pruner = make(model, x, "taylor_fo", params=0.9, per_step=1)
    model(x).square().mean().backward()
    weights = [(model.get_submodule(f"{n}.conv{k}").weight, n) for n in "345" for k in (1, 2)]
    expected = dict.fromkeys("345", 0.0)
    for weight, name in weights:
        expected[name] += (weight * weight.grad).square().sum().item()
    pruner.step()
    for name, score in pruner.block_scores().items():
        assert score == pytest.approx(expected[name], rel=1e-9)


def test_a_block_that_matters_least_goes_first_and_whole():
    model, x = built("basic")
    with torch.no_grad():
        model[4].bn2.weight.zero_()
        model[4].bn2.bias.zero_()
    lost, whole = (sum(p.numel() for p in part.parameters()) for part in (model[4], model))
    optimizer, pruner = make(model, x, "taylor_fo_bn", params=1 - lost / whole, per_step=0.9)
    _, record = step(model, optimizer, x, pruner)
    assert record.blocks == ("4",)
    assert "4" not in pruner.blocks
    assert pruner.widths["4.conv1"] == 0
    assert record.params == whole - lost
    assert record.done
    pruner.compact()
    assert isinstance(model[4], nn.Identity)


def test_copies_and_closed_pruners_keep_masked_blocks_out():
    model, x = built("scaled")
    weaken(model, "scaled")
    optimizer, pruner = make(model, x, params=0.5, per_step=0.5)
    while not pruner.done:
        step(model, optimizer, x, pruner)
    assert len(pruner.blocks) < 3
    expected = model.eval()(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    pruner.close()
    assert torch.equal(model(x), expected)
    pruner.compact()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert not any(module._forward_hooks for module in model.modules())


def random_network(seed: int) -> tuple[nn.Module, int]:
    """Stages of random blocks, with and without projections between; how many can be found."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()]
    width, count = 4, 0
    for _ in range(draw.randint(3, 6)):
        if draw.random() < 0.3:
            parts += [nn.Conv2d(width, width + 2, 3, padding=1), nn.BatchNorm2d(width + 2)]
            width += 2
        parts.append(draw.choice((Basic, Inverted, Scaled))(width))
        count += 1
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)), count


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed, tmp_path):
    model, count = random_network(seed)
    model, x = model.double(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    optimizer, pruner = make(model, x, "taylor_fo_bn", params=0.35, per_step=0.2)
    assert len(pruner.blocks) == count
    compacts = random.Random(seed)
    while not pruner.done:
        step(model, optimizer, x, pruner)
        if compacts.random() < 0.5:
            expected = model.eval()(x)
            pruner.compact()
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-11)
            assert sum(p.numel() for p in model.train().parameters()) == pruner.cost.params
    expected = model.eval()(x)
    pruner.compact()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-11)
    pytest.importorskip("safetensors", reason="pruned models are files of safetensors")
    tk.save_pruned(tmp_path / "it", pruner)
    again = tk.load_pruned(random_network(seed)[0].double(), tmp_path / "it").eval()
    assert torch.equal(again(x), model(x))
    assert repr(again) == repr(model)


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("compacts", [True, False])
def test_killed_and_resumed_is_the_same_run(stop, compacts, tmp_path):
    def start():
        model, x = built("scaled", torch.float32)
        return (model, x, *make(model, x, params=0.3, per_step=0.08, every=2))

    def go_on(model, x, optimizer, pruner, first, last):
        for number in range(first, last):
            generator = torch.Generator().manual_seed(number)
            step(model, optimizer, torch.randn(x.shape, generator=generator), pruner)
            if compacts and number % 3 == 0:
                pruner.compact()

    straight = start()
    go_on(*straight, 0, 12)
    stopped = start()
    go_on(*stopped, 0, stop * 2 + 1)
    assert len(stopped[3].blocks) < 3 or stop == 2
    path = tmp_path / "run.pt"
    tk.save_checkpoint(path, model=stopped[0], optimizer=stopped[2], pruner=stopped[3])
    resumed = start()
    tk.load_checkpoint(path, model=resumed[0], optimizer=resumed[2], pruner=resumed[3])
    assert resumed[3].cost == stopped[3].cost
    assert resumed[3].blocks == stopped[3].blocks
    go_on(*resumed, stop * 2 + 1, 12)
    assert resumed[3].history == straight[3].history
    for one, other in zip(resumed[0].parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_goes_back_to_blocks_that_are_masked_here():
    model, x = built("basic")
    weaken(model, "basic")
    optimizer, pruner = make(model, x, "taylor_fo_bn", params=0.3)
    before, cost = pruner.state_dict(), pruner.cost
    weights = copy.deepcopy(model.state_dict())
    expected = model.eval()(x)
    model.train()
    while len(pruner.blocks) == 3:
        step(model, optimizer, x, pruner)
    pruner.load_state_dict(before)
    model.load_state_dict(weights)
    assert pruner.cost == cost
    assert len(pruner.blocks) == 3
    assert torch.equal(model.eval()(x), expected)


def test_what_stays_says_why():
    class Dense(nn.Module):
        """A branch whose inner value is used later on; a projection in place of the identity."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.enter = nn.Linear(4, 4)
            self.side, self.out = nn.Linear(4, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            inner = self.one(x)
            y = x + self.two(inner)
            y = self.side(y) + self.two(y.relu())
            return self.out(torch.cat([y, inner], -1))

    model = Dense()
    blocks, others = trace(model, torch.randn(2, 4), blocks=True).find_blocks(model)
    assert not blocks
    assert "used elsewhere" in others[""]
    with pytest.raises(ValueError, match=r"^blocks: the model has no residual block.*elsewhere"):
        Pruner(model, torch.randn(2, 4), params=0.9, blocks=True)
    Pruner(model, torch.randn(2, 4), params=0.9).close()  # nothing has been touched


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"blocks": 1}, TypeError, "blocks: expected True or False"),
        ({"blocks": True, "criterion": "taylor_so_diag"}, ValueError, "none of a whole block"),
        ({"blocks": True, "criterion": "bn_scale"}, ValueError, "none of a whole block"),
        ({"blocks": True, "ignore": ("3", "4", "5")}, ValueError, "is ignored"),
    ],
)
def test_bad_input_is_said_in_one_sentence(options, error, words):
    model, x = built("basic")
    with pytest.raises(error, match=words):
        Pruner(model, x[:1], **({"params": 0.9} | options))
    Pruner(model, x[:1], params=0.9).close()


def test_states_of_other_pruners_are_refused():
    model, x = built("basic")
    plain = Pruner(copy.deepcopy(model), x[:1], "taylor_fo_gate", params=0.4)
    _, pruner = make(model, x)
    with pytest.raises(ValueError, match="blocks=True"):
        plain.load_state_dict(pruner.state_dict())
    with pytest.raises(ValueError, match="blocks=True"):
        pruner.load_state_dict(plain.state_dict())
    damaged = pruner.state_dict()
    damaged["blocks"]["removed"] = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="masks of blocks"):
        pruner.load_state_dict(damaged)


def test_ignored_blocks_stay():
    model, x = built("basic")
    _, pruner = make(model, x, ignore=("4.conv1",))
    assert pruner.blocks == ("3", "5")


@pytest.mark.parametrize("criterion", ["taylor_fo_gate", "taylor_fo", "magnitude_l2", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_go_alone_where_no_filter_may(kind, criterion):
    """Every layer is to keep more filters than it has; the state goes to another pruner halfway."""
    model, x = built(kind)
    _, pruner = make(model, x, criterion)
    blocks = pruner._network.blocks
    pruner.close()
    stay = [
        p.numel() for name, p in model.named_parameters() if not any(b.holds(name) for b in blocks)
    ]
    least = sum(stay) / sum(p.numel() for p in model.parameters())
    only = {"params": least + 1e-9, "per_step": 1, "min_filters": 10**6}
    optimizer, pruner = make(model, x, criterion, **only)
    assert pruner.widths == {}
    went: list[str] = []
    while not pruner.done:
        _, record = step(model, optimizer, x, pruner)
        assert record.removed == {}
        assert len(record.blocks) == 1
        went += record.blocks
        if len(went) == 1:
            state, weights = pruner.state_dict(), model.state_dict()
            pruner.close()
            model, _ = built(kind)
            optimizer, pruner = make(model, x, criterion, **only)
            model.load_state_dict(weights)
            pruner.load_state_dict(state)
    assert sorted(went) == sorted(FOUND[kind])
    model.eval()
    expected = model(x)
    pruner.compact()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in model.parameters()) == pruner.cost.params


def weighted(model: nn.Module, inputs: Tensor, weight: float = 1.0) -> None:
    """Gradients of a loss times a weight."""
    model.zero_grad()
    (model(inputs).square().mean() * weight).backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_gate"])
def test_scores_of_blocks_that_are_not_finite(criterion, only, value):
    model, x = built("basic")
    width = {"min_filters": 10**6} if only else {}
    _, pruner = make(model, x, criterion, params=0.6, every=2, per_step=1, **width)
    weighted(model, x, value)
    assert pruner.step() is None
    weighted(model, x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"^blocks 3, 4, 5: 3 of 3 blocks have scores that are"):
        pruner.step()
    assert pruner.blocks == ("3", "4", "5")
    assert not pruner.history
    assert not pruner.block_scores()
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    # The broken minibatch is forgotten: what follows is what a pruner without it does.
    again, _ = built("basic")
    _, fresh = make(again, x, criterion, params=0.6, every=2, per_step=1, **width)
    for _ in range(2):
        weighted(model, x)
        weighted(again, x)
        record, wanted = pruner.step(), fresh.step()
    assert record.blocks == wanted.blocks
    assert record.removed == wanted.removed
    assert pruner.block_scores() == fresh.block_scores()
    for name, scores in fresh.scores().items():
        torch.testing.assert_close(pruner.scores()[name], scores, equal_nan=True, rtol=0, atol=0)


def test_one_broken_block_is_named_and_leaves_no_trace_in_the_scores_of_filters():
    """Its gate is not finite where the gradients of its weights are."""
    model, x = built("basic")
    _, pruner = make(model, x, "taylor_fo", params=0.6, every=1, per_step=1)
    weighted(model, x)
    blocks = pruner._minibatches.blocks
    plain = blocks.of

    def one_infinite(tables, gates):
        found = plain(tables, gates)
        found[1] = torch.inf
        return found

    blocks.of = one_infinite
    with pytest.raises(RuntimeError, match=r"^blocks 4: 1 of 3 blocks have scores"):
        pruner.step()
    assert all(scores.isnan().all() for scores in pruner.scores().values())


def test_a_block_that_another_minibatch_did_not_reach_is_still_broken():
    model, x = built("basic")
    _, pruner = make(model, x, "taylor_fo", params=0.6, every=2, per_step=1)
    blocks = pruner._minibatches.blocks
    for first, then in ((torch.inf, torch.nan), (torch.nan, torch.inf)):
        blocks.drop()
        blocks.take(torch.tensor([1.0, first, torch.nan], dtype=torch.float64), 1)
        blocks.take(torch.tensor([1.0, then, 1.0], dtype=torch.float64), 1)
        with pytest.raises(RuntimeError, match=r"^blocks 4: 1 of 3 blocks have scores"):
            blocks.check_finite()


def test_blocks_without_a_gradient_stay_and_are_named_where_nothing_else_can_go():
    model, x = built("basic")
    _, pruner = make(model, x, "taylor_fo_gate", params=0.3, per_step=1, min_filters=10**6)
    hooks = [  # gradients pass these two by
        model[n].bn2.register_forward_hook(lambda module, args, output: output.detach())
        for n in (3, 4)
    ]
    weighted(model, x)
    assert pruner.step().blocks == ("5",)
    weighted(model, x)
    before = copy.deepcopy(model.state_dict())
    words = r"^blocks 3, 4: they alone could go, and none has a score"
    with (
        pytest.warns(UserWarning, match=r"no gradient reaches the output of 3\.conv2, 4\.conv2"),
        pytest.raises(RuntimeError, match=words),
    ):
        pruner.step()
    assert pruner.blocks == ("3", "4")
    assert len(pruner.history) == 1
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    for hook in hooks:
        hook.remove()
    weighted(model, x)
    assert len(pruner.step().blocks) == 1


class Words(nn.Module):
    """A stream that an embedding makes, which is not scored, and that two branches write."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.body = nn.Sequential(Feed(WIDTH), Feed(WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.embed(x))))


def test_a_stream_whose_scored_layers_have_all_gone_is_named_by_what_reads_it():
    torch.manual_seed(0)
    model, x = Words(), torch.randint(11, (4, 5))
    with torch.no_grad():
        for branch in model.body:
            branch.down.weight.mul_(1e-7), branch.down.bias.mul_(1e-7)
    pruner = Pruner(model, x, "taylor_fo", params=0.1, every=1, per_step=16, blocks=True)
    while pruner.blocks:
        weighted(model, x)
        pruner.step()
    assert not pruner.done
    weighted(model, x)
    words = r"^params: cannot be reached without input channels of head, which .*with their blocks"
    with pytest.raises(RuntimeError, match=words):
        pruner.step()
