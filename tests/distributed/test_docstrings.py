"""The examples in the docstrings of tk.distributed run as a reader pastes them."""

from __future__ import annotations

import pytest

import taylor_kernels as tk
from tests.helpers.docstrings import run_examples


@pytest.mark.parametrize("name", tk.distributed.__all__)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_its_example_runs(name):
    run_examples(getattr(tk.distributed, name), name)
