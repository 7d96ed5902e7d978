"""The study of SPP from end to end, on the smallest of runs."""

import pytest
import torch

from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.methods import spp
from taylor_kernels.studies.methods.pages import facts_of
from taylor_kernels.studies.methods.study import Way, run
from taylor_kernels.studies.plotting import draw
from taylor_kernels.studies.progress import ProgressLog

EPOCHS = {"training": 1, "pruning": 2, "retraining": 1, "updates": 60, "step": 0.5}


def test_columns_are_shown_that_recovered_while_their_layer_was_pruned():
    """Of 40 columns 20 go, two recover; that p returns to 0 at the end of its layer is none."""
    rows = torch.linspace(0, 1, 11)[:, None].repeat(1, 40)
    rows[:, 20:] = 0.3
    rows[-1, 20:] = 0
    rows[:, 33] = torch.tensor([0, 0.3, 0.6, 0.3] + [0] * 7)
    rows[:, 37] = torch.tensor([0, 0.1, 0.2, 0.1] + [0] * 7)
    shown = spp._chosen(rows)
    assert shown.shape == (11, spp.SHOWN)
    assert torch.equal(shown[:, 0], rows[:, 33])
    assert torch.equal(shown[:, 1], rows[:, 37])
    assert shown[-1].sum() > 3  # columns that go are shown too
    assert spp._chosen(rows[:, 17:22]).shape == (11, 5)  # a narrow layer: all of it


@pytest.mark.slow
def test_every_way_ends_with_the_columns_gone(tmp_path):
    small = {
        label: Way(way.run, {**way.settings_of(spp.SIGNALS), **EPOCHS})
        for label, way in spp.WAYS.items()
        if label in ("SPP, 4×", "L1, one shot, 4×")
    }
    study = spp.MethodStudy(**{**vars(spp.STUDY), "ways": small, "problems": [spp.SIGNALS]})
    runs = run(study, Cache(tmp_path), ProgressLog(), seeds=1)
    found = {one["way"]: one for one in runs}
    for label, one in found.items():  # convolutions lose three quarters, the other layers nothing
        assert 0.2 < one["macs"] < 0.8, label
    pruned = found["SPP, 4×"]
    assert pruned["finished"]
    assert 0.75 <= pruned["gone"] < 0.8  # of 5 columns 4 go
    assert len(pruned["shown"]) == len(pruned["recovered"]) == len(pruned["iterations"])
    result = facts_of(study) | {"runs": runs}
    assert len(spp.table(result).rows) == len(small)
    draw(spp.plot(result), tmp_path / "spp.png", alt="", caption="")
    assert (tmp_path / "spp.png").stat().st_size > 10_000
