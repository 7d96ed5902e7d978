"""Gates of the heads of attentions, against autograd of a factor on each head's context."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

import taylor_kernels as tk
from taylor_kernels.gate_sites import find_gate_sites
from tests.helpers.attentions import HEADS, WIDTH, Net, Written, data, loss


def written(model: Net, gates: Tensor) -> Net:
    """The same model, with these gates on the heads of its attention."""
    twin = copy.deepcopy(model)
    twin.kind = "self" if model.kind == "reentrant" else model.kind
    twin.attention.__class__ = Written
    twin.attention.gates = gates
    return twin


def slopes(model: Net, x: Tensor, target: Tensor) -> Tensor:
    """∂L/∂gate of each head [examples, heads]."""
    gates = torch.ones(len(x), HEADS, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(written(model, gates), x, target), gates)[0]


def first_weight(model: Net) -> str:
    separate = model.attention.in_proj_weight is None
    return f"attention.{'q_proj_weight' if separate else 'in_proj_weight'}"


def of_heads(scores: Tensor) -> Tensor:
    """[heads] of the scores of the rows of a weight, which are the same in a head."""
    rows = scores.reshape(-1, HEADS, WIDTH // HEADS)
    assert torch.equal(rows, rows[:1, :, :1].expand_as(rows))
    return rows[0, :, 0]


def scored(model: Net, criterion: str, x: Tensor, target: Tensor, **options) -> Tensor:
    imp = tk.Importance(
        model, criterion, layers=[first_weight(model)], example_inputs=x[:2], **options
    )
    if imp.needs_closure:
        imp.update(closure=lambda: loss(model, x, target))
    else:
        loss(model, x, target).backward()
        imp.update()
    found = imp.compute()[first_weight(model)]
    imp.close()
    return of_heads(found)


@pytest.mark.sample(10)
@pytest.mark.parametrize("in_scoring", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "kind", ["self", "cross", "padded", "added", "twice", "checkpoint", "reentrant"]
)
def test_slopes_are_those_of_factors_on_heads(kind, batch_first, need_weights, in_scoring):
    model, (x, target) = Net(kind, batch_first, need_weights).double(), data()
    s = slopes(model, x, target)
    for criterion, expected in (
        ("taylor_fo_bn", s.sum(0).square()),
        ("taylor_fo_gate", s.square().mean(0)),
    ):
        with tk.scoring(model) if in_scoring else nullcontext():
            found = scored(model, criterion, x, target)
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("need_weights", [False, True])
def test_without_a_batch_each_call_is_an_example(need_weights):
    """Uses in one call of the model add up, and each of its calls brings another example."""
    model = Net("unbatched", True, need_weights).double()
    x, target = data()
    imp = tk.Importance(model, "taylor_fo_gate", layers=[first_weight(model)], example_inputs=x[:1])
    for one, wanted in zip(x.split(1), target.split(1), strict=True):
        loss(model, one, wanted).backward()
    imp.update()
    each = [slopes(model, one, t) for one, t in zip(x.split(1), target.split(1), strict=True)]
    expected = torch.cat(each).square().mean(0).float()
    torch.testing.assert_close(
        of_heads(imp.compute()[first_weight(model)]), expected, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(need_weights):
    model, (x, target) = Net("self", False, need_weights), data(8)
    x, target = x.float(), target.float()
    name = first_weight(model)
    imp = tk.Importance(model, "taylor_fo_gate", layers=[name], example_inputs=x[:2])
    with torch.autocast("cpu", torch.bfloat16):
        loss(model, x, target).backward()
    imp.update()
    found = of_heads(imp.compute()[name])
    exact = slopes(copy.deepcopy(model).double(), x.double(), target.double())
    torch.testing.assert_close(found, exact.square().mean(0).float(), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_other_statistics_stand_there_too(need_weights, batch_first):
    model, (x, target) = Net("self", batch_first, need_weights).double().eval(), data()

    def of_gates(z: Tensor) -> Tensor:
        return loss(written(model, z.expand(len(x), -1)), x, target)

    ones = torch.ones(HEADS, dtype=torch.float64)
    z = ones.clone().requires_grad_()
    (slope,) = torch.autograd.grad(of_gates(z), z, create_graph=True)
    (product,) = torch.autograd.grad(slope.sum(), z)
    found = scored(model, "taylor_so_bn", x, target)
    torch.testing.assert_close(found, (slope - product / 2).square().float(), rtol=1e-4, atol=1e-9)
    without = []
    for head in range(HEADS):
        gone = ones.clone()
        gone[head] = 0.0
        without.append((of_gates(gone) - of_gates(ones)).detach().square())
    found = scored(model, "oracle", x, target)
    torch.testing.assert_close(found, torch.stack(without).float(), rtol=1e-4, atol=1e-9)
    assert (scored(model, "taylor_so_diag", x, target) > 0).all()


def test_a_step_has_the_same_bits_and_inference_its_fused_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.Sequential(nn.Linear(6, WIDTH), layer, nn.Linear(WIDTH, 5)), torch.randn(3, 5, 6)
    plain = copy.deepcopy(model)
    imp = tk.Importance(model, "taylor_fo_gate", example_inputs=x)
    for one in (model, plain):
        one(x).square().sum().backward()
    imp.update()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    attention, x = model[1].self_attn.eval(), torch.randn(3, 5, WIDTH)
    with torch.no_grad():
        assert torch.equal(
            attention(x, x, x, need_weights=False)[0],
            plain[1].self_attn.eval()(x, x, x, need_weights=False)[0],
        )


def test_two_meters_see_the_same():
    model, (x, target) = Net("self", False, True).double(), data()
    options = {"layers": [first_weight(model)], "example_inputs": x[:2]}
    meters = [tk.Importance(model, "taylor_fo_gate", **options) for _ in range(2)]
    loss(model, x, target).backward()
    for one in meters:
        one.update()
    first, second = (of_heads(one.compute()[first_weight(model)]) for one in meters)
    assert torch.equal(first, second)
    expected = slopes(model, x, target).square().mean(0).float()
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=0)


def test_a_compiled_step_gives_the_same():
    model, (x, target) = Net("self", False, False).double(), data()
    name = first_weight(model)
    imp = tk.Importance(model, "taylor_fo_gate", layers=[name], example_inputs=x[:2])
    compiled = torch.compile(model, backend="eager")
    loss(compiled, x, target).backward()
    imp.update()
    expected = slopes(model, x, target).square().mean(0).float()
    torch.testing.assert_close(of_heads(imp.compute()[name]), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_after_one_that_was_stopped_inside(error, monkeypatch):
    model, (x, target) = Net("self", True, False).double(), data()
    imp = tk.Importance(model, "taylor_fo_bn", layers=[first_weight(model)], example_inputs=x[:2])

    def stop(*_: object, **__: object) -> None:
        raise error("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", stop)
        with pytest.raises(error, match="stopped"):
            model(x)
    imp.skip()
    loss(model, x, target).backward()
    assert not _get_current_function_mode_stack()
    imp.update()
    expected = slopes(model, x, target).sum(0).square().float()
    found = of_heads(imp.compute()[first_weight(model)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_another_scored_model_that_runs_inside_takes_nothing_away():
    """What its pass finds running is no pass of its own that was stopped."""
    model, (x, target) = Net("self", True, False).double(), data()
    other, (x_other, _) = Net("self", True, False).double(), data()
    name = first_weight(model)
    imp = tk.Importance(model, "taylor_fo_bn", layers=[name], example_inputs=x[:2])
    inner = tk.Importance(other, "taylor_fo_bn", layers=[name], example_inputs=x[:2])

    def run_other(*_: object) -> None:
        other(x_other)

    attention = model.get_submodule(name.rpartition(".")[0])
    handle = attention.register_forward_pre_hook(run_other)
    loss(model, x, target).backward()
    handle.remove()
    imp.update()
    inner.skip()
    assert not _get_current_function_mode_stack()
    expected = slopes(model, x, target).sum(0).square().float()
    torch.testing.assert_close(of_heads(imp.compute()[name]), expected, rtol=1e-5, atol=0)


def test_another_thread_in_the_same_attention_takes_nothing_away(monkeypatch):
    """It runs without a graph while the pass that is scored is inside."""
    model, (x, target) = Net("self", True, False).double(), data()
    imp = tk.Importance(model, "taylor_fo_bn", layers=[first_weight(model)], example_inputs=x[:2])
    inside, left, failed = threading.Event(), threading.Event(), []

    def evaluate() -> None:
        try:
            with torch.no_grad():
                model(x)
        except Exception as error:
            failed.append(error)

    real = functional.scaled_dot_product_attention

    def waiting(*args: Tensor, **kwargs: object) -> Tensor:
        if torch.is_grad_enabled():
            other.start()
            assert inside.wait(20)
        else:
            inside.set()
            assert left.wait(20)
        return real(*args, **kwargs)

    other = threading.Thread(target=evaluate)
    with monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", waiting)
        loss(model, x, target).backward()
        left.set()
        other.join(20)
    imp.update()
    assert not failed
    assert not _get_current_function_mode_stack()
    expected = slopes(model, x, target).sum(0).square().float()
    found = of_heads(imp.compute()[first_weight(model)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_an_empty_batch_passes_and_a_scored_attention_keeps_nothing_alive():
    model, (x, _) = Net("self", True, False).double(), data()
    imp = tk.Importance(model, "taylor_fo_bn", layers=[first_weight(model)], example_inputs=x[:2])
    assert model(x[:0]).shape == (0, *model(x).shape[1:])
    there = weakref.ref(model)
    del model, imp
    gc.collect()
    assert there() is None


def test_sites_of_a_transformer():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(6, WIDTH), layer, nn.Linear(WIDTH, 5))
    channels = tk.trace(model, torch.randn(1, 4, 6))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = find_gate_sites(channels, model, layers)
    assert not found.hidden
    assert found.sites_of_layers()["0"] == ["0", "1.self_attn.out_proj.weight", "1.linear2"]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_gates_of_the_stream_add_up_over_what_writes_it(batch_first, batched):
    """By what comes in dim 0, as of all layers."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=batch_first)
    model = nn.Sequential(nn.Linear(6, WIDTH), layer, nn.Linear(WIDTH, 5)).double()
    x = torch.randn(*((3, 5, 6) if batched else (5, 6)), dtype=torch.float64)
    writers = {"0": model[0], "1.self_attn": layer.self_attn, "1.linear2": layer.linear2}
    imp = tk.Importance(model, "taylor_fo_gate", layers=["0"], example_inputs=x)
    written: dict[str, Tensor] = {}
    for name, module in writers.items():

        def note(_, __, output, name=name) -> None:
            written[name] = output[0] if isinstance(output, tuple) else output
            written[name].retain_grad()

        module.register_forward_hook(note)
    model(x).square().sum().backward()
    imp.update()
    total = torch.zeros(len(x), WIDTH, dtype=torch.float64)
    for name, y in written.items():
        module = writers[name]
        bias = module.out_proj.bias if name == "1.self_attn" else module.bias
        terms = (y - bias) * y.grad
        total += terms.sum(1) if batched else terms
    expected = total.square().mean(0).detach().float()
    torch.testing.assert_close(imp.compute()["0"], expected, rtol=1e-5, atol=0)
