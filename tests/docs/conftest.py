from __future__ import annotations

import pytest

from taylor_kernels.criteria import registry as criteria
from taylor_kernels.statistics import registry as statistics


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a snippet registers is gone after it."""
    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))
    monkeypatch.setattr(statistics, "_STATISTICS", dict(statistics._STATISTICS))
