"""`taylor-kernels at-init`: what it measures, that it goes on where it was, what it says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("sklearn", reason="the studies need scikit-learn")
pytest.importorskip("matplotlib", reason="the studies need matplotlib")
pytest.importorskip("mnist1d", reason="the studies need mnist1d")

from taylor_kernels.methods import FRAMES, at_init
from taylor_kernels.methods.masks import Held
from taylor_kernels.studies.at_init import findings, measure
from taylor_kernels.studies.at_init.measure import CONTROLS, Measurement, packed, unpacked
from taylor_kernels.studies.at_init.problem import Problem, Recipe, Trainer, digits_problem
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.data import Split, load_digits
from taylor_kernels.studies.methods import at_init as study
from taylor_kernels.studies.methods.pages import facts_of, summary_row
from taylor_kernels.studies.methods.problems import DeepMlp
from taylor_kernels.studies.methods.study import Way, run
from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.plotting import draw
from tests.helpers.problems import quiet
from tests.helpers.user_models import command

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(epochs=2, lr=0.1)
SPARSITIES = (0.5, 0.9)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))


def images(number: int) -> Split:
    labels = torch.arange(number) % 3
    values = torch.randn(number, 1, 4, 4, generator=torch.Generator().manual_seed(number))
    values[torch.arange(number), 0, labels] += 1.5
    return Split(values, labels)


def problem() -> Problem:
    return digits_problem("small", network, images(96), images(60), 3, batches=2, batch_size=16)


def measurement(folder) -> Measurement:
    return Measurement(problem(), RECIPE, Cache(folder), quiet())


def test_a_point_is_what_the_frame_gives(tmp_path):
    """Against Frame.run in one piece, by hand: the same bits of loss, under each control."""
    frame = FRAMES["SNIP"]
    found = measurement(tmp_path).curve(frame, SPARSITIES)
    assert [(p["sparsity"], p["control"]) for p in found] == [
        (s, control) for s in SPARSITIES for control in CONTROLS
    ]
    small = problem()
    batches = [(x.clone(), y.clone()) for x, y in small.scored]
    for point in found:
        kept = 1 - point["sparsity"]
        masks = at_init(small.make(), "snip", kept, batches, F.cross_entropy)
        assert point["left"] == {name: int(mask.sum()) for name, mask in masks.items()}
    model = small.make()
    masks = at_init(model, "snip", 0.5, batches, F.cross_entropy)
    with Held(model, masks):
        Trainer(small, RECIPE, lambda *_, **__: None)(model, 0, RECIPE.epochs)
    test = images(60)
    loss = F.cross_entropy(model.eval()(test.images), test.labels).item()
    assert found[0]["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_run_that_was_stopped_goes_on_to_the_same_points(tmp_path, monkeypatch):
    frame = FRAMES["lottery ticket"]
    whole = measurement(tmp_path / "whole").curve(frame, SPARSITIES)
    calls: list[tuple[int, int]] = []
    stop = 8  # after the five trainings of the first mask and two of its networks
    plain = Trainer.__call__

    def counted(self, model, first, last):
        calls.append((first, last))
        if len(calls) == stop:
            raise KeyboardInterrupt
        plain(self, model, first, last)

    monkeypatch.setattr(Trainer, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        measurement(tmp_path / "stopped").curve(frame, SPARSITIES)
    stop = 0
    calls.clear()
    again = measurement(tmp_path / "stopped").curve(frame, SPARSITIES)
    assert again == whole
    assert len(calls) == 1 + 5 + 3  # what was left of the first sparsity, and the second
    calls.clear()
    assert measurement(tmp_path / "stopped").curve(frame, SPARSITIES) == whole
    assert not calls


def test_masks_are_kept_as_bits():
    for shape in ((3, 5), (7, 2, 3, 3), (8, 1)):
        mask = torch.rand(shape) < 0.5
        text = packed(mask)
        assert unpacked(text, mask.shape).equal(mask)
        assert len(text) <= (mask.numel() // 8 + 1) * 5 / 4 + 2


@pytest.mark.parametrize("seed", [0, 1])
def test_synflow_keeps_every_layer_where_snip_does_not(seed):
    data = load_digits(seed)
    torch.manual_seed(seed)
    model = DeepMlp(data.train.images.shape[1:])
    batch = data.train.images[:256], data.train.labels[:256]
    empty = {}
    for name in ("snip", "synflow"):
        masks = at_init(model, name, 0.005, [batch], F.cross_entropy)
        empty[name] = sum(1 for mask in masks.values() if not mask.any())
    assert empty["synflow"] == 0 < empty["snip"]


def points(method: str, losses: dict[str, dict[float, float]], left: int = 1) -> list[dict]:
    """Of one seed: control -> sparsity -> accuracy."""
    return [
        {"method": method, "control": control, "sparsity": s, "seed": 0, "accuracy": value,
         "left": {"one": 9, "two": left}}
        for control, each in losses.items()
        for s, value in each.items()
    ]  # fmt: skip


def test_statements_are_judged_by_the_data():
    plain, shuffled, anew = CONTROLS
    found = points("SNIP", {plain: {0.9: 0.97, 0.995: 0.5}}, left=0)
    found += points(
        "SynFlow",
        {
            plain: {0.9: 0.97, 0.995: 0.9},
            shuffled: {0.9: 0.965, 0.995: 0.85},
            anew: {0.9: 0.969, 0.995: 0.9},
        },
    )
    found += points("lottery ticket", {plain: {0.9: 0.97}, shuffled: {0.9: 0.91}})
    said = {row[0]: row[1:] for row in findings.findings(found)}
    assert said["SynFlow leaves no layer empty where SNIP does"] == [
        "at 99.5%: SNIP 1, SynFlow 0 of 2 layers empty", "yes"
    ]  # fmt: skip
    assert said["SynFlow loses little by its mask shuffled within layers"] == [
        "to 95% 0.5 to 0.5 points; above 5.0 to 5.0 points", "not at 99.5%"
    ]  # fmt: skip
    assert said["SynFlow loses little by new weights"][1] == "yes"
    ticket = said["lottery ticket loses more than a little by its mask shuffled within layers"]
    assert ticket == ["to 95% 6.0 to 6.0 points", "yes"]
    assert len(said) == 4  # SNIP has a layer empty, and so nothing to lose


def test_the_study_from_end_to_end(tmp_path):
    small = {"sparsities": [0.9, 0.95], "epochs": 1, "batches": 1}
    ways = {
        label: Way(way.run, {**way.settings, **small})
        for label, way in study.STUDY.ways.items()
        if label in ("dense", "SNIP", "SynFlow")
    }
    made = replace(study.STUDY, ways=ways, problems=[study.DEEP])
    runs = run(made, Cache(tmp_path), quiet(), seeds=1)
    result = facts_of(made) | {"runs": runs}
    assert runs[0]["accuracy"] == runs[1]["dense"]["accuracy"] > 0.15  # trained once
    assert len(list(tmp_path.glob("dense-*"))) == 1
    assert [run["accuracy"] for run in runs[1:]] == [
        next(p["accuracy"] for p in run["points"] if p["sparsity"] == 0.95) for run in runs[1:]
    ]
    assert len(made.table(result).rows) == 2 * 3
    assert made.more["statements"](result).rows[0][1].startswith("SynFlow leaves no layer")
    row = summary_row(result | {"summary": made.summary(result)})
    assert "SynFlow" in row[2]
    assert "SNIP" not in row[2]
    assert row[3] == "20× (95% of the weights go)"
    assert "furthest apart" not in made.table(result).caption  # one seed
    other = [run | {"seed": 1, "points": [dict(p) for p in run["points"]]} for run in runs[1:]]
    plain = next(n for n, p in enumerate(runs[1]["points"]) if p["control"] == "as found")
    first = runs[1]["points"][plain]
    other[0]["points"][plain]["accuracy"] = -1.0  # further than any other is from itself
    of_two = made.table(result | {"runs": runs + other}).caption
    assert f"furthest apart for SNIP at {first['sparsity']:.0%} (" in of_two
    assert of_two.endswith(f"): {100 * first['accuracy']:.1f}, -100.0.")
    draw(made.plot(result), tmp_path / "it.png", alt="", caption="")
    assert (tmp_path / "it.png").stat().st_size > 10_000


OWN = ("--model", "mynets:make_model", "--data", "mynets:make_loader")
FEW = ("--epochs", "1", "--batches", "2", "--sparsity", "0.8", "--method", "SynFlow")


def test_a_users_model_is_compared_and_the_run_goes_on(folder, capsys):
    arguments = ("at-init", *OWN, *FEW, "--method", "random", "--out", "out")
    code, out, err = command(capsys, *arguments)
    assert code == 0, err
    result = json.loads((folder / "out/result.json").read_text())
    assert result["weights"] == {"one.0.weight": 72, "two.0.weight": 720, "head.weight": 40}
    assert len(result["points"]) == 2 * 3
    for point in result["points"]:
        assert sum(point["left"].values()) == int(832 * 0.2)
        assert 0 <= point["accuracy"] <= 1
    page = (folder / "out/report.html").read_text()
    for words in ("SynFlow", "shuffled", "Layers without a weight", "dense"):
        assert words in page
    assert "SynFlow" in out
    assert (folder / "out/at_init.png").stat().st_size > 10_000
    calls = len((folder / "calls").read_text())
    code, _, err = command(capsys, *arguments)
    assert code == 0, err
    again = json.loads((folder / "out/result.json").read_text())
    assert again["points"] == result["points"]
    assert len((folder / "calls").read_text()) - calls <= 2  # the model is tried once
    assert "seed 0: SynFlow" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sparsity", "95"], "tenth of the weights; for 95% write 0.95"),
        (["--sparsity", "1"], "--sparsity: 1 is not in [0, 1)"),
        (["--method", "snip"], "did you mean 'SNIP'?"),
        (["--method", "filters by L1"], "--method: 'filters by L1' is not one of"),
        (["--epochs", "0"], "--epochs: 0 is below 1"),
        (["--early", "9"], "--early: 9 is not between 0 and the 8 epochs"),
        (["--lr", "nan"], "--lr: nan is not a positive number"),
        (["--model", "mynets:make_model"], "--model: needs --data beside it"),
        (["--val", "mynets:make_loader"], "--val: is for --model and --data"),
        ([*OWN[:2], "--data", "mynets:triple"], "not a pair (inputs, targets)"),
        ([*OWN, "--loss", "mynets:vector"], "--loss: it gave shape"),
        ([*OWN[:2], "--data", "mynets:later_nan", *FEW], "--lr: the loss is nan"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folder, capsys, arguments, says):
    code, out, err = command(capsys, "at-init", "--out", "out", *arguments)
    assert code == 2
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert says in line


def test_scores_that_are_not_finite_name_the_argument(tmp_path):
    broken = replace(problem(), loss=lambda outputs, targets: outputs.sum() * torch.nan)
    small = Measurement(broken, RECIPE, Cache(tmp_path), quiet())
    with pytest.raises(Mistake, match=r"--scores: those of '1\.weight' are not finite"):
        small.curve(FRAMES["SNIP"], [0.5])
    assert not list(tmp_path.glob("masks-*"))
    assert measure.CONTROLS[findings.PLAIN] is None
