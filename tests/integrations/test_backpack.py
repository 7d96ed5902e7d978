"""SumGradSquared and BatchL2Grad against BackPACK's own, and against single examples."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.allocation import Largest
from tests.integrations.conftest import library

library("backpack")
from backpack import backpack, extend, extensions  # noqa: E402

from taylor_kernels.integrations import backpack as door  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
N = 5
FIELDS = ("sum_grad_squared", "batch_l2")


def rand(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=torch.float64)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 7, (N, *shape))


#: What both know.
COVERED = {
    "linear": (lambda: nn.Linear(4, 3), rand(4)),
    "tokens": (lambda: nn.Linear(4, 3), rand(6, 4)),
    "few tokens": (lambda: nn.Linear(9, 8), rand(2, 3, 9)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), rand(3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=1), rand(3, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), rand(2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), rand(3, 4, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(4), rand(4, 3, 3)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(4), rand(4)),
    "one token": (lambda: nn.Embedding(7, 3), tokens()),
}
#: What is wrong in BackPACK, an error there, or left out.
BEYOND = {
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), rand(4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, dilation=2), rand(4, 9)),
    "groups in 3-D": (lambda: nn.Conv3d(2, 4, 2, groups=2), rand(2, 3, 3, 3)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), rand(3, 5, 5)),
    "same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), rand(3, 5, 5)),
    "transposed, output padding": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2),
        rand(4, 5, 5),
    ),
    "layer norm": (lambda: nn.LayerNorm((3, 4)), rand(3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), rand(4, 3, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), rand(4, 3, 3)),
    "embedding": (lambda: nn.Embedding(7, 3), tokens(4)),
    "embedding, padded": (lambda: nn.Embedding(7, 3, padding_idx=2), tokens(4, 2)),
}


def model_of(case: tuple) -> nn.Module:
    model = nn.Sequential(case[0](), nn.Flatten()).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module(case[1])
    return model.eval()


def loss_of(y: Tensor) -> Tensor:
    return (y.sin() * torch.linspace(1, 2, y.size(1), dtype=y.dtype)).sum() / N


def fields(source: object, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model = extend(copy.deepcopy(model))
    with backpack(source.SumGradSquared(), source.BatchL2Grad()):
        loss_of(model(x)).backward()
    return {f"{n}.{f}": getattr(p, f) for n, p in model.named_parameters() for f in FIELDS}


def by_loop(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = [torch.autograd.grad(loss_of(model(one)), [*parameters.values()]) for one in x.split(1)]
    every = {
        n: torch.stack(g).square()
        for n, g in zip(parameters, zip(*found, strict=True), strict=True)
    }
    return {
        f"{n}.{field}": value
        for n, squares in every.items()
        for field, value in zip(FIELDS, (squares.sum(0), squares.flatten(1).sum(1)), strict=True)
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert want.abs().max() > 0, name
        assert found[name].shape == want.shape, name
        assert found[name].dtype == want.dtype, name
        assert (found[name] - want).abs().max() <= 1e-12 * want.abs().max(), name


@pytest.mark.parametrize("case", COVERED)
def test_fields_are_those_of_backpack(case):
    model, x = model_of(COVERED[case]), COVERED[case][1]
    same(fields(door, model, x), fields(extensions, model, x))
    same(fields(door, model, x), by_loop(model, x))


@pytest.mark.parametrize("case", BEYOND)
def test_its_faults_are_mended(case):
    model, x = model_of(BEYOND[case]), BEYOND[case][1]
    expected = by_loop(model, x)
    same(fields(door, model, x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError)
        ):
            same(fields(extensions, model, x), expected)


def test_only_parameters_that_are_trained_are_filled():
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double())
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    with backpack(door.SumGradSquared(), door.BatchL2Grad()):
        loss_of(model(rand(3))).backward()
    filled = [n for n, p in model.named_parameters() if hasattr(p, "batch_l2")]
    assert filled == [n for n, p in model.named_parameters() if hasattr(p, FIELDS[0])] == ["0.bias"]


class Block(nn.Module):
    """A module of its own, which has parameters only in what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def run(source: object, model: nn.Module, x: Tensor) -> None:
    with backpack(source.SumGradSquared()):
        loss_of(model(x)).backward()


