"""What MirrorDescent refuses: one clear error, and nothing is changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from taylor_kernels.methods import MirrorDescent


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def everything(model: nn.Module, optimizer: MirrorDescent) -> tuple:
    return copy.deepcopy((list(model.state_dict().values()), optimizer.state_dict()))


def same(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor):
        return one.equal(two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


BAD_OPTIONS = {
    "method": ("md-sigmoid", "method: 'md-sigmoid' is not one of 'md-tanh-s'"),
    "levels": (3, "levels: 3 is not one of 'binary', 'ternary'"),
    "optimizer": ("lion", "optimizer: 'lion' is not one of"),
    "quantize": (True, "quantize: True is not one of 'matrices', 'all', False"),
    "start": ("zero", "start: 'zero' is not one of 'weights', 'spread'"),
    "lr": (-1.0, "lr: -1 is not 0 or more"),
    "eps": (-1e-9, "eps: -1e-09 is not 0 or more"),
    "momentum": (1.0, "momentum: 1 is not from 0 to below 1"),
    "weight_decay": (math.nan, "weight_decay: nan is not"),
    "betas": ((0.9, 1.0), r"betas: \(0.9, 1.0\) are not"),
    "beta": (0.0, "beta: 0 is not greater than 0"),
    "beta_scale": (0.99, "beta_scale: 0.99 is not 1 or more"),
    "beta_interval": (0, "beta_interval: 0 is not a positive integer"),
    "beta_max": (1e36, "beta_max: 1e[+]36 is not greater than 0 and at most 1e35"),
    "scale": (0.0, "scale: 0 is not a number greater than 0"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options(name):
    value, message = BAD_OPTIONS[name]
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        MirrorDescent(model.parameters(), **{name: value})
    assert same(dict(model.state_dict()), dict(before))


def test_options_of_the_wrong_kind():
    with pytest.raises(TypeError, match="beta: expected a number, got str"):
        MirrorDescent(network().parameters(), beta="1")
    with pytest.raises(ValueError, match="scale: 'all' is not None, 'layer' or a number"):
        MirrorDescent(network().parameters(), scale="all")
    with pytest.raises(ValueError, match="beta: 9 is above beta_max, 8"):
        MirrorDescent(network().parameters(), beta=9.0, beta_max=8.0)
    with pytest.raises(ValueError, match="'md-tanh' is binary"):
        MirrorDescent(network().parameters(), method="md-tanh", levels="ternary")
    with pytest.raises(ValueError, match="backend: 'gpu' is not one of"):
        MirrorDescent(network().parameters(), backend="gpu")


def test_a_group_without_matrices_and_the_groups_before_it():
    model = network()
    before = copy.deepcopy(model.state_dict())
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias, model[2].bias]}]
    with pytest.raises(ValueError, match="group 1 has no matrix among its 2 tensors"):
        MirrorDescent(groups)
    assert same(dict(model.state_dict()), dict(before))
    optimizer = MirrorDescent(groups[:1])
    held = everything(model, optimizer)
    with pytest.raises(ValueError, match="group 1 has no matrix"):
        optimizer.add_param_group(groups[1])
    assert same(held, everything(model, optimizer))
    optimizer.add_param_group(groups[1] | {"quantize": False})


def test_weights_that_cannot_start():
    model = network()
    with torch.no_grad():
        model[2].weight[1, 2] = math.inf
    with pytest.raises(ValueError, match=r"number 2 of group 0, of shape \(2, 4\), has values"):
        MirrorDescent(model.parameters())
    nn.init.zeros_(model[2].weight)
    with pytest.raises(ValueError, match="scale: number 2 of group 0 has zeros only"):
        MirrorDescent(model.parameters(), scale="layer")
    MirrorDescent(model.parameters())


@pytest.mark.parametrize(
    ("scale", "dtype", "becomes"),
    [(1e-9, torch.float16, "0"), (1e6, torch.float16, "inf"), (1e-60, torch.float32, "0")],
)
def test_a_scale_that_the_dtype_cannot_hold(scale, dtype, becomes):
    model = network().to(dtype)
    before = copy.deepcopy(model.state_dict())
    message = f"scale: {scale!r} is {becomes} in {dtype}, which number 0 of group 0 has"
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        MirrorDescent(model.parameters(), scale=scale)
    assert same(dict(model.state_dict()), dict(before))
    with torch.no_grad():
        model[0].weight.zero_()[0, 0] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    with pytest.raises(ValueError, match="scale: 'layer' is 0 in"):
        MirrorDescent(model.parameters(), scale="layer")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_named(bad):
    model = network()
    optimizer = MirrorDescent(model.named_parameters() if torch.__version__ >= "2.6" else
                              model.parameters())  # fmt: skip
    for _ in range(2):
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
    held = everything(model, optimizer)
    model[2].weight.grad[1, 1] = bad
    name = "'2.weight'" if torch.__version__ >= "2.6" else "parameter 2 of group 0"
    with pytest.raises(ValueError, match=f"gradients: not finite for {name}; nothing was changed"):
        optimizer.step()
    assert same(held, everything(model, optimizer))
    for param in model.parameters():
        param.grad.fill_(bad)
    with pytest.raises(ValueError, match="and 1 more; nothing was changed"):
        optimizer.step()
    assert same(held, everything(model, optimizer))


def test_large_gradients_are_finite():
    """Their squares are not, in float32 and less."""
    for dtype, large in ((torch.float32, 1e30), (torch.float16, 6e4)):
        model = network().to(dtype)
        optimizer = MirrorDescent(model.parameters(), optimizer="sgd", lr=1e-32, momentum=0)
        for param in model.parameters():
            param.grad = torch.full_like(param, large)
        optimizer.step()


def test_sparse_gradients_are_named():
    layer = nn.Embedding(4, 3, sparse=True)
    optimizer = MirrorDescent(layer.parameters())
    layer(torch.tensor([1])).sum().backward()
    held = everything(layer, optimizer)
    with pytest.raises(ValueError, match=r"gradients: that of parameter 0 of group 0 .*sparse_coo"):
        optimizer.step()
    assert same(held, everything(layer, optimizer))


def test_a_state_of_other_groups():
    model = network()
    optimizer = MirrorDescent(model.parameters())
    other = MirrorDescent([model[0].weight])
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other.state_dict())


def of_sgd(model):
    """The state of SGD of the same parameters."""
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(2, 3)).sum().backward()
    sgd.step()
    return sgd.state_dict()


def saved(model=None, **changed):
    """A state of MirrorDescent after a step, without or with another entry for its first weight."""
    model = model or network()
    optimizer = MirrorDescent(model.parameters())
    model(torch.ones(2, model[0].in_features)).sum().backward()
    optimizer.step()
    found = copy.deepcopy(optimizer.state_dict())
    for name, value in changed.items():
        found["state"][0].pop(name)
        if value is not None:
            found["state"][0][name] = value
    return found


def in_group(state, **options):
    state["param_groups"][0] |= options
    return state


WIDER = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
BAD_STATES = {
    "sgd": (lambda: of_sgd(network()), "group 0 has no 'beta'.* the state of another optimizer"),
    "no groups": (lambda: {"state": {}}, "it has no 'param_groups'"),
    "width": (lambda: saved(WIDER), r"parameter 0 .* shape \(4, 3\), .*'value' .* \(4, 5\)"),
    "no value": (lambda: saved(value=None), "parameter 0 of group 0.* has no 'value'"),
    "no step": (lambda: saved(step=None), "parameter 0 of group 0.* has no 'step'"),
    "scale": (lambda: saved(scale=0.0), "parameter 0 of group 0 has scale 0.0"),
    "moment": (lambda: saved(exp_avg=torch.ones(3)), r"'exp_avg' .* is \(3,\) of"),
    "planes": (lambda: in_group(saved(), method="pmf"), r"'value' .* not \(2, 4, 3\)"),
    "float": (lambda: in_group(saved(), quantize=False), "parameter 0 .* was quantized where"),
    "option": (lambda: in_group(saved(), levels=3), "levels: 3 is not one of"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_of_something_else_changes_nothing(name):
    make, message = BAD_STATES[name]
    state = make()
    model = network()
    optimizer = MirrorDescent(model.parameters())
    held = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert same(held, everything(model, optimizer))
    optimizer.load_state_dict(saved())
