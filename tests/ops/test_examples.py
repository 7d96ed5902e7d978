"""The examples in the docstrings of the public functions, run as they stand."""

from __future__ import annotations

import doctest
from types import FunctionType

import pytest

import taylor_kernels as tk

FUNCTIONS = sorted(
    name
    for name in tk.__all__
    if isinstance(function := getattr(tk, name), FunctionType)
    and function.__module__.startswith(("taylor_kernels.ops", "taylor_kernels.backends"))
)


def test_every_op_is_among_them():
    assert FUNCTIONS == [
        "available_backends",
        "conv1d_example_norms",
        "conv2d_example_norms",
        "conv2d_fisher",
        "conv3d_example_norms",
        "filter_moments",
        "gate_gradients",
        "hutchinson_moments",
        "linear_example_norms",
        "linear_fisher",
        "rademacher_like",
        "second_order_moments",
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_example_prints_what_it_says(name):
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(getattr(tk, name), name, globs={})
    assert example.examples, "the docstring has no example"
    printed: list[str] = []
    failed, _ = doctest.DocTestRunner().run(example, out=printed.append)
    assert not failed, "".join(printed)
