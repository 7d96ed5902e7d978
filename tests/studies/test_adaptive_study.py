"""The study of adaptive pruning from end to end, on the smallest of runs."""

import pytest

from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.methods import adaptive, shapes
from taylor_kernels.studies.methods.pages import facts_of
from taylor_kernels.studies.methods.study import Way, run
from taylor_kernels.studies.plotting import draw
from taylor_kernels.studies.progress import ProgressLog
from taylor_kernels.studies.training import count_parameters

SMALL = {"training": 1, "epochs": 3, "strength": 0.02, "every": 4}


@pytest.mark.slow
def test_every_way_ends_with_half_of_the_parameters(tmp_path):
    # What is not pruned step by step needs an epoch to be fine-tuned, and no more.
    short = {adaptive.dense: {"epochs": 1}, adaptive.uniform: {"epochs": 1}}
    ways = {
        label: Way(way.run, {**way.settings, **SMALL, **short.get(way.run, {})})
        for label, way in adaptive.WAYS.items()
    }
    study = adaptive.MethodStudy(
        **{**vars(adaptive.STUDY), "ways": ways, "problems": [adaptive.DIGITS]}
    )
    runs = run(study, Cache(tmp_path), ProgressLog(), seeds=1)
    found = {one["way"]: one for one in runs}
    assert found.keys() == ways.keys()
    assert found["dense"]["params"] == 1
    assert all(one["params"] <= 0.5 for label, one in found.items() if label != "dense")
    kept = {way: [left / count for _, left, count in one["filters"]] for way, one in found.items()}
    assert max(kept["uniform, by magnitude"]) - min(kept["uniform, by magnitude"]) < 0.1
    assert min(kept["adaptive"]) == 0  # a block has gone
    whole = count_parameters(shapes.rebuilt(found["dense"]))
    for one in runs:  # what is timed is of the shape that was pruned to
        assert count_parameters(shapes.rebuilt(one)) == round(one["params"] * whole)
    assert all(time > 0 for time in shapes.milliseconds(runs, repeats=2))
    result = facts_of(study) | {"runs": runs}
    assert len(adaptive.table(result).rows) == len(ways)
    summary = adaptive.summary(result)
    assert "→" in summary["accuracy"]
    assert " of the parameters left; of the FLOPs ResNet " in summary["compression"]
    draw(adaptive.plot(result), tmp_path / "it.png", alt="", caption="")
    assert (tmp_path / "it.png").stat().st_size > 10_000
