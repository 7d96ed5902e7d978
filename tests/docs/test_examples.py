"""Every public name has an example in its docstring, and the example runs as a reader pastes it."""

from __future__ import annotations

import doctest

import pytest

import taylor_kernels as tk

NAMES = [name for name in tk.__all__ if callable(getattr(tk, name))]


def examples(name: str) -> list[doctest.DocTest]:
    """Those of a function, or of a class and its methods; they import what they use."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(getattr(tk, name), f"tk.{name}", module=False, globs={})
    return [test for test in found if test.examples]


def test_what_is_public_can_be_called_or_is_a_constant():
    assert [name for name in tk.__all__ if name not in NAMES] == ["MOMENTS"]


@pytest.mark.parametrize("name", NAMES)
def test_its_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = examples(name)
    assert found, f"tk.{name}: its docstring shows no >>> example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in found:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
