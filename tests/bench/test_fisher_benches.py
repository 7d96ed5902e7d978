"""The benches of per-example squared gradients measure what they say, and their peers agree."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from bench import bench_conv2d_fisher, bench_fisher_step, fisher_report, fisher_steps, reference
from bench.__main__ import keep_others
from bench.figures import load
from bench.harness import Provider, measure, or_reason
from bench.models import ConvNet, ResNet, resnet18
from bench.report import all_targets, report
from bench.shapes import Layer, elements, layers_of, resnet50_weights
from tools.result_blocks import bench_block

CPU = torch.device("cpu")
TINY = {
    "convnet": lambda: ConvNet(widths=(5, 5, 6)),
    "resnet": lambda: ResNet(((6, 1), (8, 1)), bottleneck=False),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=list(TINY))
def problem(request):
    """A tiny network, a batch and the scores in float64, as the bench sets them up."""
    networks = {**bench_fisher_step.NETWORKS, request.param: (TINY[request.param], 5, 32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_fisher_step, "NETWORKS", networks)
        yield bench_fisher_step.problem.__wrapped__(request.param, 5, 32, CPU)


@pytest.mark.sample(10)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("way", [w for w in bench_fisher_step.WAYS if w != bench_fisher_step.PLAIN])
def test_every_way_gives_the_same_scores(way, problem):
    provider = bench_fisher_step.provider(way, *problem)
    if way == "Opacus" and not isinstance(problem[0], ConvNet):
        with pytest.raises((NotImplementedError, ModuleNotFoundError)):
            provider.run()
        return
    for _ in range(2):  # nothing is left over from the step before
        provider.before()
        try:
            answer = provider.run()
        except ModuleNotFoundError as error:
            pytest.skip(str(error))
        assert provider.check(answer) < 1e-3


def test_the_reference_is_autograd_on_one_example_after_another(problem):
    model, x, y, exact = problem
    model = copy.deepcopy(model).double()
    weight = next(model.parameters())
    squares = torch.zeros_like(weight)
    for n in range(len(x)):
        loss = cross_entropy(model(x[n : n + 1].double()), y[n : n + 1])
        squares += torch.autograd.grad(loss, weight)[0] ** 2
    expected = (weight**2 * squares / len(x)).flatten(1).sum(1)
    torch.testing.assert_close(next(iter(exact.values())), expected)


def test_torch_pruning_still_forgets_all_examples_but_the_last(problem):
    model, x, y, exact = problem
    scores = fisher_steps.TorchPruning(model, x, y, mended=False).run()
    with pytest.raises(AssertionError, match="off by"):
        reference.check_scores(scores, exact, bench_fisher_step.TOLERANCE["cpu"])
    alone = fisher_steps.ExampleByExample(model, x[-1:], y[-1:]).run()
    reference.check_scores(
        {name: len(x) * value for name, value in scores.items()},
        {name: value.double() for name, value in alone.items()},
        1e-3,
    )


@pytest.mark.parametrize("wrong", [0.9, 1.1, float("nan")])
def test_wrong_scores_are_found_out(problem, wrong):
    exact = problem[3]
    with pytest.raises(AssertionError, match="off by"):
        reference.check_scores({k: wrong * v for k, v in exact.items()}, exact, 2e-2)
    with pytest.raises(AssertionError, match="other layers"):
        reference.check_scores({}, exact, 2e-2)


LAYERS = [
    Layer("conv", (3, 7, 11, 9), (5, 7, 3, 3), 2, 1),
    Layer("pointwise", (2, 8, 6, 6), (4, 8, 1, 1)),
    Layer("tokens", (3, 13, 10), (6, 10)),
    Layer("features", (9, 10), (6, 10)),
]


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_layer_answers_agree_and_wrong_ones_are_found_out(layer, dtype, tf32):
    for provider in bench_conv2d_fisher.providers(layer, dtype, tf32, CPU):
        answer = provider.run()
        provider.check(answer)
        with pytest.raises(AssertionError, match="off by"):
            provider.check(answer * 1.2)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_layer_reference_is_autograd(layer):
    x, dy, w = bench_conv2d_fisher.inputs(layer, torch.float64, CPU)
    weight = w.requires_grad_()
    grads = []
    for n in range(len(x)):
        if w.dim() == 4:
            y = nn.functional.conv2d(x[n : n + 1], weight, None, layer.stride, layer.padding)
        else:
            y = nn.functional.linear(x[n : n + 1], weight)
        assert y.shape[1:] == layer.output[1:]
        grads.append(torch.autograd.grad(y, weight, dy[n : n + 1])[0])
    found = reference.fisher(x, dy, w.detach(), layer.stride, layer.padding)
    expected = sum((w * g) ** 2 for g in grads).flatten(1).sum(1)
    torch.testing.assert_close(found["squares"][0], expected.detach())
    torch.testing.assert_close(found["grads"][0], sum(grads).flatten())


def test_layers_are_those_of_the_network():
    layers = layers_of(resnet18(), (4, 3, 32, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        resnet18().to("meta")(torch.empty(4, 3, 32, 32, device="meta"))
    assert sum(layer.count * layer.flops for layer in layers) == counter.get_total_flops()
    assert sum(layer.count for layer in layers) == 21
    resnet50 = [e for (name, _), e in bench_conv2d_fisher.NETWORKS.items() if name == "resnet50"]
    weights = [layer.weight for layer in resnet50[0] for _ in range(layer.count)]
    assert elements(weights) == elements(resnet50_weights())


def test_slow_providers_take_part_in_the_first_rounds_only():
    fast = Provider("fast", lambda: None)
    slow = Provider("slow", lambda: None, rounds=2)
    results = measure("test", [fast, slow], 5, CPU)
    assert [len(results[label].samples) for label in ("fast", "slow")] == [5, 2]


def test_what_cannot_be_set_up_is_left_out_with_its_reason(capsys):
    def broken() -> Provider:
        raise ModuleNotFoundError("No module named 'peer'")

    results = measure("test", [or_reason("peer", broken)], 1, CPU)
    assert results["peer"].unavailable == "ModuleNotFoundError: No module named 'peer'"
    assert "No module named 'peer'" in capsys.readouterr().err


def entry(case: tuple[str, ...], label: str, role: str, family: str, seconds: float, **more):
    info = {"case": list(case), "provider": label, "role": role, "family": family, "error": 1e-6}
    stats = dict.fromkeys(("median", "min", "iqr"), seconds)
    return {"stats": stats, "extra_info": {**info, "peak_mib": 10.0, **more}}


def a_results_file(path):
    """Of made-up figures: a step, batches of two sizes, two layers."""
    found = []
    for label, role, family, ratio, peak in (
        ("forward + backward", "peer", "plain", 1.0, 1.0),
        ("ours, in tk.scoring", "ours", "taylor-kernels", 1.25, 1.4),
        ("Torch-Pruning's loop", "peer", "torch-pruning", 30.0, 2.0),
    ):
        ratios = {"ratio_to_plain": ratio, "peak_to_plain": peak}
        found.append(
            entry(("fisher_step", "convnet", "1 thread"), label, role, family, ratio, **ratios)
        )
        for images in (8, 64):
            if not (images == 64 and family == "torch-pruning"):  # too slow, left out
                case = ("fisher_batch", "convnet", f"{images} images")
                found.append(entry(case, label, role, family, images, images=images, **ratios))
    for layer, ours in (("conv", 2.0), ("fc", 1.0)):
        for label, role, seconds in (("weight gradient", "peer", 1.0), ("ours", "ours", ours)):
            shape = {"input": [2, 3, 8, 8], "weight": [4, 3, 3, 3], "stride": 2, "count": 3}
            speed = {"gflops": 7.0, "percent_of_peak": 50.0, "ratio_to_gradient": seconds}
            case = ("conv2d_fisher", "resnet50-bf16", layer)
            found.append(entry(case, label, role, "", seconds, **shape, **speed))
    machine = {"gpu": "a GPU", "torch": "2", "python_version": "3", "compiler": "c++"}
    raw = {
        "machine_info": machine,
        "commit_info": {},
        "datetime": "2026-01-01",
        "benchmarks": found,
    }
    path.write_text(json.dumps(raw))
    return load(path)


def test_report_holds_tables_targets_and_a_plot(tmp_path):
    results = a_results_file(tmp_path / "latest.json")
    reached = {target.what: (target.measured, target.reached) for target in all_targets(results)}
    assert reached == {
        "fisher_step convnet 1 thread: over forward + backward": (1.25, True),
        "fisher_step convnet 1 thread: peak memory over forward + backward's": (1.4, False),
        "fisher_batch convnet: time an image with 64, over that with 8": (1.0, True),
        "conv2d_fisher resnet50-bf16, ours: over the weight gradient (worst: conv)": (2.0, False),
    }
    text = report(results)
    assert "| 64 images | 64000 (1.00×) | 64000 (1.25×) | – |" in text
    assert "| all layers |  |  | 6000.00 | 9000.00 | 1.50 |  |  |" in text
    assert "| conv | 3 | 4×3×3×3 /2 on 2×8×8 | 1000 | 2000 | 2.00 | 7 (50%) | 7 (50%) |" in text
    assert "| Torch-Pruning's loop | 30.00 (10) |" in bench_block(results)
    fisher_report.draw_batches(results, tmp_path / "batches.png")
    assert (tmp_path / "batches.png").read_bytes().startswith(b"\x89PNG")


def test_partial_run_keeps_the_results_of_other_cases(tmp_path):
    latest, part = tmp_path / "latest.json", tmp_path / "part.json"
    a_results_file(latest)
    new = json.loads(latest.read_text())
    new |= {"commit_info": {"id": "0123456789abc", "dirty": True}, "datetime": "2026-02-02T00:00"}
    new["benchmarks"] = [b for b in new["benchmarks"] if b["extra_info"]["case"][2] == "conv"]
    for bench in new["benchmarks"]:
        bench["stats"]["median"] = 5.0
        bench["extra_info"]["run"] = "commit 0123456789+, 2026-02-02"
    old = json.loads(latest.read_text()) | {"finished": {"a": 60.0, "b": 30.0}}
    latest.write_text(json.dumps(old))
    part.write_text(json.dumps(new | {"finished": {"b": 20.0}}))
    keep_others(latest, part)
    assert json.loads(part.read_text())["finished"] == {"a": 60.0, "b": 20.0}
    before, after = load(latest), load(part)
    assert sorted(case.name for case in after.cases) == sorted(case.name for case in before.cases)
    assert {e.median for case in after.cases for e in case.entries if case.name[2] == "conv"} == {5}
    assert after.runs == ["commit unknown, 2026-01-01, a GPU", "commit 0123456789+, 2026-02-02"]
