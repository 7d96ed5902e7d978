"""`taylor-kernels prune` on a model and a loader of one's own, as a user would type it."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("matplotlib", reason="prune needs matplotlib")
pytest.importorskip("safetensors", reason="prune needs safetensors")

from matplotlib.image import imread
from safetensors.torch import load_file

import taylor_kernels as tk
from tests.helpers.user_models import MODEL_AND_DATA, command

pytestmark = pytest.mark.usefixtures("one_thread")

PRUNE = (*MODEL_AND_DATA, "--out", "out", "--lr", "0.02")


def flops_of(model, x) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def test_a_users_model_is_pruned_whole(folder, capsys):
    code, out, err = command(
        capsys, "prune", *PRUNE, "--flops", "0.6", "--epochs", "4", "--finetune", "2"
    )
    assert code == 0, err
    result = json.loads((folder / "out/result.json").read_text())
    page = (folder / "out/report.html").read_text()

    mynets = sys.modules["mynets"]
    x, dense = torch.randn(5, 1, 6, 6), mynets.make_model().eval()
    pruned = tk.load_pruned(mynets.make_model(), folder / "out/pruned.safetensors").eval()
    assert flops_of(pruned, x) <= 0.6 * flops_of(dense, x)
    program = torch.export.load(folder / "out/pruned.pt2").module()
    with torch.no_grad():
        expected = pruned(x)
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
    onnx = pytest.importorskip("onnx.reference", reason="ONNX is an output where it is installed")
    evaluator = onnx.ReferenceEvaluator(str(folder / "out/pruned.onnx"))
    (got,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)

    assert [file["missing"] for file in result["files"]] == ["", "", ""]
    assert [file["batch"] for file in result["files"]] == ["any", "any", "any"]
    # Twenty minibatches of pruning in four epochs of five, then ten of fine-tuning.
    assert result["pruned_at"] <= 20
    assert result["course"][-1]["minibatch"] == result["pruned_at"] + 10
    widths = {"one.0": pruned.one[0].out_channels, "two.0": pruned.two[0].out_channels}
    assert {name: after for name, (_, after) in result["widths"].items()} == widths
    assert {n: b - len(result["removed"].get(n, ())) for n, b in (("one.0", 8), ("two.0", 10))} == (
        widths
    )
    assert list(result["skipped"]) == ["head"]
    assert result["final"]["flops_fraction"] == pytest.approx(
        flops_of(pruned, x) / flops_of(dense, x), abs=1e-5
    )
    assert not pruned.one[0].weight.requires_grad  # it was frozen, and stays so

    scores = load_file(folder / "out/scores.safetensors")
    assert scores["two.0"].shape == scores["two.0.standard_error"].shape == (10,)
    assert not re.search(r"https?://|url\(|@import", re.sub(r'"data:[^"]*"', "", page))
    for words in ("Before and after", "What cannot go", "reaches the output", "pruned.onnx"):
        assert words in page
    for name in ("course.png", "widths.png", "scores.png"):
        assert imread(folder / "out" / name)[..., :3].std() > 0.02
    for name in ("fine-tuned", "one.0", "two.0", "pruned.pt2"):
        assert any(line.split()[:1] == [name] for line in out.splitlines()), name
    assert out.splitlines()[-1] == "out/pruned.onnx"
    assert not (folder / "out/checkpoint.pt").exists()


def test_a_dry_run_says_what_would_go_and_writes_nothing(folder, capsys):
    arguments = (*PRUNE, "--params", "0.5", "--batches", "2", "--dry-run")
    code, out, err = command(capsys, "prune", *arguments)
    assert code == 0, err
    assert "ms per minibatch" in out
    assert re.search(r"^ head +reaches the output of the model", out, re.MULTILINE)
    assert not (folder / "out").exists()
    code, out, _ = command(capsys, "prune", *arguments, "--json")
    plan = json.loads(out)
    assert plan["skipped"] == {"head": "reaches the output of the model"}
    for name in ("params", "flops", "filters"):
        kept = [stop[name] for stop in plan["stops"]]
        assert kept == sorted(kept, reverse=True)
    assert plan["stops"][0]["params_fraction"] == 1
    assert plan["stops"][-1]["params_fraction"] <= 0.5 < plan["stops"][-2]["params_fraction"]
    assert all(stop["ms"] > 0 and stop["loss"] > 0 for stop in plan["stops"])
    for before, left in plan["widths"].values():
        assert len(left) == len(plan["stops"]) - 1
        assert before >= left[0] >= left[-1] >= 1
    gone = sum(before - left[-1] for before, left in plan["widths"].values())
    assert gone == plan["stops"][0]["filters"] - plan["stops"][-1]["filters"]


@pytest.mark.usefixtures("weights_alone")
@pytest.mark.parametrize("options", [("--dry-run",), ("--finetune", "1")])
def test_whole_blocks_go_too(options, folder, capsys):
    given = (
        "--model",
        "mynets:residual",
        "--data",
        "mynets:make_loader",
        "--criterion",
        "taylor_fo",
    )
    targets = ("--blocks", "--params", "0.4", "--min-filters", "5", "--out", "out", *options)
    code, out, err = command(capsys, "prune", *given, *targets, "--json")
    assert code == 0, err
    result = json.loads(out)
    gone, left = result["blocks"]["gone"], result["blocks"]["left"]
    assert gone
    assert sorted(gone + left) == ["2", "3", "4", "5"]
    code, out, err = command(capsys, "prune", *given, *targets, "--force")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    assert ["gone", f"{len(gone)}"] in [row[:2] for row in rows]
    if "--dry-run" not in options:
        page = (folder / "out/report.html").read_text()
        assert "residual blocks" in page
        assert ", ".join(gone) in page
        fresh = sys.modules["mynets"].residual()
        pruned = tk.load_pruned(fresh, folder / "out/pruned.safetensors")
        assert all(isinstance(pruned.get_submodule(name), torch.nn.Identity) for name in gone)


def test_what_cannot_be_exported_is_a_line_and_no_error(folder, capsys):
    with open(folder / "mynets.py", "a") as file:
        file.write(
            "class Odd(Net):\n"
            "    def forward(self, x):\n"
            "        if x.sum() > 1e9:\n"
            "            x = -x\n"
            "        return Net.forward(self, x)\n"
        )
    code, out, err = command(
        capsys, "prune", "--model", "mynets:Odd", "--data", "mynets:make_loader", "--out", "out",
        "--filters", "0.7", "--per-step", "3", "--every", "1", "--finetune", "0",
    )  # fmt: skip
    assert code == 0, err
    assert re.search(r"^pruned\.pt2 is not written: \w+: .*", err, re.MULTILINE)
    assert "pruned.onnx is not written: it is made from pruned.pt2" in err
    assert out.splitlines()[-1] == "out/pruned.safetensors"
    assert not list((folder / "out").glob("pruned.pt2*"))
    page = (folder / "out/report.html").read_text()
    assert "not written" in page


@pytest.mark.usefixtures("weights_alone")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--optimizer", "torch.optim:AdamW", "--lr", "0.001"), "AdamW"),
        (("--optimizer", "mynets:rmsprop"), "RMSprop"),
        (("--amp", "--criterion", "taylor_so_diag"), "SGD"),
    ],
)
def test_optimizers_and_half_types(options, named, folder, capsys):
    with open(folder / "mynets.py", "a") as file:
        file.write(
            "def rmsprop(model):\n    return torch.optim.RMSprop(model.parameters(), lr=1e-3)\n"
        )
    code, out, err = command(
        capsys, "prune", *MODEL_AND_DATA, "--out", "out", "--filters", "0.7", "--epochs", "1",
        "--batches", "2", *options, "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["optimizer"] == named
    assert result["final"]["filters_fraction"] <= 0.7
    assert result["pruned_at"] <= 5


@pytest.mark.usefixtures("weights_alone")
def test_float16_scales_its_loss(folder, capsys, monkeypatch):
    from taylor_kernels.studies.own.settings import PruneSettings

    monkeypatch.setattr(PruneSettings, "amp_dtype", lambda self: torch.float16)
    code, out, err = command(
        capsys, "prune", *PRUNE, "--filters", "0.7", "--epochs", "2", "--amp", "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["final"]["filters_fraction"] <= 0.7
    assert result["final"]["loss"] < 5
    arguments = (*PRUNE[:-2], "--filters", "0.7", "--batches", "1", "--amp", "--dry-run")
    code, _, err = command(capsys, "prune", *arguments)
    assert code == 0, err


@pytest.mark.usefixtures("weights_alone")
def test_a_model_that_is_there_already_keeps_its_values_for_the_files(folder, capsys):
    code, _, err = command(
        capsys, "prune", "--model", "mynets:model", "--data", "mynets:pairs", "--val",
        "mynets:pairs", "--out", "out", "--filters", "0.7", "--every", "1",
    )  # fmt: skip
    assert code == 0, err
    files = json.loads((folder / "out/result.json").read_text())["files"]
    assert files[0]["missing"] == ""
    assert files[0]["difference"] == 0


@pytest.mark.usefixtures("weights_alone")
def test_minibatches_of_other_kinds(folder, capsys):
    with open(folder / "mynets.py", "a") as file:
        file.write(
            "class Named(Net):\n"
            "    def forward(self, pixels, labels=None):\n"
            "        logits = Net.forward(self, pixels)\n"
            "        if labels is None:\n"
            "            return {'logits': logits}\n"
            "        return {'loss': nn.functional.cross_entropy(logits, labels),\n"
            "                'logits': logits}\n"
            "def dicts():\n"
            "    return [{'pixels': torch.randn(6, 1, 6, 6), 'labels': torch.randint(0, 4, (6,))}\n"
            "            for _ in range(3)]\n"
            "def renamed():\n"
            "    return [{'image': b['pixels'], 'label': b['labels']} for b in dicts()]\n"
            "def forward(model, batch):\n"
            "    outputs = model(batch['image'], labels=None)['logits']\n"
            "    return nn.functional.cross_entropy(outputs, batch['label'])\n"
            "def of_logits(outputs, targets):\n"
            "    return nn.functional.cross_entropy(outputs['logits'], targets)\n"
        )
    common = ("--model", "mynets:Named", "--out", "out", "--filters", "0.8", "--every", "1")
    for options in (
        ("--data", "mynets:dicts"),
        ("--data", "mynets:dicts", "--loss", "mynets:of_logits"),
        ("--data", "mynets:renamed", "--forward", "mynets:forward"),
    ):
        code, out, err = command(capsys, "prune", *common, *options, "--json")
        assert code == 0, err
        result = json.loads(out)
        assert result["final"]["filters_fraction"] <= 0.8
        assert result["files"][0]["difference"] == 0
        assert ("accuracy" in result["final"]) == ("--forward" not in options)


ODD_OUTPUTS = """
class RulesOut(Net):
    def forward(self, x):
        return Net.forward(self, x).masked_fill(torch.tensor([0, 0, 0, 1]).bool(), -torch.inf)
