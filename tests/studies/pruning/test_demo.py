"""The demo: its data, network, training and cache, and the whole job from the command line."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
pytest.importorskip("safetensors", reason="the demo needs safetensors")

from taylor_kernels.progress import ProgressLog
from taylor_kernels.studies.pruning import run as job
from taylor_kernels.studies.pruning import training
from taylor_kernels.studies.pruning.data import Split, load_digits, minibatches
from taylor_kernels.studies.pruning.model import DigitsResNet
from taylor_kernels.studies.pruning.settings import QUICK, Settings
from taylor_kernels.studies.pruning.store import export, load_weights, save_weights

#: Runs what follows where neither this package nor Torch-Pruning can be imported.
ALONE = "import sys; sys.modules['taylor_kernels'] = sys.modules['torch_pruning'] = None\n"


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_split_is_disjoint_complete_and_seeded():
    digits, again, other = load_digits(3), load_digits(3), load_digits(4)
    rows = torch.cat([digits.train_rows, digits.test_rows])
    assert torch.equal(rows.sort().values, torch.arange(1797))
    assert len(digits.test) == 449
    assert torch.equal(digits.train.images, again.train.images)
    assert torch.equal(digits.test_rows, again.test_rows)
    assert not torch.equal(digits.test_rows, other.test_rows)


def test_images_are_those_of_scikit_learn_normalised_by_the_training_split():
    from sklearn.datasets import load_digits as load

    digits = load_digits(0)
    assert digits.train.images.dtype == torch.float32
    assert digits.train.images.shape[1:] == (1, 8, 8)
    assert abs(digits.train.images.mean()) < 1e-5
    assert abs(digits.train.images.std() - 1) < 1e-5
    raw = torch.from_numpy(load().images)[digits.test_rows].unsqueeze(1)
    restored = digits.test.images * digits.std + digits.mean
    torch.testing.assert_close(restored.double(), raw, atol=1e-4, rtol=0)
    assert torch.equal(digits.test.labels, torch.from_numpy(load().target)[digits.test_rows])


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1e-9])
def test_split_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(ValueError, match="test_fraction"):
        load_digits(0, fraction)


def test_minibatches_are_seeded_full_and_without_repeats():
    split = Split(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
    first, again = (list(minibatches(split, 3, generator(5))) for _ in range(2))
    other = list(minibatches(split, 3, generator(6)))
    labels = torch.cat([label for _, label in first])
    assert [len(label) for _, label in first] == [3, 3, 3]
    assert labels.unique().numel() == 9
    assert torch.equal(labels, torch.cat([label for _, label in again]))
    assert not torch.equal(labels, torch.cat([label for _, label in other]))
    assert all(torch.equal(images.flatten(), label.float()) for images, label in first)


@pytest.mark.parametrize(("width", "blocks"), [(16, 2), (4, 1), (8, 3)])
def test_network_widths_and_shapes(width, blocks):
    model = DigitsResNet(width, blocks)
    widths = job.layer_widths(model)
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert model.blocks(model.stem(torch.randn(2, 1, 8, 8))).shape == (2, 4 * width, 2, 2)
    assert widths["stem.0"] == width
    assert [widths[f"blocks.{i}.conv2"] for i in range(3 * blocks)] == [
        width << stage for stage in range(3) for _ in range(blocks)
    ]
    shortcuts = [name for name in widths if "shortcut" in name]
    assert shortcuts == [f"blocks.{blocks}.shortcut.0", f"blocks.{2 * blocks}.shortcut.0"]


@pytest.mark.parametrize("arguments", [(0, 1), (16, 0)])
def test_network_of_no_size_is_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        DigitsResNet(*arguments)


def test_evaluate_counts_in_eval_mode_and_puts_the_mode_back():
    data = load_digits(0).test
    model = nn.Sequential(nn.Flatten(), nn.Dropout(1.0), nn.Linear(64, 10)).train()
    nn.init.zeros_(model[2].weight)
    model[2].bias.data = nn.functional.one_hot(torch.tensor(3), 10).float()
    assert training.evaluate(model, data) == (data.labels == 3).sum().item() / len(data)
    assert model.training


def test_flops_are_two_per_multiply_add():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 10))
    expected = 2 * (4 * 9 * 36 + 4 * 36 * 10)
    assert training.count_flops(model, torch.zeros(1, 1, 8, 8)) == expected
    assert training.count_parameters(model) == 36 + 1440 + 10


def test_latencies_time_every_model_alike():
    ran = []

    class Noted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            ran.append(self.name)
            return x

    times = training.latencies({n: Noted(n) for n in "ab"}, torch.zeros(1), repeats=4)
    assert "".join(ran[6:]) == "abbaabba"  # after three warm-up passes each
    for quartiles in times.values():
        assert 0 <= quartiles["q1"] <= quartiles["median"] <= quartiles["q3"]


def test_training_is_the_same_twice_and_learns():
    data = load_digits(0)
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = DigitsResNet(4, 1)
        training.train(
            model,
            data.train,
            epochs=2,
            batch_size=64,
            lr=0.1,
            weight_decay=0,
            generator=generator(),
        )
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    assert training.evaluate(model, data.test) > 0.8


@pytest.fixture
def small(tmp_path) -> Settings:
    return Settings(out=tmp_path, device="cpu", recipe=replace(QUICK, width=4, dense_epochs=2))


def test_dense_network_comes_from_the_cache_without_training(small, monkeypatch):
    data, log = load_digits(0), ProgressLog()
    _, first = job.dense_network(small, 0, data, log)
    trained = []
    monkeypatch.setattr(job, "train", lambda *_, **__: trained.append(1))
    _, again = job.dense_network(small, 0, data, log)
    assert (first["cached"], again["cached"], trained) == (False, True, [])
    assert first["accuracy"] == again["accuracy"]
    job.dense_network(replace(small, force=True), 0, data, log)
    assert trained == [1]


def test_damaged_cache_is_trained_anew(small, capsys):
    data, log = load_digits(0), ProgressLog()
    _, first = job.dense_network(small, 0, data, log)
    file = small.out / first["file"]
    file.write_bytes(file.read_bytes()[:100])
    _, again = job.dense_network(small, 0, data, ProgressLog())
    assert not again["cached"]
    assert again["accuracy"] == first["accuracy"]
    assert "is damaged" in capsys.readouterr().err


def test_cache_key_follows_what_decides_the_weights(small):
    keys = {
        small.dense_key(0),
        small.dense_key(1),
        *(
            replace(small, recipe=replace(small.recipe, **change)).dense_key(0)
            for change in ({"dense_epochs": 3}, {"dense_lr": 0.2}, {"width": 5}, {"threads": 2})
        ),
    }
    assert len(keys) == 6
    same = replace(small, flops=0.3, recipe=replace(small.recipe, every=7))
    assert same.dense_key(0) == small.dense_key(0)


def test_weights_of_another_network_are_refused(tmp_path):
    save_weights(DigitsResNet(4, 1), tmp_path / "w")
    with pytest.raises(ValueError, match="another network"):
        load_weights(DigitsResNet(5, 1), tmp_path / "w")
    assert load_weights(DigitsResNet(4, 1), tmp_path / "none") is False


def test_export_is_in_eval_mode_and_leaves_the_model_alone(tmp_path):
    model = DigitsResNet(4, 1).train()
    facts = export(model, tmp_path / "m.pt2")
    assert model.training
    assert facts["max_abs_difference"] < 1e-5
    program = torch.export.load(tmp_path / "m.pt2").module()
    images = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(program(images), model.eval()(images))


def demo(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "taylor_kernels.cli", "demo", "--quick", "--device", "cpu"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, dict, subprocess.CompletedProcess]:
    """The demo run once: its folder, its result.json and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    done = demo("--out", str(out), "--seed", "7")
    return out, json.loads((out / "result.json").read_text()), done


