"""What the tests of score and prune share."""

from __future__ import annotations

import pytest


@pytest.fixture
def weights_alone(monkeypatch):
    """No exports and no drawings, which take seconds: where a test is of something else."""
    from taylor_kernels.studies.own import artifacts, pages
    from taylor_kernels.studies.report import Text

    def refuse(self):
        raise RuntimeError("not in this test")

    monkeypatch.setattr(artifacts._Writer, "_exported", refuse)
    monkeypatch.setattr(pages, "draw", lambda *_, **__: Text("not in this test"))
