"""Every public name has an example in its docstring, and the example runs as a reader pastes it."""

from __future__ import annotations

import pytest

import taylor_kernels as tk
from tests.helpers.docstrings import run_examples

NAMES = [name for name in tk.__all__ if callable(getattr(tk, name))]


def test_what_is_public_can_be_called_or_is_a_constant():
    assert [name for name in tk.__all__ if name not in NAMES] == ["MOMENTS"]


@pytest.mark.parametrize("name", NAMES)
def test_its_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(getattr(tk, name), f"tk.{name}")
