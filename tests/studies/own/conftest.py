"""What the tests of score and prune share."""

from __future__ import annotations

import pytest

from taylor_kernels.studies.own import artifacts


@pytest.fixture
def weights_alone(monkeypatch):
    """Exporters, which take seconds, refuse: where a test is of something else."""

    def refuse(self):
        raise RuntimeError("not in this test")

    monkeypatch.setattr(artifacts._Writer, "_exported", refuse)
