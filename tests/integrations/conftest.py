"""Libraries that integrations speak to, and what a run does where one is missing."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest

from tests.helpers.stubs import OF_AVALANCHE, stubs_of

INSTALL = "make peers installs it"


def library(name: str) -> None:
    """Skip, and say so, where a library is not installed; on a server that is a failure."""
    if importlib.util.find_spec(name) is None:
        reason = f"no {name} here: {INSTALL}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def avalanche() -> None:
    """Avalanche, imported without what it needs for data sets that are downloaded."""
    library("avalanche")
    with stubs_of(OF_AVALANCHE):
        import avalanche.training.plugins  # noqa: F401


@pytest.fixture
def own_accelerator() -> Iterator[None]:
    """Accelerate keeps the settings of the first accelerator of a process, and takes no others."""
    forget_accelerator()
    yield
    forget_accelerator()


def forget_accelerator() -> None:
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
