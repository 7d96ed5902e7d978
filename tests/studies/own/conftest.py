"""What the tests of score and prune share."""

from __future__ import annotations

import pytest


@pytest.fixture
def undrawn(monkeypatch):
    """No drawings, which take seconds: where a test is of something else."""
    from taylor_kernels.studies.own import pages
    from taylor_kernels.studies.report import Text

    monkeypatch.setattr(pages, "draw", lambda *_, **__: Text("not in this test"))


@pytest.fixture
def weights_alone(undrawn, monkeypatch):
    """No exports either."""
    from taylor_kernels.studies.own import artifacts

    def refuse(*_):
        raise RuntimeError("not in this test")

    monkeypatch.setattr(artifacts, "exported", refuse)
