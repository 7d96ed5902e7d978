"""The examples in the docstrings of the methods, run as they stand."""

from __future__ import annotations

import doctest

import pytest

import taylor_kernels as tk
from taylor_kernels.methods import packed
from taylor_kernels.ops import mirror_step

CHECKED = {
    "AdaptivePruner": tk.methods.AdaptivePruner,
    "MirrorDescent": tk.methods.MirrorDescent,
    "load_packed": tk.methods.load_packed,
    "parameter_groups": tk.methods.parameter_groups,
    "pack": packed.pack,
    "mirror_step": mirror_step.mirror_step,
}


@pytest.mark.parametrize("name", CHECKED)
def test_its_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [each for each in finder.find(CHECKED[name], name, globs={}) if each.examples]
    assert found, f"{name}: its docstring shows no >>> example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in found:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
