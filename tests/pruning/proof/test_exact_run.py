"""Runs of the proof: on a part of the example, with the operations that PyTorch would run."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taylor_kernels.pruning import Pruner, prunable
from taylor_kernels.pruning.copies import copied
from taylor_kernels.pruning.proof.exact_run import InDouble, SmallPools
from taylor_kernels.pruning.proof.trial import Trial
from taylor_kernels.tracing import trace
from tests.tracing.parts import Apply


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, stride=1, padding=1), nn.AvgPool2d(7)],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_pools_fit_whatever_is_left_of_an_image(pool, size):
    with SmallPools():
        out = pool(torch.ones(1, 2, size, size))
    assert out.numel()
    if pool.padding:
        assert torch.equal(out, pool(torch.ones(1, 2, size, size)))


@pytest.mark.parametrize("seed", range(30))
def test_groups_that_run_at_once_are_the_convolution(seed):
    draw = random.Random(seed)
    dims, groups = draw.choice([1, 2, 2, 3]), draw.choice([1, 2, 3, 6])
    ins, outs = groups * draw.randint(1, 3), groups * draw.randint(1, 3)
    kernel, dilation = draw.randint(1, 3), draw.randint(1, 2)
    sizes = [draw.randint(dilation * (kernel - 1) + 1, 9) for _ in range(dims)]
    layer = getattr(nn, f"Conv{dims}d")(
        ins, outs, kernel, draw.randint(1, 3), draw.choice([0, 1, 2, "valid"]), dilation, groups,
        bias=draw.random() < 0.5,
    ).double()  # fmt: skip
    x = torch.randn(draw.randint(0, 3), ins, *sizes, dtype=torch.float64)
    if draw.random() < 0.3 and dims == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = layer(x)
    with InDouble():
        found = layer(x)
    # Sums of at most 81 products of numbers below ten: rounding is below 1e-12.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("wrong", ["groups", "weight", "bias"])
def test_groups_that_do_not_fit_are_refused_as_ever(wrong):
    layer = nn.Conv2d(4, 4, 1, groups=2).double()
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    if wrong == "groups":
        layer.groups = 4
    elif wrong == "weight":
        layer.weight = nn.Parameter(layer.weight[:3])
    else:
        layer.bias = nn.Parameter(layer.bias[:3])
    with InDouble(), pytest.raises(RuntimeError):
        layer(x)


#: What PyTorch makes in the default precision, by one way or another.
COUNTS, TRUTH = torch.arange(1, 7).reshape(2, 3), torch.tensor([[True, False, True]])
DEFAULTS = {
    "zeros": lambda: torch.zeros(3),
    "ones": lambda: torch.ones(2, 2),
    "full": lambda: torch.full((2,), 0.1),
    "empty": lambda: torch.empty(3).fill_(0.1),
    "eye": lambda: torch.eye(3),
    "arange": lambda: torch.arange(0, 1, 0.1),
    "linspace": lambda: torch.linspace(0, 1, 7),
    "logspace": lambda: torch.logspace(0, 1, 7),
    "hann_window": lambda: torch.hann_window(7),
    "tensor": lambda: torch.tensor([0.1, 3]),
    "tensor of a complex number": lambda: torch.tensor(0.1j),
    "as_tensor": lambda: torch.as_tensor(0.1),
    "scalar_tensor": lambda: torch.scalar_tensor(3),
    "rand": lambda: torch.rand(4, generator=torch.Generator().manual_seed(3)) * 0 + 0.1,
    "normal": lambda: torch.normal(0.1, 0.0, (3,)),
    "a layer": lambda: nn.Linear(2, 3, bias=False).weight.detach() * 0 + 0.1,
    "mask of a transformer": lambda: nn.Transformer.generate_square_subsequent_mask(3),
    "new_tensor": lambda: TRUTH.new_tensor([0.1], dtype=torch.get_default_dtype()),
    "integers / integers": lambda: COUNTS / (COUNTS + 2),
    "a number / integers": lambda: 0.1 / COUNTS,
    "integers * a number": lambda: COUNTS * 0.1,
    "integers + a complex number": lambda: COUNTS + 0.1j,
    "truth values * a number": lambda: TRUTH * 0.1,
    "truth values / a number": lambda: TRUTH / 3,
    "a number ** integers": lambda: 0.1**COUNTS,
    "integers ** a number": lambda: COUNTS**0.1,
    "sqrt": lambda: COUNTS.sqrt(),
    "exp beyond float32": lambda: (COUNTS * 100).exp(),
    "sigmoid": lambda: torch.sigmoid(COUNTS),
    "atan2": lambda: torch.atan2(COUNTS, COUNTS + 1),
    "where, of numbers": lambda: torch.where(TRUTH, 0.1, 0.3),
    "where, of integers and a number": lambda: torch.where(TRUTH, COUNTS, 0.1),
    "clamp": lambda: COUNTS.clamp(max=1.1),
    "result_type": lambda: COUNTS.to(torch.result_type(COUNTS, 0.1)) / 3,
}


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.dtype in (torch.float64, torch.complex128)
    assert torch.equal(found, expected)


@pytest.fixture
def default_of_64_bits():
    """Sets the default precision of the process, for references."""
    before = torch.get_default_dtype()

    def made(make):
        torch.set_default_dtype(torch.float64)
        try:
            return make()
        finally:
            torch.set_default_dtype(before)

    return made


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("make", DEFAULTS.values(), ids=DEFAULTS)
def test_the_default_precision_is_double_and_stays_what_it_is(make, below, default_of_64_bits):
    expected = default_of_64_bits(make)
    with InDouble(below=below):
        found = make()
        assert torch.get_default_dtype() is torch.float32
    same(found, expected)
    assert make().dtype in (torch.float32, torch.complex64)


def test_integers_and_given_precision_stay():
    x = torch.randn(3, dtype=torch.float64)
    with InDouble():
        assert torch.arange(3).dtype == torch.full((2,), 3).dtype == torch.int64
        assert COUNTS.sum().dtype == (COUNTS * 2).dtype == torch.int64
        assert (COUNTS > 0.5).dtype == torch.bool
        assert torch.zeros(3, dtype=torch.int32).dtype == torch.int32
        assert torch.zeros_like(x).dtype == x.new_zeros(3).dtype == torch.float64


@torch.jit.script
def positions(x: Tensor) -> Tensor:
    """Of scripted code, whose operations no mode for functions sees: a product with x."""
    places = torch.arange(x.size(1)) / 10 + torch.linspace(0, 1, x.size(1))
    return x * 0 + x @ torch.diag(places.sqrt())


UNSEEN = {
    "scripted": positions,
    "torch.Tensor": lambda x: F.linear(x, torch.Tensor(x.size(1), x.size(1)).fill_(0.1)),
    "a list in torch.Tensor": lambda x: x @ torch.Tensor([[0.5] * 4] * 4),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("make", UNSEEN.values(), ids=UNSEEN)
def test_what_no_mode_for_functions_sees_is_double_below(make, default_of_64_bits):
    x = torch.randn(2, 4, dtype=torch.float64)
    expected = default_of_64_bits(lambda: make(x))
    with InDouble(below=True):
        found = make(x)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("make", UNSEEN.values(), ids=UNSEEN)
def test_a_model_with_such_code_is_proven_in_double(make):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(make(x)).relu())

    model, x = Model().eval(), torch.randn(2, 4)
    trial = Trial(copied(model), model, x, trace(model, x), False)
    assert [out.dtype for out in trial._run.outputs().outputs] == [torch.float64]
    assert trial._run.exact


def _made_when_narrow(module: nn.Module, x: Tensor) -> Tensor:
    """Code that makes a tensor in the default precision once it has lost a channel."""
    return x if x.size(1) == 8 else torch.einsum("nchw,cd->ndhw", x, torch.eye(x.size(1)))


@pytest.mark.parametrize(
    ("middle", "idle"),
    [
        (lambda module, x: x.relu(), True),
        (lambda module, x: x.float(), False),
        (lambda module, x: x * torch.ones(8, 1, 1)[: x.size(1)], False),
        (lambda module, x: F.avg_pool2d(x, 40), False),
        (lambda module, x: x + torch.zeros_like(x, dtype=torch.float32), False),
        (_made_when_narrow, False),
    ],
    ids=["plain", "cast", "made", "pooled", "asked for", "made when narrow"],
)
def test_a_mode_that_has_nothing_to_do_is_left_out_and_comes_back(middle, idle, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Apply(middle), nn.Conv2d(8, 2, 1))
    trials = []
    monkeypatch.setattr(prunable, "Trial", lambda *args: trials.append(Trial(*args)) or trials[-1])
    pruner = Pruner(model, torch.randn(1, 3, 64, 64), "magnitude_l2", filters=0.9)
    assert list(pruner.widths) == ["0"]
    assert trials[0]._run.idle is idle
