"""What the meter does about passes, examples, its state and wrong use."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import taylor_kernels as tk
from tests.helpers.parameter_loop import by_loop, close, mean_of_own, metered
from tests.helpers.parameter_networks import images, network

pytestmark = pytest.mark.usefixtures("one_thread")


def test_batches_are_weighed_by_their_examples_and_the_loss_scale_goes():
    model, batches = network(), [images(3), images(5), images(1)]
    meter = tk.ParameterFisher(model)
    for x in batches[:2]:
        (1024 * mean_of_own(model, x)).backward()
    meter.update(loss_scale=1024)
    mean_of_own(model, batches[2]).backward()
    meter.update()
    assert meter.examples == 9
    close(meter.compute(), by_loop(model, batches))


def test_names_that_hold_brackets_stand_for_themselves():
    model = nn.Sequential()
    model.add_module("[a]", nn.Linear(2, 2))
    model.add_module("a", nn.Linear(2, 2))
    for name in ("[a].weight", "a.weight"):
        meter = tk.ParameterFisher(model, parameters=[name])
        model(torch.randn(3, 2)).square().mean().backward()
        meter.update()
        assert name in meter.compute()
        meter.close()


def test_a_loss_that_is_a_sum():
    model, x = network(), images()
    found = metered(model, [x], lambda m, x: len(x) * mean_of_own(m, x), reduction="sum")
    close(found, by_loop(model, [x]))


def test_training_gives_the_same_bits_with_the_meter():
    model = network()
    plain, x = copy.deepcopy(model), images()
    meter = tk.ParameterFisher(model)
    for net in (model, plain):
        mean_of_own(net, x).backward()
    meter.update()
    both = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(p.grad.equal(q.grad) for p, q in both)
    before = [p.grad.clone() for p in model.parameters()]
    meter.update(closure=lambda: mean_of_own(model, x))
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), before, strict=True))


def test_backward_twice_over_one_graph_adds_gradients_up():
    model, x = network(), images()
    meter = tk.ParameterFisher(model)
    loss = mean_of_own(model, x)
    loss.backward(retain_graph=True)
    loss.backward()
    meter.update()
    expected = by_loop(model, [x])
    close(meter.compute(), {name: 4 * value for name, value in expected.items()})


def test_chosen_and_frozen_parameters():
    model, x = network(), images()
    model[0].bias.requires_grad_(False)
    expected = by_loop(model, [x])
    assert "0.bias" not in expected
    close(metered(model, [x]), expected)
    chosen = metered(model, [x], parameters=["*.weight"])
    close(chosen, {name: v for name, v in expected.items() if name.endswith("weight")})
    meter = tk.ParameterFisher(model)
    with tk.scoring(model), pytest.raises(RuntimeError, match=r"0.weight.* are frozen now"):
        model(x)
    meter.close()


def test_parameters_that_no_gradient_reaches_are_zero():
    model = network()
    model.unused = nn.Linear(2, 2)
    x = images()
    found = metered(nn.Sequential(*model[:-1]), [x])
    assert not any(name.startswith("unused") for name in found)
    meter = tk.ParameterFisher(model)
    forward = model.forward
    model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*[*model][:-1]), x)
    mean_of_own(model, x).backward()
    model.forward = forward
    meter.update()
    found = meter.compute()
    assert not found["unused.weight"].any()
    assert found["0.weight"].any()


def test_state_goes_on_where_it_was_and_wrong_state_changes_nothing():
    model, batches = network(), [images(3), images(2)]
    meter = tk.ParameterFisher(model)
    meter.update(closure=lambda: mean_of_own(model, batches[0]))
    state = meter.state_dict()
    other = tk.ParameterFisher(copy.deepcopy(network()))
    other.load_state_dict(state)
    meter.update(closure=lambda: mean_of_own(model, batches[1]))
    again = tk.ParameterFisher(model)
    again.load_state_dict(state)
    again.update(closure=lambda: mean_of_own(model, batches[1]))
    close(again.compute(), meter.compute(), 0)
    small = tk.ParameterFisher(nn.Linear(2, 2))
    wrong = {**state, "version": 7}
    for broken, message in ((state, "which is not here"), (wrong, "version"), ({}, "version")):
        with pytest.raises(ValueError, match=message):
            small.load_state_dict(broken)
    assert small.examples == 0
    meter.reset()
    with pytest.raises(RuntimeError, match="call update"):
        meter.compute()


def test_skipped_passes_do_not_count_and_a_closed_meter_leaves_no_hook():
    model, x = network(), images()
    meter = tk.ParameterFisher(model)
    mean_of_own(model, images()).backward()
    meter.skip()
    mean_of_own(model, x).backward()
    meter.update()
    close(meter.compute(), by_loop(model, [x]))
    meter.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="closed"):
        meter.update()
    tk.ParameterFisher(model)
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_other_meters_do_not_count_its_passes():
    model, x = network(), images()
    scores = tk.Importance(model, "obd_fisher")
    meter = tk.ParameterFisher(model)
    meter.update(closure=lambda: mean_of_own(model, x))
    with pytest.raises(RuntimeError, match="no forward and backward pass"):
        scores.update()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"parameters": ["conv*"]}, ValueError, "'conv.' matches no trained parameter"),
        ({"parameters": "0.weight"}, ValueError, "got the string"),
        ({"reduction": "none"}, ValueError, "'none' is not one of mean, sum"),
        ({"matrix": "hessian"}, ValueError, "'hessian' is not one of empirical, gauss_newton"),
        ({"samples": 3}, ValueError, "samples: 3"),
        ({"backend": "fast"}, ValueError, "'fast' is not one of"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        tk.ParameterFisher(network(), **options)


def test_wrong_use():
    with pytest.raises(ValueError, match="no trained parameter"):
        tk.ParameterFisher(nn.ReLU())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        tk.ParameterFisher(lambda x: x)  # type: ignore[arg-type]
    meter = tk.ParameterFisher(network())
    with pytest.raises(RuntimeError, match="no forward and backward pass"):
        meter.update()
    with pytest.raises(RuntimeError, match="did not call the model"):
        meter.update(closure=lambda: torch.ones((), requires_grad=True) * 2)
    newton = tk.ParameterFisher(network(), matrix="gauss_newton")
    with pytest.raises(ValueError, match="closure"):
        newton.update()
