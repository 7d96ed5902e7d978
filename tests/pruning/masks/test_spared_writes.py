"""Masked entries are written before a forward pass only where they may have changed."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.backends import native
from taylor_kernels.pruning.masks.held_entries import HeldEntries

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "Nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=False),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01, foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
}


natively = pytest.mark.skipif(
    not native.plans_calls, reason="the native module cannot view tensors of this PyTorch"
)


class Trained:
    """A random network, and what a pruner has masked in it by now.

    Attributes:
        held: name -> where a parameter or statistic is masked, and the values there.
    """

    def __init__(self, seed: int, optimizer: str = "SGD") -> None:
        torch.manual_seed(seed)
        widths = torch.randint(4, 9, (3,)).tolist()
        layers: list[nn.Module] = []
        for before, behind in zip([3, *widths], widths, strict=False):
            layers += [nn.Conv2d(before, behind, 3, padding=1), nn.BatchNorm2d(behind), nn.ReLU()]
        self.model = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4)
        )
        for parameter in self.model.parameters():
            nn.init.normal_(parameter)
        self.x = torch.randn(5, 3, 6, 6)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.step()  # statistics and the optimizer's state are no zeros
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.pruner = tk.Pruner(
            self.model, self.x, "magnitude_l2", filters=0.5, every=1, per_step=0.5,
            optimizer=self.optimizer,
        )  # fmt: skip
        while not self.pruner.done:
            self.pruner.step()
        self.held = {}
        for name, value in self.model.state_dict().items():
            there = value != before[name]
            assert set(value[there].tolist()) <= {0.0, 1.0}  # pruning changes nothing else
            if there.any():
                self.held[name] = there, value[there]
        assert any(name.endswith("running_var") for name in self.held)

    def backward(self) -> None:
        self.model(self.x).square().mean().backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def check(self) -> None:
        tensors = self.model.state_dict()
        for name, (there, values) in self.held.items():
            assert torch.equal(tensors[name][there], values), name

    def writes(self) -> int:
        """How often all entries have been written around forward passes and behind steps."""
        hooks = self.model._forward_pre_hooks.values()
        (held,) = (part for hook in hooks for part in hook._arguments if type(part) is HeldEntries)
        return held._native.writes


def data_written(one: Trained) -> None:
    for parameter in one.model.parameters():
        parameter.data.add_(torch.randn_like(parameter))


def one_written(one: Trained) -> None:
    """The weight of one layer, wherever it is masked."""
    names = [name for name in one.held if name.endswith("weight")]
    name = names[int(torch.randint(len(names), ()))]
    one.model.get_parameter(name).data.normal_()


def data_replaced(one: Trained) -> None:
    for parameter in one.model.parameters():
        parameter.data = torch.randn_like(parameter)


def numpy_written(one: Trained) -> None:
    for parameter in one.model.parameters():
        parameter.detach().numpy()[...] = 2.0


def not_a_number(one: Trained) -> None:
    for parameter in one.model.parameters():
        parameter.data.fill_(torch.nan)


def loaded(one: Trained) -> None:
    one.model.load_state_dict({n: torch.rand_like(v, dtype=torch.float) + 1
                               for n, v in one.model.state_dict().items()})  # fmt: skip


def assigned(one: Trained) -> None:
    new = {n: (torch.rand(v.shape) + 1).to(v.dtype) for n, v in one.model.state_dict().items()}
    one.model.load_state_dict(new, assign=True)


def averaged(one: Trained) -> None:
    """Average weights are swapped in, as moving averages are for an evaluation."""
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.lerp_(torch.randn_like(parameter), 0.5)


def one_entry(one: Trained) -> None:
    """PyTorch is told of this write, of a single masked entry."""
    name = [*one.held][int(torch.randint(len(one.held), ()))]
    there, _ = one.held[name]
    places = there.nonzero()
    place = places[int(torch.randint(len(places), ()))]
    with torch.no_grad():
        one.model.state_dict(keep_vars=True)[name][tuple(place)] = 3.0


def statistics_written(one: Trained) -> None:
    """One of their entries, which PyTorch is not told of."""
    name = "1.running_var"
    there, _ = one.held.get(name, (torch.ones(1, dtype=torch.bool), None))
    one.model.get_buffer(name).data[there.nonzero()[0]] = 3.0


def by_hand(one: Trained) -> None:
    one.backward()
    for parameter in one.model.parameters():
        parameter.data.sub_(parameter.grad + torch.randn_like(parameter))


def replaced(one: Trained) -> None:
    layer = one.model[0]
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def flattened(one: Trained) -> None:
    vector = torch.nn.utils.parameters_to_vector(one.model.parameters())
    torch.nn.utils.vector_to_parameters(torch.randn_like(vector), one.model.parameters())


def evaluated(one: Trained) -> None:
    one.model.eval()
    with torch.no_grad():
        one.model(one.x)
    one.model.train()


def trained(one: Trained) -> None:
    one.step()
    one.check()


EVENTS = (
    data_written, one_written, data_replaced, numpy_written, not_a_number, loaded, assigned,
    averaged, one_entry, statistics_written, by_hand, replaced, flattened, evaluated, trained,
)  # fmt: skip


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    optimizer=st.sampled_from([*OPTIMIZERS]),
    events=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=6),
)
@pytest.mark.usefixtures("way")
def test_a_forward_pass_sees_masked_entries_whatever_was_written(seed, optimizer, events):
    one = Trained(seed, optimizer)
    for event in events:
        one.step()
        one.check()
        event(one)
        one.model(one.x)
        one.check()


@natively
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_loop_that_only_steps_writes_once_a_step(optimizer):
    one = Trained(1, optimizer)
    one.step()
    for passes in (1, 2, 3):
        before = one.writes()
        one.optimizer.zero_grad()
        for _ in range(passes):
            one.backward()
            evaluated(one)
        one.optimizer.step()
        assert one.writes() == before + 1  # behind the step
        one.check()


@natively
def test_loops_without_an_optimizer_write_at_every_pass():
    one = Trained(2)
    for _ in range(3):
        before = one.writes()
        by_hand(one)
        assert one.writes() == before + 1
    one.step()
    one.model(one.x)
    by_hand(one)
    before = one.writes()
    for _ in range(3):  # what has written past PyTorch once may do so again
        one.model(one.x)
    assert one.writes() == before + 3


@natively
def test_an_optimizer_of_other_parameters_spares_no_write():
    """They may be copies, which are copied back when it has made its step."""
    one = Trained(3)
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in one.model.parameters()]
    optimizer = torch.optim.SGD(copies, 0.1)
    copies[0].grad = torch.ones_like(copies[0])
    optimizer.step()
    before = one.writes()
    one.model(one.x)
    assert one.writes() == before + 1


@natively
def test_memory_of_several_processes_is_written_at_every_pass():
    one = Trained(4)
    one.model.share_memory()
    for _ in range(3):
        one.step()
        before = one.writes()
        one.model(one.x)
        assert one.writes() == before + 1


@natively
def test_a_copy_neither_looks_nor_writes():
    one = Trained(5)
    one.step()
    before, other = one.writes(), copy.deepcopy(one.model)
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    other(one.x)
    assert all(parameter.all() for parameter in other.parameters())
    assert one.writes() == before


def held(tensor: Tensor, parts: list) -> tuple[nn.Module, HeldEntries]:
    model = nn.Module()
    model.register_buffer("b", tensor)
    found = HeldEntries({"b": [(dim, torch.tensor(index), value) for dim, index, value in parts]})
    found.write(model, last=True)
    return model, found


@natively
@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_looks_come_by_every_entry(data, seed):
    """The way to them, of any dimension of a tensor, is not much longer than they are many."""
    torch.manual_seed(seed)
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    dim = data.draw(st.integers(0, len(sizes) - 1))
    some = st.lists(st.integers(0, sizes[dim] - 1), unique=True, min_size=1)
    index = sorted(data.draw(some))
    kind = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    form = torch.channels_last if len(sizes) == 4 else torch.contiguous_format
    tensor = torch.randn(sizes).to(kind).contiguous(memory_format=form)
    model, found = held(tensor, [(dim, index, 0.0)])
    place = [int(torch.randint(size, ())) for size in sizes]
    place[dim] = index[int(torch.randint(len(index), ()))]
    many = tensor.numel() // sizes[dim]
    value = data.draw(st.sampled_from([1.0, -1e-30, torch.nan, torch.inf]))
    for _ in range(20):
        found.write(model, look=True)
    assert found._native.writes == 1
    model.b.data[tuple(place)] = value
    looks = 0
    while found._native.writes == 1:
        found.write(model, look=True)
        looks += 1
        assert looks <= 4 * many
    assert not model.b[tuple(place)]


@natively
def test_tensors_without_a_version_are_written():
    with torch.inference_mode():
        tensor = torch.ones(40, 40)
    model, found = held(tensor, [(0, [1, 3], 0.0)])
    found.write(model, look=True)
    assert found._native.writes == 2


@natively
@pytest.mark.parametrize("way", ["another tensor", "other memory"])
def test_what_lies_elsewhere_is_written_whole(way):
    """One changed entry of many would be looked at late, and no version says anything of it."""
    for place in torch.randint(40, (5,)).tolist():
        model, found = held(torch.randn(40, 30), [(1, [3, 4, 17], 0.0)])
        other = model.b.clone()
        other.data[place, 17] = 1.0
        if way == "another tensor":
            model.b = other
        else:
            model.b.data = other
        found.write(model, look=True)
        assert not model.b[:, [3, 4, 17]].any()
