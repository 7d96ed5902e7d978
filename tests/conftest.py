"""Fixtures that several test files share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from taylor_kernels.backends.native import _native
from taylor_kernels.criteria import registry as criteria
from taylor_kernels.statistics import registry as statistics
from tests.helpers import samples

with suppress(ImportError):  # where gpu-check runs it may be missing
    from hypothesis import HealthCheck, settings

    # How long a draw or an example takes depends on what else the machine does.
    settings.register_profile(
        "any_time", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("any_time")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--zoo",
        action="store_true",
        help="fail, and do not skip, where a package that tests/zoo takes networks from is missing",
    )
    parser.addoption(
        "--share",
        metavar="I/N",
        help="the I-th of N shares of the tests, to run at the same time on one GPU; those marked "
        "`large` are all in the first",
    )


#: How many tests were left out: for want of a GPU, and by chance (tests/helpers/samples.py).
_LEFT_OUT = pytest.StashKey[tuple[int, int]]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on a GPU are left out where there is none, so that a skip is one to look at, and of
    those that say so a fresh sample is kept.

    Of the others the share that is asked for is kept. Files that take long come first: under
    pytest-xdist every other process would wait for one that began last.
    """
    long = {
        item.path
        for item in items
        if item.get_closest_marker("slow") or item.get_closest_marker("long")
    }
    items.sort(key=lambda item: item.path not in long)
    kept = items[:]
    if not torch.cuda.is_available():
        kept = [item for item in items if not item.get_closest_marker("gpu")]
    by_chance = {id(item) for item in samples.left_out(kept, config.args)}
    config.stash[_LEFT_OUT] = len(items) - len(kept), len(by_chance)
    kept = [item for item in kept if id(item) not in by_chance]
    if share := config.getoption("--share"):
        kept = _share(kept, *map(int, share.split("/")))
    if len(kept) < len(items):
        ids = {id(item) for item in kept}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in ids])
        items[:] = kept


def _share(items: list[pytest.Item], share: int, count: int) -> list[pytest.Item]:
    large = [item for item in items if item.get_closest_marker("large")]
    others = [item for item in items if not item.get_closest_marker("large")]
    return others[share - 1 :: count] + (large if share == 1 else [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, (0, 0))


class _FromWorkers:
    """Each process of pytest-xdist collects all tests; what one left out, all did."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        if counts := getattr(node, "workeroutput", {}).get("left_out"):
            node.config.stash[_LEFT_OUT] = tuple(counts)


def pytest_configure(config: pytest.Config) -> None:
    samples.choose()  # before pytest-xdist starts its processes, which are to draw the same
    config.pluginmanager.register(_FromWorkers())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    gpu, by_chance = config.stash.get(_LEFT_OUT, (0, 0))
    if gpu:
        terminalreporter.write_line(f"{gpu} tests need an NVIDIA GPU and were left out")
    if by_chance:
        terminalreporter.write_line(
            f"{by_chance} cases were left to other runs: {samples.VARIABLE}={samples.choose()} "
            f"draws the same again, {samples.VARIABLE}={samples.ALL} runs every case"
        )
    elif terminalreporter.stats.get("failed") and samples.choose() != samples.ALL:
        terminalreporter.write_line(
            f"{samples.VARIABLE}={samples.choose()} draws the same numbers again"
        )


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every tensor that PyTorch allocates starts as NaN: an output left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _drawn_by_the_number_of_the_run(request: pytest.FixtureRequest) -> None:
    """A test that draws from global generators draws the same in a run of the same number."""
    if (seed := samples.seed_of(request.node.nodeid)) is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is slow where no GPU is used


@pytest.fixture(autouse=True)
def _registries_as_before() -> Iterator[None]:
    """What a test registers, or an example that it runs, is forgotten after it."""
    registries = (criteria._CRITERIA, statistics._STATISTICS)
    before = [dict(known) for known in registries]
    yield
    for known, old in zip(registries, before, strict=True):
        known.clear()
        known.update(old)


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """Put PyTorch's number of threads back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(keep_threads: None) -> None:
    """For tiny models: on a busy machine a second thread makes small layers many times slower."""
    torch.set_num_threads(1)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels of one instruction set."""
    if request.param not in _native.cpu_isas():
        pytest.skip(f"this processor has no {request.param}")
    before = _native.cpu_isa()
    _native.set_cpu_isa(request.param)
    yield request.param
    _native.set_cpu_isa(before)
