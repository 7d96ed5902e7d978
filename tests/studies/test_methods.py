"""The frame of the methods' studies: what is finished is kept, under a key of what decides it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the studies need scikit-learn")
pytest.importorskip("mnist1d", reason="the studies need mnist1d")

import bench.methods as command
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.data import Split
from taylor_kernels.studies.methods import pages
from taylor_kernels.studies.methods.problems import DATA, NETWORKS
from taylor_kernels.studies.methods.study import MethodStudy, Search, Trial, Way, run
from taylor_kernels.studies.mnist1d import load_mnist1d
from taylor_kernels.studies.report import Table
from taylor_kernels.studies.training import Schedule, evaluate
from tests.helpers.problems import quiet

CALLS: list[tuple[str, int]] = []
PROBLEM = ("LeNet-300-100", "digits")


def dense(trial: Trial, settings) -> dict:
    CALLS.append((trial.network, settings["epochs"]))
    model = trial.trained(Schedule(settings["epochs"], 64, 0.05, 0.0))
    return {"accuracy": evaluate(model, trial.data.test)}


def untouched(trial: Trial, settings) -> dict:
    return {"accuracy": evaluate(trial.untrained(), trial.data.test)}


def plot(result):
    from matplotlib.figure import Figure

    return lambda theme: Figure()


def study(epochs: int = 1) -> MethodStudy:
    ways = {
        "dense": Way(dense, {"epochs": epochs}, {("LeNet-5", "digits"): {"epochs": 2}}),
        "start": Way(untouched),
    }
    return MethodStudy(
        "it", "It", "nothing", "nobody", "it.py", [PROBLEM], ways,
        table=lambda result: pages.accuracy_table(result, {}),
        plot=plot,
        summary=lambda result: {"accuracy": "1", "compression": "1"},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


def test_what_is_finished_is_not_run_again(tmp_path):
    first = run(study(), Cache(tmp_path), quiet(), seeds=2)
    assert [one["way"] for one in first] == ["dense", "start"] * 2
    assert [one["seed"] for one in first] == [0, 0, 1, 1]
    assert run(study(), Cache(tmp_path), quiet(), seeds=2) == first
    assert len(CALLS) == 2
    again = run(study(2), Cache(tmp_path), quiet(), seeds=1, ways=["dense"])
    assert len(CALLS) == 3
    assert again[0]["accuracy"] > first[1]["accuracy"]


def test_settings_of_a_problem_replace_the_ways_own(tmp_path):
    run(study(), Cache(tmp_path), quiet(), seeds=1, problems=[("LeNet-5", "digits")])
    assert CALLS == [("LeNet-5", 2)]


@cache
def few_images(data_name):
    """To make a data set takes seconds."""
    return DATA[data_name](0).test.images[:3]


@pytest.mark.sample
@pytest.mark.parametrize("data_name", DATA)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_takes_every_data_set(network, data_name):
    images = few_images(data_name)
    torch.manual_seed(0)
    model = NETWORKS[network](images.shape[1:])
    assert model(images).shape == (3, 10)
    assert all(p.dim() in (1, 2, 4) for p in model.parameters())


def test_signals_follow_their_seed_and_leave_the_generators_alone():
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    first, again, other = (load_mnist1d(seed, examples=100) for seed in (1, 1, 2))
    assert np.random.random() == expected
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.images, other.train.images)
    assert isinstance(first.test, Split)
    assert (len(first.train), len(first.test)) == (80, 20)
    rows = torch.cat((first.train.images, first.test.images)).flatten(1)
    assert len(rows.unique(dim=0)) == 100
    assert first.train.labels.unique().tolist() == list(range(10))


def test_the_command_keeps_runs_and_speed_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "find_study", lambda name: study())
    assert command.main(["it", "--seeds", "1", "--cache", str(tmp_path / "cache")]) == 0
    file = tmp_path / command.KEPT / "it.json"
    result = json.loads(file.read_text())
    assert file.with_suffix(".png").exists()
    assert isinstance(study().table(result), Table)
    assert pages.summary_row(result)[:3] == ["It (nobody)", "nothing", "1"]
    again = ["it", "--seeds", "1", "--cache", str(tmp_path / "cache"), "--way", "start"]
    assert command.main(again) == 0  # one way anew: the others stay
    assert json.loads(file.read_text())["runs"] == result["runs"]
    command.keep(study(), {"speed": {"words": "fast"}})
    assert json.loads(file.read_text())["runs"] == result["runs"]
    assert pages.summary_row(json.loads(file.read_text()))[4] == "fast"


@pytest.mark.parametrize("name", command.STUDIES)
def test_what_is_quoted_of_a_study_is_what_its_kept_runs_say(name):
    result = json.loads((command.ROOT / command.KEPT / f"{name}.json").read_text())
    assert result["summary"] == command.find_study(name).summary(result)


def test_what_was_tried_is_kept_beside_the_runs(tmp_path, monkeypatch):
    """On seeds of its own; a setting that is tried no more goes, one that is chosen is marked."""
    tried = [{"epochs": 1}, {"epochs": 3}]
    searched = replace(study(), searches=[Search(PROBLEM, "dense", tried, seeds=(10, 11))])
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "find_study", lambda name: searched)
    cache = ["--cache", str(tmp_path / "cache")]
    assert command.main(["it", "--seeds", "1", *cache]) == 0
    file = tmp_path / command.KEPT / "it.json"
    before = json.loads(file.read_text())
    assert command.main(["it", "--search", *cache]) == 0
    result = json.loads(file.read_text())
    assert {key: result[key] for key in before} == before
    found = result["search"]["runs"]
    assert [(run["tried"], run["seed"]) for run in found] == [
        (setting, seed) for setting in tried for seed in (10, 11)
    ]
    assert result["search"]["command"] == "python -m bench.methods it --search"
    assert [epochs for _, epochs in CALLS] == [1, 1, 1, 3, 3]
    rows = pages.search_table(searched, result).rows
    assert [(row[2], row[4]) for row in rows] == [("epochs 1", "chosen"), ("epochs 3", "")]

    fewer = replace(searched, searches=[Search(PROBLEM, "dense", tried[1:], seeds=(10, 11))])
    command.keep(fewer, {"search": {"runs": found[2:3]}})
    assert json.loads(file.read_text())["search"]["runs"] == found[2:]


def test_a_study_without_speed_says_so(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_study", lambda name: study())
    with pytest.raises(SystemExit):
        command.main(["it", "--speed"])
    assert "it has no speed to measure" in capsys.readouterr().err
