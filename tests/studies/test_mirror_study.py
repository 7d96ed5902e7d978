"""The study of mirror descent, in an epoch or two: what it keeps, its table, its plot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the studies need scikit-learn")
pytest.importorskip("mnist1d", reason="the studies need mnist1d")
pytest.importorskip("safetensors", reason="packed files need safetensors")

from taylor_kernels.methods import MirrorDescent
from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.data import load_digits
from taylor_kernels.studies.methods import mirror
from taylor_kernels.studies.methods.pages import summary_row
from taylor_kernels.studies.methods.problems import LeNet300, with_norms
from taylor_kernels.studies.methods.study import run
from taylor_kernels.studies.plotting import LIGHT
from tests.helpers.problems import quiet


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of one seed of the digits, two epochs; ternary weights leave 0 later than β is at its end."""
    epochs = {name: 12 if "ternary" in name else 2 for name in mirror.WAYS}
    ways = {
        name: replace(way, of_problem={mirror.DIGITS: {"epochs": epochs[name], "first": True}})
        for name, way in mirror.WAYS.items()
    }
    study = replace(mirror.STUDY, ways=ways, problems=[mirror.DIGITS])
    runs = run(study, Cache(tmp_path_factory.mktemp("cache")), quiet(), seeds=1)
    about = {"method": study.method, "source": study.source, "removes": "", "file": study.file}
    return {"runs": runs} | about


def test_every_way_learns_and_says_what_rounding_does(result):
    for found in result["runs"]:
        assert found["accuracy"] > 0.3, found["way"]
        if found["way"] != mirror.FLOAT:
            assert 0 <= found["distance"] <= 0.5
            epochs = 12 if "ternary" in found["way"] else 2
            assert len(found["saturated"]) == len(found["turned"]) == epochs
            assert found["soft"] > 0.3
    saturated = {found["way"]: found.get("saturated") for found in result["runs"]}
    assert saturated["binaryconnect"] == [1.0, 1.0]  # a sign is a level
    zeros = {found["way"]: found.get("zeros") for found in result["runs"]}
    assert 0 < zeros["md-tanh-s, ternary"] < 1
    assert zeros["md-tanh-s"] == 0


def test_a_file_of_bits_is_small_for_all_that_stays_in_float(result):
    sizes = {found["way"]: found["bytes"] for found in result["runs"]}
    assert sizes["md-tanh-s"] < sizes["md-tanh-s, ternary"] < sizes[mirror.FLOAT] / 10
    assert sizes["md-tanh-s"] < sizes[mirror.FLOAT] / 14


def test_table_summary_and_plot(result):
    table = mirror.table(result)
    assert [row[1] for row in table.rows] == list(mirror.WAYS)
    assert not mirror.gaps(result)
    row = summary_row(result | {"summary": mirror.summary(result)})
    assert row[3].endswith("×")
    drawing = mirror.plot(result)(LIGHT)
    assert len(drawing.axes) == 3


def test_the_caption_says_what_rows_lack(result):
    def without(run: dict) -> dict:
        return {key: value for key, value in run.items() if key != "saturated"}

    digits = [run if run["way"] == "md-tanh-s" else without(run) for run in result["runs"]]
    signals = [
        without(run) | {"network": "LeNet", "data": "signals"}
        for run in result["runs"]
        if run["way"] not in ("pmf", "gd-tanh")
    ]
    caption = mirror.table(result | {"runs": digits + signals}).caption
    assert "Not run on LeNet, signals: gd-tanh, pmf." in caption
    assert "was kept of md-tanh-s on LeNet-600-200 with norms, digits." in caption


def test_norms_are_measured_anew_before_an_accuracy():
    data = load_digits(0)
    model = with_norms(LeNet300, data.train.images.shape[1:])
    mirror.accuracy(model, data)
    first = model[1](data.train.images.flatten(1))
    means = torch.stack([part.mean(0) for part in first.detach().split(256)]).mean(0)
    torch.testing.assert_close(model[2].running_mean, means)
    assert model[2].momentum == 0.1


def test_what_is_followed_counts_turns_of_weights_at_a_level():
    first, layer = nn.Linear(2, 2), nn.Linear(4, 1, bias=False)
    groups = [
        {"params": list(first.parameters()), "quantize": False},
        {"params": list(layer.parameters()), "scale": 0.3, "method": "binaryconnect"},
    ]
    optimizer = MirrorDescent(groups)
    values = ([0.5, 1.0, -1.0, 1.0], [0.2, -1.0, -1.0, 0.3], [-1.0, 1.0, 1.0, 1.0])
    layer.weight.data = 0.3 * torch.tensor([values[0]])
    followed = mirror.Followed(optimizer)
    for each in values[1:]:
        layer.weight.data = 0.3 * torch.tensor([each])
        followed.epoch()
    assert followed.saturated == [0.5, 1.0]
    assert followed.turned == [pytest.approx(1 / 3), 1.0]


def test_weights_that_the_optimizer_writes_reach_their_levels_exactly():
    """A scale of its own for each layer: what a large β writes counts as saturated, all of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    optimizer = MirrorDescent(model.parameters(), scale="layer", beta=1e30)
    followed = mirror.Followed(optimizer)
    followed.epoch()
    assert followed.saturated == [1.0]
