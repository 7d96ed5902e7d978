"""The examples in the docstrings of tk.distributed run as a reader pastes them."""

from __future__ import annotations

import doctest

import pytest

import taylor_kernels as tk


@pytest.mark.parametrize("name", tk.distributed.__all__)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_its_example_runs(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(getattr(tk.distributed, name), name, module=False, globs={})
    found = [test for test in found if test.examples]
    assert found
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in found:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
