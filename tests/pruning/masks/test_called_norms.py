"""Norms across channels that code calls as functions, beside other things that it does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import taylor_kernels as tk
from tests.zoo import judging


def helper(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


#: How the code of a block normalises, given the block and a number of one of its norms.
HOW: dict[str, Callable[[nn.Module, Tensor, int], Tensor]] = {
    "bare": lambda block, x, _: F.layer_norm(x, x.shape[-1:]),
    "scaled": lambda block, x, n: F.layer_norm(x, x.shape[-1:], block.gains[n], block.shifts[n]),
    "by name": lambda block, x, n: F.layer_norm(
        input=x, normalized_shape=list(block.shifts[n].shape), bias=block.shifts[n]
    ),
    "rms": lambda block, x, n: F.rms_norm(x, (len(block.gains[n]),), weight=block.gains[n]),
    "of torch": lambda block, x, n: torch.layer_norm(x, block.shape, block.gains[n]),
    "an attribute": lambda block, x, n: F.rms_norm(x, (block.width,)),
    "helper": lambda block, x, _: helper(x),
}


class Block(nn.Module):
    """A branch of a residual stream, with a norm of the stream and one of what is inside."""

    def __init__(self, width: int, hidden: int, how: tuple[str, str], inner: nn.Module) -> None:
        super().__init__()
        self.how, self.width, self.shape = how, width, (width,)
        self.gains = nn.ParameterList([torch.rand(n) + 0.5 for n in (width, hidden)])
        self.shifts = nn.ParameterList([torch.randn(n) for n in (width, hidden)])
        self.up, self.inner, self.down = nn.Linear(width, hidden), inner, nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.up(HOW[self.how[0]](self, x, 0)))
        return x + self.down(HOW[self.how[1]](self, y.tanh(), 1))


class Network(nn.Module):
    """Its own code normalises what goes in and comes out, and a block what it is given."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.read, self.block, self.leave = nn.Linear(3, width), block, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(helper(self.block(helper(self.read(x)))))


INSIDE = [how for how in HOW if how not in ("of torch", "an attribute")]  # as wide as the stream


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(4, 12), st.integers(4, 12), st.sampled_from(list(HOW)), st.sampled_from(INSIDE),
    st.booleans(), st.floats(0.65, 0.85),
)  # fmt: skip
def test_masked_is_removed_whatever_code_calls(width, hidden, outer, inner, same, kept):
    hidden = width if same else hidden
    model = Network(Block(width, hidden, (outer, inner), nn.Identity()), width)
    x = torch.randn(4, 5, 3)
    pruner, optimizer = judging.new_pruner(model, x, kept)
    assert set(pruner.skipped) == {"leave"}
    verdict = judging.prune(model, x, pruner, optimizer)
    assert verdict.reached
    assert verdict.error < 1e-12
    assert all(torch.isfinite(p).all() for p in model.parameters())


def pruned_to(model: nn.Module, x: Tensor, kept: float) -> tk.Pruner:
    pruner, _ = judging.new_pruner(model, x, kept)
    while not pruner.done:
        judging.loss(model, x).backward()
        pruner.step()
    model.eval()
    return pruner


def new(inner: nn.Module | None = None, width: int = 8) -> tuple[Network, Tensor]:
    block = Block(width, 8, ("scaled", "bare"), inner or nn.Identity())
    return Network(block, width).double(), torch.randn(4, 5, 3, dtype=torch.double)