class Noisy(Net):
    def forward(self, x):
        return Net.forward(self, x + torch.randn_like(x))
class Counts(Net):
    runs = 0
    def forward(self, x):
        Counts.runs += Path("out/pruned.safetensors").exists()
        return Net.forward(self, x) * (1 + Counts.runs)
def three():
    return [(torch.randn(6, 1, 6, 6), torch.randint(0, 3, (6,))) for _ in range(3)]
kept = Net()
def the_same():
    return kept
class Stateful(Net):
    def get_extra_state(self):
        return "notes"
    def set_extra_state(self, state):
        pass
"""


@pytest.mark.usefixtures("weights_alone")
@pytest.mark.parametrize("model", ["RulesOut", "Noisy", "the_same", "Counts", "Stateful"])
def test_what_was_trained_is_never_lost(model, folder, capsys):
    with open(folder / "mynets.py", "a") as file:
        file.write(ODD_OUTPUTS)
    code, _, err = command(
        capsys, "prune", "--model", f"mynets:{model}", "--data", "mynets:three", "--out", "out",
        "--filters", "0.8", "--per-step", "4", "--every", "1", "--finetune", "0", "--batches", "1",
    )  # fmt: skip
    assert code == 0, err
    weights, checkpoint = folder / "out/pruned.safetensors", folder / "out/checkpoint.pt"
    if model == "Stateful":  # safetensors cannot hold it, so the checkpoint is all there is
        assert not weights.exists()
        assert checkpoint.exists()
        assert "the trained model is in out/checkpoint.pt alone, which stays" in err
        return
    assert weights.exists()
    assert not checkpoint.exists()
    saved = json.loads((folder / "out/result.json").read_text())["files"][0]
    assert (saved["difference"], saved["varies"]) == (0, model == "Counts")
