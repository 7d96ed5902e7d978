"""The study on digits: its targets, what it says of its figures, and the whole quick run."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the study needs SciPy")
pytest.importorskip("sklearn", reason="the study needs scikit-learn")
pytest.importorskip("matplotlib", reason="the study needs matplotlib")

from matplotlib.image import imread

from bench import study
from taylor_kernels.studies.oracle import findings
from taylor_kernels.studies.oracle.late_norms import NETWORKS as LATE_NORM_NETWORKS
from taylor_kernels.studies.oracle.remarks import remarks
from taylor_kernels.studies.oracle.settings import OracleSettings
from tests.helpers import ROOT
from tests.helpers.programs import Run, run_module, undrawn


def a_result(**spearman: float) -> dict:
    """A result with these Spearman coefficients, and curves on which all criteria are alike."""
    curve = [{"removed": n, "accuracy": 1 - n / 40, "loss": n} for n in (0, 10, 20, 30)]
    kinds = {kind: copy.deepcopy(curve) for kind in ("one_shot", "rescored", "finetuned")}
    criteria: dict = {
        name: {
            "all": {"spearman": value, "pearson": value - 0.2, "kendall": value},
            "within": {"spearman": value, "pearson": value, "kendall": value},
            **copy.deepcopy(kinds),
        }
        for name, value in spearman.items()
    }
    criteria["oracle"] = copy.deepcopy(kinds)
    network = {
        "widths": {"a": 25, "b": 15},
        "criteria": criteria,
        "oracle": {"top_share": 0.9},
    }
    names = [(name, seed) for name in ("cnn", "resnet") for seed in range(3)]
    late = {"taylor_fo_bn": {"train": 0.93}, "taylor_so_diag": {"train": 0.5}}
    return {
        "networks": [
            {**copy.deepcopy(network), "architecture": name, "seed": seed} for name, seed in names
        ],
        "late_norms": [
            {"network": name, "criteria": copy.deepcopy(late)} for name in LATE_NORM_NETWORKS
        ],
    }


GOOD = dict(taylor_fo_bn=0.96, taylor_so_diag=0.985, magnitude_l2=0.4, random=0.01)


def lower(result: dict, criterion: str, kind: str, by: float) -> None:
    for network in result["networks"]:
        for point in network["criteria"][criterion][kind][1:]:
            point["accuracy"] -= by


def test_targets_are_reached_and_missed_by_their_figures():
    result = a_result(**GOOD)
    lower(result, "magnitude_l2", "rescored", 0.1)
    assert study.missed(result) == []
    for name, value in {"taylor_fo_bn": 0.94, "taylor_so_diag": 0.97, "random": -0.2}.items():
        worse = a_result(**GOOD | {name: value})
        lower(worse, "magnitude_l2", "rescored", 0.1)
        assert [name in target.what for target in study.missed(worse)] == [True, True]
    for name in ("taylor_fo_bn", "taylor_so_diag"):
        worse = copy.deepcopy(result)
        lower(worse, name, "rescored", 0.2)
        assert [target.what for target in study.missed(worse)] == [
            f"{net}: accuracy at half, re-scored, {name}" for net in ("cnn", "resnet")
        ]
    for rho in (0.89, None, float("nan")):  # a figure too low, and none at all
        worse = copy.deepcopy(result)
        worse["late_norms"][1]["criteria"]["taylor_fo_bn"]["train"] = rho
        (missed,) = study.missed(worse)
        assert missed.what.startswith(worse["late_norms"][1]["network"])


def test_magnitudes_are_the_bar_as_they_rank_best():
    result = a_result(**GOOD, **{"magnitude_l2, unscaled": 0.8})
    lower(result, "magnitude_l2", "rescored", 0.1)
    assert len(study.missed(result)) == 4  # unscaled they lose as little as the others
    lower(result, "magnitude_l2, unscaled", "rescored", 0.05)
    assert study.missed(result) == []
    assert any(t.limit == "> 45.0% (l2, unscaled)" for t in findings.targets(result))


def test_a_study_that_is_not_whole_is_no_pass():
    partial = a_result(**{name: GOOD[name] for name in ("taylor_fo_bn", "random")})
    with pytest.raises(ValueError, match="run the whole study"):
        study.missed(partial)
    one = a_result(**GOOD)
    one["networks"] = one["networks"][:3]
    with pytest.raises(ValueError, match="figures for 7 of 12 targets"):
        study.missed(one)
    without = a_result(**GOOD)
    del without["late_norms"]
    with pytest.raises(ValueError, match="figures for 10 of 12 targets"):
        study.missed(without)


def said(result: dict) -> str:
    return "\n".join(remarks(result))


def test_what_is_said_follows_the_figures():
    text = said(a_result(**GOOD, taylor_fo=0.7, obd_bn=0.99, taylor_so_bn=0.9))
    assert "Contradicted: a correlation above 0.93" in text  # Pearson is 0.76
    assert "Confirmed: the second-order term adds to the first" in text
    assert "Confirmed: a gate behind BatchNorm is the better place" in text
    assert "curvature alone, ranks as well as both together" in text
    assert "`taylor_so_bn` has 0.900, less than first order" in text
    turned = {"taylor_fo_bn": 0.97, "taylor_so_diag": 0.9}
    text = said(a_result(**GOOD | turned, taylor_fo=0.98, obd_bn=0.8, taylor_so_bn=0.99))
    assert "Contradicted: the second-order term adds to the first" in text
    assert "Contradicted: a gate behind BatchNorm is the better place" in text
    assert "curvature alone" not in text
    assert "less than first order" not in text


def test_what_scaling_does_to_norms_is_said():
    text = said(a_result(**GOOD, **{"magnitude_l2, unscaled": 0.8}))
    assert "`magnitude_l2` 0.40 over all layers, 0.40 within one, unscaled 0.80 over all" in text
    assert "Norms know less" in text
    assert "Contradicted: that the scale of a layer says nothing" in text
    text = said(a_result(**GOOD, **{"magnitude_l2, unscaled": 0.3}))
    assert "scale of a layer" not in text
    assert "know less" not in said(a_result(**GOOD | {"magnitude_l2": 0.97}))


def test_training_that_does_not_make_up_for_the_choice_is_not_said_to():
    result = a_result(**GOOD)
    assert "Training makes up for the choice" in said(result)
    lower(result, "random", "finetuned", 0.1)
    assert "Training makes up for the choice" not in said(result)


def test_curves_that_cross_are_named():
    result = a_result(**GOOD)
    assert "always the better pruning" not in said(result)
    assert "bounds all others" not in said(result)
    lower(result, "taylor_fo_bn", "finetuned", 0.05)
    lower(result, "oracle", "rescored", 0.05)
    text = said(result)
    assert "With 25%, 50%, 75% of the filters removed, random ones leave more" in text
    assert "it leaves 45% at half the filters; `taylor_fo_bn` 50%" in text


def test_the_command_gives_the_settings_back():
    given = OracleSettings(
        out=Path("o"), model="a:b", data="c:d", sample=5, criteria=("snip",), seed=2
    )
    command = given.command()
    assert command.startswith("taylor-kernels compare --model a:b --data c:d --sample 5 --seed 2")
    assert "--criteria snip" in command
    assert "--budget" not in command


def test_what_is_kept_reaches_the_targets():
    result = json.loads((ROOT / study.KEPT / "result.json").read_text())
    assert study.missed(result) == []
    assert len(result["networks"]) == 6
    for name in ("correlation.png", "score_against_oracle.png", "pruning_curves.png"):
        assert imread(ROOT / study.KEPT / name)[..., :3].std() > 0.02


#: Fewer points of curves, at each of which every criterion scores and trains once more, and fewer
#: draws of `random`, whose curve in one shot is the mean of theirs.
FEWER_POINTS = """
from dataclasses import replace
from taylor_kernels.studies.oracle import pruning_curves, settings
settings.QUICK = replace(settings.QUICK, points=2)
pruning_curves.CURVE_DRAWS, pruning_curves._LEAST_POINTS = 2, 2
"""


#: Those that have targets, and what they are held against; test_user_model.py has all.
COMPARED = [
    word
    for name in ("taylor_fo_bn", "taylor_so_diag", "obd_bn", "magnitude_l2", "random")
    for word in ("--criteria", name)
]


def run_quick(folder: Path, before: str = "") -> Run:
    quick = ("compare", "--quick", "--device", "cpu", "--out", str(folder), *COMPARED)
    before = FEWER_POINTS + before
    done = run_module("taylor_kernels.cli", *quick, before=before, optimizers=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, dict, Run]:
    out = tmp_path_factory.mktemp("compare")
    done = run_quick(out)
    return out, json.loads((out / "result.json").read_text()), done


@pytest.mark.slow
def test_quick_reaches_the_correlations_on_one_network(quick):
    _, result, done = quick
    (network,) = result["networks"]
    assert network["widths"] == {"0": 16, "3": 32, "7": 48}
    assert network["oracle"]["filters"] == 96
    assert network["data"]["oracle_examples"] == 1348
    assert network["dense"]["accuracy"] > 0.97
    spearman = {n: one["all"]["spearman"] for n, one in network["criteria"].items() if "all" in one}
    assert spearman["taylor_fo_bn"] > 0.9
    assert spearman["taylor_so_diag"] > 0.97
    assert abs(spearman["random"]) < 0.1
    assert spearman["taylor_fo_bn"] > spearman["magnitude_l2"] + 0.2
    for kind in ("one_shot", "rescored", "finetuned"):
        for name in (
            "taylor_fo_bn",
            "taylor_so_diag",
            "obd_bn",
            "magnitude_l2",
            "random",
            "oracle",
        ):
            curve = network["criteria"][name][kind]
            assert curve[0]["accuracy"] == network["dense"]["accuracy"]
            assert curve[-1]["removed"] == 86
    assert len(result["targets"]) == 5
    assert "cnn: Spearman of taylor_fo_bn, all layers" in done.stdout
    assert "oracle" in done.stderr


@pytest.mark.slow
def test_the_report_of_the_study_has_its_sections_and_needs_nothing_else(quick):
    out, result, _ = quick
    page = (out / "report.html").read_text()
    for section in (
        "Agreement with the oracle", "Score against oracle, filter by filter", "Pruning curves",
        "What this confirms, and what it contradicts", "Targets", "How it was done",
    ):  # fmt: skip
        assert f"<h2>{section}</h2>" in page
    assert page.count("<picture>") == 3
    assert not re.search(r"https?://|url\(|@import", re.sub(r'"data:[^"]*"', "", page))
    for one in result["networks"][0]["criteria"].values():
        if "all" in one:
            assert f"{one['all']['spearman']:.3f}" in page


@pytest.mark.slow
def test_a_second_quick_run_measures_nothing_and_says_the_same(quick):
    out, result, _ = quick
    done = run_quick(out, undrawn("taylor_kernels.studies.oracle.pages"))
    assert ": train " not in done.stderr
    assert "filters/s" not in done.stderr
    again = json.loads((out / "result.json").read_text())
    assert again["networks"] == result["networks"]
