"""What a run does about a package that is missing.

`pytest` alone skips what needs it, and says so; with --zoo, which `make test` gives, and on a
server (CI=true) it is a failure.
"""

from __future__ import annotations

import os

import pytest

from tests.zoo.networks import NETWORKS, OTHERS, Network
from tests.zoo.packages import missing


@pytest.fixture(autouse=True)
def _as_in_the_zoo(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, as the networks are small; and nothing is downloaded."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def network(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Network:
    """A network of the zoo by its name."""
    found = {**NETWORKS, **OTHERS}[request.param]
    if reason := missing(found.package):
        if pytestconfig.getoption("--zoo") or os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found
