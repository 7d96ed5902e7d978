"""Optimizers that wrap others: their state is masked and cut as if they were bare."""

from __future__ import annotations

import copy
import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from taylor_kernels.pruning import Pruner
from tests.helpers import zoo


class SharesGroups(Optimizer):
    """As SAM: the groups are those of the optimizer in it, which has the state."""

    def __init__(self, params, make, **options):
        super().__init__(params, {})
        self.base = make(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


class OwnGroups(Optimizer):
    """As Lookahead: groups and state of its own (slow weights), beside those of the other."""

    def __init__(self, params, make, **options):
        params = list(params)
        super().__init__(params, {})
        self.optimizer = make(params, **options)

    def step(self, closure=None):
        self.optimizer.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow", p.detach().clone())
                with torch.no_grad():
                    self.state[p]["slow"].lerp_(p, 0.5)


class Several(Optimizer):
    """As where weights and the rest have an optimizer each."""

    def __init__(self, params, make, **options):
        params = list(params)
        super().__init__(params, {})
        weights = [p for p in params if p.dim() > 1]
        self.parts = {"all": [make(weights, **options)]}
        self.parts["all"].append(make([p for p in params if p.dim() == 1], **options))
        self.param_groups = [g for part in self.parts["all"] for g in part.param_groups]

    def step(self, closure=None):
        for part in self.parts["all"]:
            part.step(closure)


class Nested(Optimizer):
    """A wrapper of a wrapper, which knows its own inside from both ends."""

    def __init__(self, params, make, **options):
        params = list(params)
        super().__init__(params, {})
        self.inner = SharesGroups(params, make, **options)
        self.inner.outer = self
        self.param_groups = self.inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)


def bare(params, make, **options):
    return make(params, **options)


def pruned(name, wrap, make, **options):
    """Weights, records and the state of the optimizers after pruning with compact() in between."""
    model, inputs = zoo.build(name)
    optimizer = wrap(model.parameters(), make, lr=0.02, **options)
    pruner = Pruner(
        model, inputs, "taylor_fo", filters=0.5, every=2, per_step=3, optimizer=optimizer
    )
    torch.manual_seed(1)
    for step in range(12):
        optimizer.zero_grad()
        zoo.loss(model, zoo.fresh(inputs)).backward()
        pruner.step()
        optimizer.step()
        if step % 5 == 4:
            pruner.compact()
    held = [optimizer, *(vars(optimizer).get(n) for n in ("base", "optimizer", "inner"))]
    held += getattr(optimizer, "parts", {}).get("all", [])
    held += [vars(one).get("base") for one in held if one is not None]
    return model, pruner, [one for one in held if one is not None]


@pytest.mark.sample(6)
@pytest.mark.parametrize("wrap", [SharesGroups, OwnGroups, Several, Nested])
@pytest.mark.parametrize(("make", "options"), [(SGD, {"momentum": 0.9}), (AdamW, {})])
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_a_wrapped_optimizer_is_followed(name, make, options, wrap):
    expected, reference, _ = pruned(name, bare, make, **options)
    model, pruner, optimizers = pruned(name, wrap, make, **options)
    assert pruner.history == reference.history
    assert len(pruner.history) > 2
    for key, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    own = set(model.parameters())
    for one in optimizers:
        assert one.state.keys() <= own
        assert {p for group in one.param_groups for p in group["params"]} <= own
        for parameter, state in one.state.items():
            assert all(t.shape in (parameter.shape, ()) for t in state.values())
    assert sum(len(one.state) for one in optimizers) >= len(own)


def test_what_cannot_be_cut_is_found_inside_too():
    model, inputs = zoo.build("mlp")
    for wrap in (SharesGroups, Nested):
        with pytest.raises(ValueError, match="optimizer: LBFGS keeps one flat history"):
            Pruner(model, inputs, params=0.5, optimizer=wrap([*model.parameters()], LBFGS))

    class Flat(SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["flat"] = torch.zeros(p.numel() + 1)

    optimizer = SharesGroups(model.parameters(), Flat, lr=0.1)
    pruner = Pruner(model, inputs, "taylor_fo", filters=0.5, every=1, optimizer=optimizer)
    optimizer.step()
    cost, widths = pruner.cost, pruner.widths
    for _ in range(2):
        zoo.loss(model, inputs).backward()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"optimizer: its state 'flat' of .* does not follow"):
            pruner.step()
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
        assert (pruner.cost, pruner.widths, pruner.history) == (cost, widths, ())


class InObject(Optimizer):
    """The other optimizer is an attribute of a plain object."""

    def __init__(self, params, make, **options):
        params = list(params)
        super().__init__(params, {})
        self.engine = SimpleNamespace(parts={"all": [make(params, **options)]})
        self.engine.back = self

    def step(self, closure=None):
        return self.engine.parts["all"][0].step(closure)