def test_modules_inside_that_call_norms_of_the_same_width_are_left_alone():
    """Theirs are over what no unit goes of."""

    class Fixed(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return y + F.layer_norm(torch.linspace(-1, 1, 8, dtype=y.dtype), (8,)).square().sum()

    model, x = new(Fixed())
    pruner = pruned_to(model, x, 0.7)
    with torch.no_grad():
        masked = model(x)
        pruner.compact()
        torch.testing.assert_close(model(x), masked, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["copied", "pickled", "compiled"])
def test_other_forms_of_a_masked_model_return_what_it_does(how):
    model, x = new()
    pruned_to(model, x, 0.7)
    other = {
        "copied": copy.deepcopy,
        "pickled": lambda m: pickle.loads(pickle.dumps(m)),
        "compiled": lambda m: torch.compile(m, backend="eager"),
    }[how](model)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_removed_network():
    model, x = new()
    pruner = pruned_to(model, x, 0.7)

    def squares() -> list[Tensor]:
        model.zero_grad()
        judging.loss(model, x).backward()
        return [p.grad.square().sum() for p in model.parameters() if p.grad is not None]

    masked = squares()
    pruner.compact()
    torch.testing.assert_close(squares(), masked, rtol=1e-9, atol=1e-12)


def test_an_error_in_the_model_leaves_no_mode_behind():
    class Failing(nn.Module):
        fails = False

        def forward(self, y: Tensor) -> Tensor:
            if self.fails:
                raise KeyError("none")
            return y

    model, x = new(Failing())
    pruned_to(model, x, 0.7)
    Failing.fails = True
    with pytest.raises(KeyError):
        model(x)
    Failing.fails = False
    assert not torch.overrides._get_current_function_mode_stack()
    model(x)


def test_a_run_that_goes_another_way_says_so():
    class Turning(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = F.layer_norm(self.down.weight, (8,)) if self.turned else None
            return super().forward(x if y is None else x + y.mean())

        turned = False

    model = Network(Turning(10, 8, ("scaled", "bare"), nn.Identity()), 10)
    x = torch.randn(4, 5, 3)
    pruned_to(model, x, 0.7)
    model.block.turned = True
    with pytest.raises(RuntimeError, match=r"Turning .* masked calls layer_norm in line \d+ where"):
        model(x)


def test_norms_in_another_order_are_told_by_their_places():
    """Both are of eight channels, of which others are masked."""

    class Branches(nn.Module):
        turned = False

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 8), nn.Linear(3, 8)
            self.leave = nn.Linear(16, 2)

        def first(self, x: Tensor) -> Tensor:
            return F.layer_norm(self.one(x), (self.one.out_features,))

        def forward(self, x: Tensor) -> Tensor:
            if self.turned:
                two, one = helper(self.two(x)), self.first(x)
            else:
                one, two = self.first(x), helper(self.two(x))
            return self.leave(torch.cat([one, two], -1))

    def run(model: nn.Module, turned: bool) -> Tensor:
        model.turned = turned
        with torch.no_grad():
            return model(x)

    model, x = nn.Sequential(Branches()), torch.randn(4, 3)
    pruned_to(model, x, 0.7)
    run(model[0], turned=False)
    # `helper` is called from another line then, about which nothing is known.
    with pytest.raises(RuntimeError, match=r"Branches .* masked calls rms_norm in line \d+ where"):
        run(model[0], turned=True)

    class Mapped(Branches):
        def forward(self, x: Tensor) -> Tensor:
            parts = [lambda: helper(self.two(x)), lambda: self.first(x)]
            found = [part() for part in (parts if self.turned else reversed(parts))]
            return self.leave(torch.cat(found if not self.turned else found[::-1], -1))

    model = nn.Sequential(Mapped())
    pruned_to(model, x, 0.7)
    torch.testing.assert_close(run(model[0], turned=True), run(model[0], turned=False))


@pytest.mark.parametrize("literal", [True, False])
def test_a_number_that_is_no_attribute_keeps_what_is_normalised_over_it(literal):
    width = 9

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + F.layer_norm(x, (9,) if literal else (width,)).tanh()

    model = nn.Sequential(nn.Linear(3, 9), Constant(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 2))
    judging.check_all_but(["0", "4"], model, torch.randn(4, 3))


def test_calls_of_other_channels_in_each_run_of_a_module_keep_these():
    """Which of them are masked cannot be told by the number of the call."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = Shared()
            self.one, self.two = nn.Linear(3, 8), nn.Linear(3, 8)
            self.leave = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(torch.cat([self.shared(self.one(x)), self.shared(self.two(x))], -1))

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(3, 5)

        def forward(self, y: Tensor) -> Tensor:
            return F.layer_norm(y, y.shape[-1:]) * self.read(y[..., :0].sum() + torch.ones(3)).sum()

    found = tk.trace(Twice(), torch.randn(4, 3)).skipped
    assert "mixed with other channels (layer_norm in 'shared')" in found["one"]
    assert "mixed with other channels (layer_norm in 'shared')" in found["two"]


class Checkpointed(nn.Module):
    """Runs a method that normalises once more in backward(), always or in training alone."""

    def __init__(self, reentrant: bool, always: bool) -> None:
        super().__init__()
        self.reentrant, self.always = reentrant, always
        self.enter, self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def part(self, x: Tensor) -> Tensor:
        return self.down(F.layer_norm(self.up(x), (self.up.out_features,)).tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.always or self.training:
            return checkpoint(self.part, x, use_reentrant=self.reentrant)
        return self.part(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("always", [True, False])
def test_what_a_checkpoint_runs_again_is_never_run_unmasked(reentrant, always):
    """Gradients would be of another pass than the loss."""
    model = nn.Sequential(Checkpointed(reentrant, always), nn.Linear(8, 2))
    x, kept = torch.randn(16, 3), ["0.enter", "0.down"]
    if always:
        with pytest.raises(ValueError, match="inside of a checkpoint"):
            tk.Pruner(model, x, filters=0.8, ignore=kept)
        return
    pruner = tk.Pruner(model, x, "taylor_fo", filters=0.8, every=1, per_step=1, ignore=kept)
    model.train()
    model(x).square().sum().backward()
    pruner.step()  # masks one unit
    with pytest.raises(RuntimeError, match=r"inside of a checkpoint.*compact\(\) first"):
        model(x)
    pruner.compact()
    model(x).square().sum().backward()


def test_a_wrapper_around_forward_that_comes_later_is_no_other_place():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.last(F.layer_norm(self.first(x), (self.first.out_features,)))

    model, x = Normed().double(), torch.randn(6, 4).double()
    pruner = tk.Pruner(model, x[:1], "taylor_fo", filters=0.5, every=1, per_step=0.5)
    model(x).square().mean().backward()
    assert pruner.step().done
    masked, forward = model(x), model.forward
    model.forward = lambda *args: forward(*args)
    assert torch.equal(model(x), masked)
