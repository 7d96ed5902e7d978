"""The demo from the command line: one quick run, and a second one that goes on from it."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
pytest.importorskip("safetensors", reason="the demo needs safetensors")

from taylor_kernels.studies.data import load_digits
from tests.helpers.programs import Run, run_module, run_program, undrawn

#: Runs what follows where neither this package nor Torch-Pruning can be imported.
ALONE = "import sys; sys.modules['taylor_kernels'] = sys.modules['torch_pruning'] = None\n"

pytestmark = pytest.mark.usefixtures("one_thread")


#: An epoch of fine-tuning makes up for what was pruned; what is timed is of no matter here.
SHORT = """
from dataclasses import replace
from taylor_kernels.studies.pruning import settings
settings.QUICK = replace(
    settings.QUICK, finetune_epochs=1, latency_batch=8, latency_repeats=2
)
"""


def demo(*arguments: str, before: str = "") -> Run:
    given = ("demo", "--quick", "--device", "cpu", *arguments)
    done = run_module("taylor_kernels.cli", *given, before=SHORT + before, optimizers=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, dict, Run]:
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
    done = run_program(script)
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
    given = ("--out", str(out), "--seed", "7", "--criteria", "taylor_fo_bn")
    done = demo(*given, before=undrawn("taylor_kernels.studies.pruning.pages"))
    again = json.loads((out / "result.json").read_text())
    assert "train dense" not in done.stderr
    assert again["dense"][0]["cached"]
    assert again["dense"][0]["accuracy"] == result["dense"][0]["accuracy"]
    first, second = result["runs"][0], again["runs"][0]
    for key in ("accuracy", "flops", "parameters", "widths", "removed", "steps"):
        assert first[key] == second[key]
