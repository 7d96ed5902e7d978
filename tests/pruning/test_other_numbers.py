"""Models whose numbers are complex or quantised: pruned rightly, or one clear error."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.pruning import Pruner


class Complex(nn.Module):
    """Complex layers, gated by how large their numbers are; `between` is what code does to them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        width, self.between = random.randint(6, 10), between
        self.enter = nn.Linear(4, width, dtype=torch.complex64)
        self.mix = nn.Linear(width, 7, dtype=torch.complex64)
        self.leave = nn.Linear(7, 2, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.enter(x))
        y = self.mix(y * y.abs().tanh())
        return self.leave(torch.complex(y.real.tanh(), y.imag.relu()))


class Fourier(nn.Module):
    """Real layers, and a complex weight for the frequencies of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(6, 2)
        self.filters = nn.Parameter(torch.randn(8, 6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        found = torch.einsum(
            "btc,cd->btd", torch.fft.fft(self.enter(x).tanh(), dim=1), self.filters
        )
        return self.leave(torch.fft.ifft(found, dim=1).real.relu())


class Quantised(nn.Module):
    """A quantised layer between others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.before, self.after = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(5, 7)
        self.middle, self.leave = torch.ao.nn.quantized.dynamic.Linear(6, 5), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.before(self.first(x).relu()).relu())
        return self.leave(self.after(y).relu())


class Rounded(nn.Module):
    """Activations that are quantised and back."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.quantize_per_tensor(self.enter(x).relu(), 0.05, 0, torch.quint8)
        return self.leave(y.dequantize())


def check_pruned(model: nn.Module, x: Tensor, criterion: str) -> Pruner:
    """Prune to half of the filters: what is left does what the masked model did."""
    pruner = Pruner(model, x, criterion, filters=0.6, every=1, per_step=0.2)
    while not pruner.done:
        model.zero_grad()
        model(x).abs().square().sum().backward()
        pruner.step()
    masked = model(x)
    torch.testing.assert_close(pruner.compact()(x), masked, rtol=1e-5, atol=1e-6)
    assert sum(pruner.widths.values()) <= 0.6 * sum(pruner.original_widths.values())
    return pruner


def check_refused(model: nn.Module, x: Tensor, criterion: str, message: str) -> None:
    """One error of one line, and the model is as it was."""
    before = {key: copy.deepcopy(value) for key, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message) as error:
        Pruner(model, x, criterion, filters=0.6)
    assert "\n" not in str(error.value)
    assert model.training
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, before[key]), key
            assert value.dtype == before[key].dtype


@pytest.mark.parametrize("criterion", ["magnitude_l1", "magnitude_l2"])
def test_complex_layers(criterion):
    x = torch.randn(3, 4, dtype=torch.complex64)
    pruner = check_pruned(Complex(), x, criterion)
    assert set(pruner.original_widths) == {"enter", "mix"}


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "taylor_fo_gate", "obd_fisher"])
def test_complex_layers_under_criteria_of_real_ones(criterion):
    x = torch.randn(3, 4, dtype=torch.complex64)
    check_refused(
        Complex(), x, criterion, "nothing to prune.*enter: its weights are complex.*magnitude_l2"
    )


#: What code does with a complex stream that is another thing once it is narrower.
SEES_THE_WIDTH = {
    "turned by the width": lambda y: y * torch.exp(torch.tensor(1j * y.size(-1))),
    "scaled by the width in its imaginary part": lambda y: torch.complex(
        y.real, y.imag / y.size(-1)
    ),
}


@pytest.mark.parametrize("between", SEES_THE_WIDTH.values(), ids=SEES_THE_WIDTH)
def test_the_proof_compares_complex_numbers(between):
    """Turned numbers are as large as before: a proof that compared sizes alone would let it go."""
    x = torch.randn(3, 4, dtype=torch.complex64)
    pruner = Pruner(Complex(between), x, "magnitude_l2", filters=0.9)
    assert set(pruner.widths) == {"mix"}
    assert "enter" in pruner.skipped
    blind = Pruner(Complex(between), x, "magnitude_l2", filters=0.9, verify=False)
    assert set(blind.widths) == {"enter", "mix"}


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "magnitude_l2"])
def test_a_complex_weight_between_real_layers(criterion):
    pruner = check_pruned(Fourier(), torch.randn(3, 5, 4), criterion)
    assert "enter" in pruner.original_widths
    complex_too = "filters" in pruner.original_widths
    assert complex_too == (criterion != "taylor_fo")
    assert complex_too or "complex" in pruner.skipped["filters"]


@pytest.mark.parametrize("criterion", ["taylor_fo", "magnitude_l2"])
def test_a_quantised_layer_stays_with_what_it_reads(criterion):
    pruner = check_pruned(Quantised(), torch.randn(3, 4), criterion)
    assert set(pruner.original_widths) == {"first", "after"}
    assert "linear_dynamic in 'middle'" in pruner.skipped["before"]


def test_gates_before_a_quantised_layer_are_told_to_have_no_gradient():
    x = torch.randn(3, 4)
    model, options = Quantised(), dict(filters=0.6, every=1)
    pruner = Pruner(model, x, "taylor_fo_bn", **options)
    with pytest.raises(RuntimeError, match=r"first: .* passes no gradient back.*ignore="):
        model(x).square().sum().backward()
    pruner.close()
    # What it says to do is enough.
    pruner = Pruner(model, x, "taylor_fo_bn", ignore=["first"], **options)
    model(x).square().sum().backward()
    assert pruner.step().removed


def test_quantised_activations():
    check_refused(
        Rounded(), torch.randn(3, 4), "magnitude_l2", "enter: goes through.*quantize_per_tensor"
    )