@pytest.mark.slow
def test_demo_reaches_its_target_and_learns(quick):
    _, result, _ = quick
    dense = result["dense"][0]
    assert dense["accuracy"] >= 0.975
    assert [run["criterion"] for run in result["runs"]] == [
        "taylor_fo_bn",
        "magnitude_l2",
        "random",
    ]
    for run in result["runs"]:
        assert 0.4 < run["flops"] / dense["flops"] <= 0.5
        assert run["parameters"] < dense["parameters"]
        fractions = [step["flops"] for step in run["steps"]]
        assert fractions == sorted(fractions, reverse=True)
        assert fractions[-1] == pytest.approx(run["flops"] / dense["flops"], rel=1e-6)
        for layer, (before, after) in run["widths"].items():
            assert before - after == len(run["removed"].get(layer, ()))
    assert result["runs"][0]["accuracy"] > 0.95


@pytest.mark.slow
def test_exported_network_needs_only_torch_and_is_what_result_json_says(quick, tmp_path):
    out, result, _ = quick
    test = load_digits(7).test
    torch.save((test.images, test.labels), tmp_path / "test.pt")
    script = ALONE + (
        "import json, torch\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        f"model = torch.export.load({str(out / 'pruned.pt2')!r}).module()\n"
        f"images, labels = torch.load({str(tmp_path / 'test.pt')!r})\n"
        "with torch.no_grad():\n"
        "    right = (model(images).argmax(1) == labels).sum().item()\n"
        "    one = (model(images[:1]).argmax(1) == labels[:1]).item()\n"
        "    with FlopCounterMode(display=False) as counter: model(images[:1])\n"
        "print(json.dumps([right / len(labels), counter.get_total_flops(),\n"
        "                  sum(p.numel() for p in model.parameters())]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    accuracy, flops, parameters = json.loads(done.stdout)
    pruned = result["runs"][0]
    assert (flops, parameters) == (pruned["flops"], pruned["parameters"])
    assert accuracy == pruned["accuracy"]
    assert result["files"]["pruned.pt2"]["criterion"] == pruned["criterion"]


@pytest.mark.slow
def test_report_holds_every_figure_and_no_reference_outside(quick):
    out, result, _ = quick
    page = (out / "report.html").read_text()
    for name in ("accuracy_vs_flops.png", "widths.png", "importance.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"<code>{name}</code>" in page
    assert page.count("<picture>") == 3
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 6
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|url\(|@import", re.sub(r'"data:[^"]*"', "", page))
    assert html.escape(result["command"]) in page
    for run in result["runs"]:
        assert f"{100 * run['accuracy']:.1f}" in page
        assert f"{run['parameters']:,}" in page


@pytest.mark.slow
def test_demo_prints_one_table_to_standard_output_and_progress_beside_it(quick):
    _, result, done = quick
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()]
    for run in result["runs"]:
        row = next(row for row in rows if row[0] == run["criterion"])
        assert row[1] == f"{run['parameters']:,}"
        assert f"{100 * run['accuracy']:.1f}" in row
    assert "fine-tune" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.slow
def test_second_run_skips_the_training_and_gives_the_same(quick):
    out, result, _ = quick
    done = demo("--out", str(out), "--seed", "7", "--criteria", "taylor_fo_bn")
    again = json.loads((out / "result.json").read_text())
    assert "train dense" not in done.stderr
    assert again["dense"][0]["cached"]
    assert again["dense"][0]["accuracy"] == result["dense"][0]["accuracy"]
    first, second = result["runs"][0], again["runs"][0]
    for key in ("accuracy", "flops", "parameters", "widths", "removed", "steps"):
        assert first[key] == second[key]
