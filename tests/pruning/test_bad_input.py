"""Every wrong argument: one error that names it and says what to do, and nothing has changed."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
from torch import nn

from taylor_kernels.pruning import Pruner
from tests.helpers import zoo
from tests.helpers.programs import run_program

WRONG = {
    "no target": ({"params": None}, ValueError, "flops, params, filters: none is given"),
    "target 0": ({"params": 0}, ValueError, "params: expected the fraction to keep"),
    "target 50": ({"flops": 50}, ValueError, "flops: expected the fraction to keep.*got 50"),
    "target nan": ({"flops": float("nan")}, ValueError, "flops: expected"),
    "target text": ({"filters": "half"}, ValueError, "filters: expected"),
    "target bool": ({"filters": True}, ValueError, "filters: expected"),
    "every": ({"every": 0}, ValueError, "every: expected an integer of at least 1, got 0"),
    "every fraction": ({"every": 2.5}, ValueError, "every: expected"),
    "per_step": ({"per_step": 0}, ValueError, "per_step: expected"),
    "per_step float": ({"per_step": 1.5}, ValueError, "per_step: expected"),
    "per_step bool": ({"per_step": True}, ValueError, "per_step: expected"),
    "momentum": ({"momentum": 1.0}, ValueError, r"momentum: expected a number in \[0, 1\)"),
    "momentum text": ({"momentum": "no"}, ValueError, "momentum: expected"),
    "round_to": ({"round_to": -8}, ValueError, "round_to: expected"),
    "min_filters": ({"min_filters": 0}, ValueError, "min_filters: expected"),
    "criterion": ({"criterion": "taylor_f0"}, ValueError, "criterion: 'taylor_f0' is not known"),
    "criterion number": ({"criterion": 3}, TypeError, "criterion: expected a name.*int"),
    "oracle": ({"criterion": "oracle"}, ValueError, "criterion: 'oracle' says nothing of filters"),
    "criterion under two names": (
        {"criterion": "taylor_fo", "importance": "taylor_fo"}, TypeError,
        "importance: is the old name of criterion",
    ),
    "ignore": ({"ignore": ["stem", "layer9"]}, ValueError, "ignore: 'layer9' matches no module"),
    "ignore module": ({"ignore": [nn.Linear(2, 2)]}, ValueError, "ignore: 'Linear' matches no"),
    "ignore number": ({"ignore": [3]}, TypeError, "ignore: entries are module names.*got 3"),
    "ignore none": ({"ignore": None}, TypeError, "ignore: expected a sequence.*got None"),
    "ignore all": ({"ignore": ["*"]}, ValueError, "nothing to prune.*is ignored"),
    "backend": ({"backend": "cudnn"}, ValueError, "backend: 'cudnn' is not one of"),
    "backend elsewhere": ({"backend": "cuda"}, ValueError, "'cuda' does not run on cpu tensors"),
    "ranks": ({"ranks": 2}, TypeError, "ranks: expected a tk.distributed.Ranks, or None.*got int"),
    "percent": ({"params": 50}, ValueError, r"params: .*got 50; for 50% write 0\.5"),
    "optimizer": ({"optimizer": 3}, TypeError, "optimizer: expected a torch.optim.Optimizer"),
    "optimizer of others": (
        {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)}, ValueError,
        "optimizer: it holds no parameter of the model",
    ),
    "inputs": ({"example_inputs": torch.randn(2, 5, 8, 8)}, ValueError, "example_inputs: .*chann"),
    "inputs none": ({"example_inputs": None}, ValueError, "example_inputs: the model does not run"),
    "empty batch": (
        {"example_inputs": torch.randn(0, 3, 8, 8), "flops": 0.5}, ValueError,
        "example_inputs: nothing is in them",
    ),
    "too many inputs": (
        {"example_inputs": (torch.randn(2, 3, 8, 8), 1)}, ValueError, "example_inputs: .*does not",
    ),
    "unreachable": ({"params": 0.001}, ValueError, "params: 0.001 cannot be reached"),
    "round_to too coarse": ({"round_to": 64}, ValueError, "nothing to prune.*must keep all"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case):
    options, kind, message = WRONG[case]
    model, inputs = zoo.build("resnet")
    before = copy.deepcopy(model.state_dict())
    arguments = {"example_inputs": inputs, "params": 0.5} | options
    rng = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        Pruner(model, **arguments)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_old_name_of_criterion():
    model, inputs = zoo.build("mlp")
    with pytest.warns(DeprecationWarning, match="call it criterion") as caught:
        pruner = Pruner(model, inputs, importance="taylor_fo", params=0.5)
    assert caught[0].filename == __file__
    assert pruner.criterion.name == "taylor_fo"
    assert Pruner(zoo.build("mlp")[0], inputs, params=0.5).criterion.name == "taylor_fo_bn"


def test_wrong_model():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        Pruner(lambda x: x, torch.zeros(1), params=0.5)
    with pytest.raises(ValueError, match=r"nothing to prune.*no convolution or linear layer"):
        Pruner(nn.ReLU(), torch.randn(1, 3), params=0.5)
    with pytest.raises(ValueError, match=r"nothing to prune.*reaches the output"):
        Pruner(nn.Linear(3, 4), torch.randn(1, 3), params=0.5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="model: it cannot be copied to trace it"):
        Pruner(model, torch.randn(1, 3), params=0.5)


def test_a_model_that_keeps_an_output_with_its_graph_is_pruned():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    model.cache = model(torch.randn(1, 3))
    pruner = Pruner(model, torch.randn(1, 3), "magnitude_l2", params=0.6, every=1)
    while not pruner.done:
        pruner.step()
    assert pruner.compact()[0].out_features < 6
    assert model.cache.grad_fn is not None


def test_model_without_memory():
    model, inputs = zoo.build("mlp")
    with pytest.raises(ValueError, match=r"model: .* on the meta device; materialise it first"):
        Pruner(model.to("meta"), inputs, params=0.5)


def test_layer_without_the_norm_that_its_score_is_read_from():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    inputs = torch.randn(5, 4)
    pruner = Pruner(model, inputs, "bn_scale", params=0.8, every=1)
    zoo.loss(model, inputs).backward()
    with pytest.raises(RuntimeError, match=r"^3: .* no BatchNorm .* ignore it") as error:
        pruner.step()
    assert "loss" not in str(error.value)


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), None])
def test_wrong_loss_scale(scale):
    model, inputs = zoo.build("mlp")
    pruner = Pruner(model, inputs, params=0.5)
    zoo.loss(model, inputs).backward()
    with pytest.raises(ValueError, match=r"loss_scale: .* is not a positive number"):
        pruner.step(loss_scale=scale)


def test_step_without_backward():
    model, inputs = zoo.build("mlp")
    pruner = Pruner(model, inputs, "taylor_fo", params=0.5, every=1)
    with pytest.raises(RuntimeError, match=r"backward\(\)"):
        pruner.step()
    assert not pruner.history


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "obd_fisher", "magnitude_l2"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.filterwarnings("ignore:.*not called in any pass")
def test_a_layer_that_is_replaced_is_an_error_at_the_next_pruning(criterion, late):
    """Else the old one would be scored, without a gradient, and the new one lose its filters."""
    model, inputs = zoo.build("mlp")
    pruner = Pruner(model, inputs, criterion, params=0.5, every=1, per_step=1)

    def step():
        model.zero_grad()
        zoo.loss(model, inputs).backward()
        pruner.step()

    if late:
        step()
    prunings = len(pruner.history)
    name = random.choice(list(pruner.widths))
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, copy.deepcopy(model.get_submodule(name)))
    with pytest.raises(RuntimeError, match=f"{name}: other modules have been put there"):
        step()
    assert len(pruner.history) == prunings


def test_lbfgs_is_refused():
    model, inputs = zoo.build("mlp")
    with pytest.raises(ValueError, match="optimizer: LBFGS keeps one flat history"):
        Pruner(model, inputs, params=0.5, optimizer=torch.optim.LBFGS(model.parameters()))


def test_torch_pruning_is_not_needed():
    code = """