class InClosure(Optimizer):
    """The other optimizer is known to functions alone."""

    def __init__(self, params, make, **options):
        params = list(params)
        super().__init__(params, {})
        inner = make(params, **options)
        self.run = functools.partial(lambda closure, much: inner.step(closure), much=1)

    def step(self, closure=None):
        return self.run(closure)


@pytest.mark.parametrize("wrap", [InObject, InClosure])
def test_optimizers_in_objects_and_closures_are_followed(wrap):
    expected, reference, _ = pruned("mlp", bare, SGD, momentum=0.9)
    model, pruner, _ = pruned("mlp", wrap, SGD, momentum=0.9)
    assert pruner.history == reference.history
    for key, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


HIDDEN = {}


class InGlobal(SharesGroups):
    """The other optimizer is where nobody finds it."""

    def __init__(self, params, make, **options):
        super().__init__(params, make, **options)
        HIDDEN["inner"] = vars(self).pop("base")

    def step(self, closure=None):
        return HIDDEN["inner"].step(closure)


class Elsewhere(SGD):
    """Keeps its momentum where nobody finds it."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            HIDDEN[p] = torch.zeros_like(p)


def test_hidden_state_is_refused_or_named():
    model, inputs = zoo.build("mlp")
    outer = InGlobal(model.parameters(), SGD, lr=0.1, momentum=0.9)
    pruner = Pruner(model, inputs, "taylor_fo", filters=0.5, every=1, optimizer=outer)
    zoo.loss(model, inputs).backward()
    pruner.step()
    outer.step()
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match="optimizer: it is given without the SGD that keeps"):
        pruner.compact()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    gone = [(p == 0).sum() for p in parameters]
    zoo.loss(model, inputs).backward()
    outer.step()
    assert [(p == 0).sum() for p in parameters] == gone  # still masked

    model, inputs = zoo.build("mlp")
    optimizer = Elsewhere(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, inputs, "taylor_fo", filters=0.5, every=1, optimizer=optimizer)
    zoo.loss(model, inputs).backward()
    pruner.step()
    optimizer.step()
    with pytest.warns(UserWarning, match="Elsewhere has made steps, but no state of .*weight"):
        pruner.compact()
    HIDDEN.clear()


def two(model):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return SGD(matrices, 0.02, momentum=0.9), SGD(
        [p for p in model.parameters() if p.dim() < 2], 0.01, momentum=0.5
    )


def test_several_optimizers():
    results = []
    for compact in (False, True):
        model, inputs = zoo.build("mlp")
        optimizers = two(model)
        pruner = Pruner(
            model, inputs, "taylor_fo", filters=0.5, every=2, per_step=3, optimizer=optimizers
        )
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(10):
                model.zero_grad()
                zoo.loss(model, zoo.fresh(inputs)).backward()
                pruner.step()
                for one in optimizers:
                    one.step()
                if compact:
                    pruner.compact()
            pruner.compact()
        results.append([p.detach() for p in model.parameters()])
        own = [p for one in optimizers for group in one.param_groups for p in group["params"]]
        assert set(own) == set(model.parameters())
        assert all(set(one.state) <= set(own) for one in optimizers)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_parameters_of_an_optimizer_that_was_not_given_are_named():
    model, inputs = zoo.build("mlp")
    given, _ = two(model)
    pruner = Pruner(model, inputs, "taylor_fo", filters=0.5, every=1, optimizer=given)
    zoo.loss(model, inputs).backward()
    pruner.step()
    with pytest.warns(
        UserWarning, match=r"optimizer: .*\.bias.* are in none of its groups"
    ) as seen:
        pruner.compact()
    assert seen[0].filename == __file__


def test_attributes_and_hooks_stay_with_their_parameters():
    model, inputs = zoo.build("mlp")
    pruner = Pruner(
        model, inputs, filters=0.5, every=1, per_step=0.5, optimizer=SGD(model.parameters(), 0.1)
    )
    weight = model[0].weight
    weight.no_decay = True
    calls = []
    handles = [
        weight.register_hook(lambda grad: calls.append(("grad", grad.shape))),
        weight.register_post_accumulate_grad_hook(lambda p: calls.append(("end", p.shape))),
    ]
    zoo.loss(model, inputs).backward()
    pruner.step()
    pruner.compact()
    assert model[0].weight is not weight
    assert model[0].weight.no_decay is True
    calls.clear()
    zoo.loss(model, inputs).backward()
    assert calls == [("grad", model[0].weight.shape), ("end", model[0].weight.shape)]
    for handle in handles:
        handle.remove()
    calls.clear()
    zoo.loss(model, inputs).backward()
    assert calls == []
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
