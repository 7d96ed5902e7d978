"""Traces, exports and compilers of a model while a pruner of it is open."""

from __future__ import annotations

import copy

import pytest
import torch

import taylor_kernels as tk
from taylor_kernels.pruning import Pruner
from tests.helpers import zoo
from tests.pruning.open_pruners import masked, minibatch


@pytest.mark.sample
@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate", "obd_fisher", "taylor_fo"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_trace_and_export_see_no_hook(criterion, compacted):
    model, inputs, pruner = masked("resnet", criterion)
    if compacted:
        pruner.compact()
    model.eval()
    expected = model(inputs)
    traced = torch.jit.trace(model, inputs)
    torch.testing.assert_close(traced(inputs), expected)
    exported = torch.export.export(model, (inputs,)).module()
    torch.testing.assert_close(exported(inputs), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(inputs), expected)
    minibatch(model.train(), inputs, pruner)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_script_says_what_to_do():
    model, inputs, pruner = masked()
    pruner.compact()
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(AttributeError, match=r"close\(\) them first.*copy it again"):
            torch.jit.script(one)
    pruner.close()
    for one in (model, copy.deepcopy(model)):
        torch.testing.assert_close(torch.jit.script(one)(inputs), model(inputs))


def trained(model, call, inputs, pruner, steps, compact_at):
    """Records and losses of a run in which `call` is the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    torch.manual_seed(1)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = call(zoo.fresh(inputs)).square().mean()
        loss.backward()
        found += [loss.item(), pruner.step()]
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all(), name
        if step == compact_at:
            pruner.compact()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return found


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate", "taylor_fo"])
def test_a_compiled_model_is_pruned_as_it_is_without(criterion):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, inputs = zoo.build("vgg")
        pruner = Pruner(model, inputs, criterion, filters=0.4, every=2, per_step=3)
        call = torch.compile(model, backend=backend) if compiled else model
        found.append(trained(model, call, inputs, pruner, 10, 5))
        if compiled:
            made = len(graphs)
            trained(model, call, inputs, pruner, 6, -1)
            assert len(graphs) == made  # nothing is compiled again
    assert found[0] == found[1]
    assert len(graphs) < 20


@pytest.mark.parametrize("first", ["compiled", "pruner"])
def test_masks_hold_in_a_compiled_model_whatever_the_optimizer_does(first):
    torch._dynamo.reset()
    model, inputs = zoo.build("vgg")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    call = torch.compile(model, backend="eager")
    if first == "compiled":
        call(inputs).sum().backward()
        optimizer.step()
    pruner = Pruner(model, inputs, "taylor_fo", filters=0.4, every=2, per_step=3)
    gone: dict[str, list[int]] = {}
    for _ in range(8):
        optimizer.zero_grad()
        call(zoo.fresh(inputs)).square().mean().backward()
        record = pruner.step()
        for name, filters in record.removed.items() if record else ():
            gone.setdefault(name, []).extend(filters)
        optimizer.step()
        for name, filters in gone.items():
            layer = model.get_submodule(name)
            assert not layer.weight[filters].any()
            assert not layer.bias[filters].any()
    assert gone


def test_a_model_that_was_compiled_before_its_meter_is_told_so():
    torch._dynamo.reset()
    model, inputs = zoo.build("vgg")
    call = torch.compile(model, backend="eager")
    call(inputs)
    imp = tk.Importance(model, "taylor_fo_bn")
    call(inputs).sum().backward()
    with pytest.raises(RuntimeError, match="the model was compiled before this meter was made"):
        imp.update()
