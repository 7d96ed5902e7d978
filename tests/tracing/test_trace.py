"""The call itself: inputs and outputs of any make, bad input, and a model left as it was."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from taylor_kernels.tracing import trace


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 2, 1)
    )


IMAGE = torch.randn(2, 3, 8, 8)


class Stateful(nn.Module):
    """Writes into its buffers and attributes in every forward pass, and hooks itself in the first.

    transformers does that to collect hidden states: hooks must not outlive what says that they are
    there.
    """

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("seen", torch.zeros(6))
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None
        self.fail = fail

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "hooked"):
            self.hooked = True
            self.one.register_forward_hook(lambda *_: None, always_call=True)
        x = self.one(x)
        self.seen.mul_(0.9).add_(x.mean(0))
        self.calls = self.calls + 1
        self.last, self.extra = x, torch.rand(3)
        with torch.no_grad():
            self.two.weight[:, 0] = 0
        if self.fail:
            raise RuntimeError("a fault of its own")
        return self.two(x)


def state(model: nn.Module) -> dict:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()
    }
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    return {"tensors": tensors, "rest": (modes, grads, hooks, names)}


@pytest.mark.parametrize("model", [net().train(), Stateful(), Stateful(fail=True)], ids=str)
def test_the_model_and_the_random_state_are_as_they_were(model):
    model[0].eval() if isinstance(model, nn.Sequential) else None
    next(model.parameters()).requires_grad_(False)
    inputs = IMAGE if isinstance(model, nn.Sequential) else torch.randn(2, 4)
    before, given, random = state(model), inputs.clone(), torch.get_rng_state()
    objects = [id(p) for p in (*model.parameters(), *model.buffers())]
    if getattr(model, "fail", False):
        with pytest.raises(ValueError, match=r"example_inputs: .*a fault of its own"):
            trace(model, inputs)
    else:
        trace(model, inputs)
    after = state(model)
    assert after["rest"] == before["rest"]
    assert all(torch.equal(before["tensors"][k], v) for k, v in after["tensors"].items())
    assert [id(p) for p in (*model.parameters(), *model.buffers())] == objects
    assert torch.equal(inputs, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert not torch.nn.modules.module._global_forward_hooks


@dataclass
class Holder:
    __slots__ = ("me", "value")
    value: Tensor
    me: object


class Wrapped(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.net, self.make = net(), make

    def forward(self, x: Tensor, scale: Tensor | None = None) -> object:
        return self.make(self.net(x if scale is None else x * scale))


def looped(y: Tensor) -> object:
    holder = Holder(y, None)
    holder.me = [holder]
    return holder


class Plain:
    pass


def plain(y: Tensor) -> object:
    thing = Plain()
    thing.result, thing.parent = {"y": (y, None)}, thing
    return thing


@pytest.mark.parametrize(
    "make", [lambda y: y, lambda y: {"a": [y, 3]}, looped, plain], ids=range(4)
)
def test_outputs_of_any_container_stay(make):
    channels = trace(Wrapped(make), IMAGE)
    assert channels.skipped == {"net.4": "reaches the output of the model"}


@pytest.mark.parametrize(
    "inputs",
    [IMAGE, (IMAGE,), [IMAGE], {"x": IMAGE}, {"x": IMAGE, "scale": torch.ones(())}],
    ids=range(5),
)
def test_inputs_of_any_make(inputs):
    assert trace(Wrapped(lambda y: y), inputs).groups[0].size == 8


def complex_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6, dtype=torch.cfloat), nn.Linear(6, 2, dtype=torch.cfloat))


class Endless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        while True:
            x = self.one(x)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (nn.ReLU(), IMAGE, ValueError, "model: it has no parameters"),
        (torch.relu, IMAGE, TypeError, "model: expected an nn.Module"),
        (
            nn.Sequential(nn.LazyLinear(3)),
            IMAGE,
            ValueError,
            "model: its parameter '0.weight' is lazy",
        ),
        (nn.Linear(3, 4, device="meta"), IMAGE, ValueError, "on the meta device"),
        (net(), torch.randn(2, 5, 8, 8), ValueError, "example_inputs: the model does not run"),
        (net(), "text", ValueError, "example_inputs: the model does not run"),
        (net(), (IMAGE, IMAGE), ValueError, "example_inputs: the model does not run"),
    ],
    ids=range(7),
)
def test_bad_input_is_said_in_one_sentence(model, inputs, error, message):
    with pytest.raises(error, match=message) as caught:
        trace(model, inputs)
    assert "\n" not in str(caught.value)


def test_it_ends_after_the_time_given():
    with pytest.raises(TimeoutError, match="model: tracing it takes more than"):
        trace(Endless(), torch.randn(1, 4), seconds=0.2)


def test_complex_parameters():
    model = complex_model()
    assert trace(model, torch.randn(2, 4, dtype=torch.cfloat)).groups[0].size == 6


def test_quantised_layers_are_left_out():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2] = torch.ao.nn.quantized.dynamic.Linear(6, 2)
    channels = trace(model, torch.randn(2, 4))
    assert not channels.groups
    assert "not known" in channels.skipped["0"]


def test_inputs_with_nothing_in_them_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(ValueError, match=r"^example_inputs: nothing is in them .*\(0, 3, 4, 4\)"):
        trace(model, torch.randn(0, 3, 4, 4))


def test_a_trace_inside_autocast_is_the_same_again():
    """Which keeps the weights that it has cast."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        sizes = [[group.size for group in trace(model, x).groups] for _ in range(2)]
        assert sizes == [[6], [6]]
        model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