import sys
sys.modules["torch_pruning"] = None
import torch
from taylor_kernels.pruning import Pruner
Pruner(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)), torch.ones(1, 2),
       params=0.5)
"""
    run = run_program(code)
    assert run.returncode == 0, run.stderr


def test_close_takes_everything_off():
    model, inputs = zoo.build("resnet")
    pruner = Pruner(model, inputs, params=0.5, every=1)
    zoo.loss(model, inputs).backward()
    pruner.step()
    assert model._forward_pre_hooks
    pruner.close()
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()
    )
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with pytest.raises(RuntimeError, match="the pruner is closed"):
        pruner.step()
    with pytest.raises(RuntimeError, match="the pruner is closed"):
        pruner.load_state_dict(pruner.state_dict())
    pruner.compact()
    assert sum(pruner.widths.values()) < sum(pruner.original_widths.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn"])
def test_a_model_of_bare_parameters_alone(criterion):
    """Nothing of it is a layer: products with its parameters are what is pruned."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(9, 3)), nn.Parameter(torch.randn(2, 9))

        def forward(self, x):
            return nn.functional.linear(nn.functional.linear(x, self.one).relu(), self.two)

    model, x = Bare(), torch.randn(4, 3)
    pruner = Pruner(model, x, criterion, filters=0.5, every=1, per_step=0.25)
    while not pruner.done:
        model.zero_grad()
        model(x).square().mean().backward()
        pruner.step()
    assert pruner.compact().one.shape == (4, 3)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_what_torchscript_has_compiled_stays(how):
    x = torch.randn(3, 4)
    inside = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    inside = torch.jit.script(inside) if how == "script" else torch.jit.trace(inside, x)
    model = nn.Sequential(inside, nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    pruner = Pruner(model, x, "magnitude_l2", filters=0.5, every=1, per_step=2)
    assert pruner.widths == {"2": 7}
    assert "TorchScript" in pruner.skipped["0.0"]
    while not pruner.done:
        model(x).sum().backward()
        pruner.step()
    masked = model(x)
    torch.testing.assert_close(pruner.compact()(x), masked)
    with pytest.raises(ValueError, match="model: TorchScript has compiled it"):
        Pruner(inside, x, filters=0.5)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0,), (3, 0, 2), ()])
def test_parameters_without_entries_are_no_obstacle(shape):
    """Prompts of no tokens, adapters of rank zero."""

    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 2)
            self.empty = nn.Parameter(torch.ones(shape))

        def forward(self, x):
            return self.leave(self.enter(x).relu()) * self.empty.numel() + self.empty.sum()

    model, x = Empty(), torch.randn(3, 4)
    pruner = Pruner(model, x, "magnitude_l2", filters=0.5, every=1, per_step=4)
    model(x).sum().backward()
    pruner.step()
    masked = model(x)
    torch.testing.assert_close(pruner.compact()(x), masked)
    assert model.empty.shape == shape
    assert model.enter.out_features == 4
