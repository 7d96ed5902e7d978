from __future__ import annotations

import pytest

from taylor_kernels import criteria
from taylor_kernels.statistics import registry


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a snippet registers is gone after it."""
    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))
    monkeypatch.setattr(registry, "_STATISTICS", dict(registry._STATISTICS))