def test_a_container_is_nothing_to_warn_of_and_an_unknown_kind_is():
    model, x = nn.Sequential(Block(), nn.Flatten()).double(), rand(3, 4, 4)
    with pytest.warns(UserWarning, match=r"extension for Module .*Block"):
        run(extensions, extend(copy.deepcopy(model)), x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Extension saving to")
        found = fields(door, model, x)
    same(found, by_loop(model, x))
    with pytest.warns(UserWarning, match=r"extension for Module .*PReLU"):
        run(door, extend(nn.Sequential(nn.PReLU(), nn.Flatten()).double()), rand(3))


def test_a_recurrent_layer_is_left_to_backpack():
    model = nn.Sequential(nn.LSTM(3, 4, batch_first=True)).double()
    x, found = rand(6, 3), []
    for source in (door, extensions):
        own = extend(copy.deepcopy(model))
        with backpack(source.SumGradSquared(), source.BatchL2Grad()):
            loss_of(own(x)[0].flatten(1)).backward()
        found.append({f"{n}.{f}": getattr(p, f) for n, p in own.named_parameters() for f in FIELDS})
    same(*found)


def test_what_has_no_single_examples_says_so():
    norm = nn.Sequential(nn.BatchNorm1d(3), nn.Flatten()).double()
    with pytest.raises(NotImplementedError, match="training mode"):
        fields(door, norm.train(), rand(3))
    layer = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="called more than once"):
        fields(door, nn.Sequential(layer, nn.Tanh(), layer).double(), rand(3))


def test_a_parameter_of_two_modules_says_so():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    with pytest.raises(RuntimeError, match=r"Linear\.weight: is shared with another"):
        fields(door, nn.Sequential(first, nn.Tanh(), second).double(), rand(3))
    alone = extend(nn.Sequential(first)), extend(nn.Sequential(second))
    with backpack(door.SumGradSquared(), door.BatchL2Grad()):
        for model in alone:  # in a pass each, the field is that of the last
            loss_of(model(rand(3))).backward()


def test_small_gradients_of_tokens_far_from_zero_keep_their_norms():
    tokens, dy = 100 + 0.01 * torch.randn(N, 3, 64), torch.randn(N, 3, 64)
    dy -= dy.mean(1, keepdim=True)
    model = extend(nn.Sequential(nn.Linear(64, 64)))
    with backpack(door.BatchL2Grad()):
        (model(tokens) * dy).sum().backward()
    expected = (dy.double().mT @ tokens.double()).square().sum((1, 2))
    torch.testing.assert_close(model[0].weight.batch_l2.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_of_float32_at_least(dtype):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).to(dtype), rand(3, 6, 6).to(dtype)
    found = fields(door, model, x)
    assert {value.dtype for value in found.values()} == {torch.float32}
    wide = by_loop(model.double(), x.double())
    for name, value in found.items():
        rtol = 1e-4 if dtype == torch.float32 else 0.1
        assert (value - wide[name]).abs().max() <= rtol * wide[name].max(), name


def test_they_are_backpacks_own_kind():
    for name in ("SumGradSquared", "BatchL2Grad"):
        ours, its = getattr(door, name)(), getattr(extensions, name)
        assert isinstance(ours, its)
        assert ours.savefield == its().savefield


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(500, 600, bias=False), (9, 500)),
        (lambda: nn.Linear(500, 600, bias=False), (9, 3, 500)),
        (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (64, 64, 4, 4)),
    ],
    ids=["vectors", "tokens", "convolution"],
)
def test_no_tensor_holds_the_gradients_of_all_examples(layer, shape):
    model, x = extend(nn.Sequential(layer())), torch.randn(shape)
    parameters = model[0].weight.numel()
    with backpack(door.SumGradSquared(), door.BatchL2Grad()):
        loss = model(x).square().sum()
        with Largest() as seen:
            loss.backward()
    assert seen.elements <= max(parameters, 1 << 20) < len(x) * parameters
