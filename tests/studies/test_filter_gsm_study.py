"""The study of FilterGSM from end to end, on the smallest of runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("sklearn", reason="the studies need scikit-learn")
pytest.importorskip("mnist1d", reason="the studies need mnist1d")

from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.methods import filter_gsm, shapes
from taylor_kernels.studies.methods.study import Way, run
from taylor_kernels.studies.plotting import draw
from taylor_kernels.studies.training import count_parameters
from tests.helpers.problems import quiet


def test_both_ways_keep_a_quarter_of_the_filters(tmp_path):
    problem, small = filter_gsm.LENET, {"training": 1, "epochs": 2}
    ways = {
        label: Way(way.run, {**way.settings_of(problem), **small})
        for label, way in filter_gsm.WAYS.items()
    }
    study = replace(filter_gsm.STUDY, ways=ways, problems=[problem])
    result = {"runs": run(study, Cache(tmp_path), quiet(), seeds=1)}
    found = {one["way"]: one for one in result["runs"]}
    assert found.keys() == ways.keys()
    for way, one in found.items():
        left, whole = (sum(each[i] for each in one["filters"]) for i in (1, 2))
        assert (left, whole) == (570 if way == filter_gsm.DENSE else 142, 570)
    assert found[filter_gsm.DENSE]["params"] == found[filter_gsm.DENSE]["flops"] == 1
    assert found[filter_gsm.FILTER_GSM]["params"] < 0.5

    whole = count_parameters(shapes.rebuilt(found[filter_gsm.DENSE]))
    for one in result["runs"]:  # what is timed is of the shape that was pruned to
        assert count_parameters(shapes.rebuilt(one)) == round(one["params"] * whole)

    latency = {"LeNet-5, digits": {filter_gsm.FILTER_GSM: [0.25], filter_gsm.DENSE: [1.0]}}
    rows = filter_gsm.table(result | {"speed": {"relative": latency}}).rows
    assert [row[3] for row in rows] == ["142 of 570", "142 of 570", "570 of 570"]
    assert [row[-1] for row in rows] == ["0.25 (0.25–0.25)", "–", "1.00 (1.00–1.00)"]
    assert filter_gsm.summary(result)["accuracy"].startswith("LeNet-5, digits: ")
    draw(filter_gsm.plot(result), tmp_path / "it.png", alt="", caption="")
    assert (tmp_path / "it.png").stat().st_size > 5_000
