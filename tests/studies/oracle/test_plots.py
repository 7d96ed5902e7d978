"""Plots that can be read: every line looks its own way, and labels do not touch."""

from __future__ import annotations

from itertools import pairwise

import pytest

pytest.importorskip("matplotlib", reason="plots need matplotlib")

from taylor_kernels.studies import plotting
from taylor_kernels.studies.oracle.plots import _decades, _styles

LABELS = ["taylor_fo_bn", "taylor_so_diag", "obd_bn", "magnitude_l2", "magnitude_l2, unscaled",
          "random", "taylor_fo", "snip", "oracle"]  # fmt: skip


@pytest.mark.parametrize("theme", [plotting.LIGHT, plotting.DARK])
def test_every_line_of_a_panel_has_a_look_of_its_own(theme):
    styles = _styles(LABELS, theme)
    looks = {(one["color"], one["ls"], one["marker"]) for one in styles.values()}
    assert len(looks) == len(LABELS)
    scaled, plain = styles["magnitude_l2"], styles["magnitude_l2, unscaled"]
    assert scaled["color"] == plain["color"]


@pytest.mark.parametrize("decades", range(2, 12))
def test_ticks_are_few_powers_of_ten_that_are_not_neighbours(decades):
    ticks = _decades(10.0**-decades * 0.9, 1.1)
    assert 2 <= len(ticks) <= 3
    assert all(later > 99 * earlier for earlier, later in pairwise(ticks))
