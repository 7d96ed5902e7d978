"""The examples in the docstrings of the methods, run as they stand."""

from __future__ import annotations

import pytest

import taylor_kernels as tk
from taylor_kernels.methods import packed
from taylor_kernels.ops import mirror_step
from tests.helpers.docstrings import run_examples

CHECKED = {
    "AdaptivePruner": tk.methods.AdaptivePruner,
    "MirrorDescent": tk.methods.MirrorDescent,
    "MirrorDescent.rounded": tk.methods.MirrorDescent.rounded,
    "load_packed": tk.methods.load_packed,
    "parameter_groups": tk.methods.parameter_groups,
    "pack": packed.pack,
    "mirror_step": mirror_step.mirror_step,
}


@pytest.mark.parametrize("name", CHECKED)
def test_its_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(CHECKED[name], name)
