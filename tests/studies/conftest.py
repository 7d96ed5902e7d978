"""Fixtures of the tests of compare, score and prune."""

from __future__ import annotations

import sys

import pytest

from tests.helpers.user_models import MODULE


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the user's module, imported anew for every test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mynets.py").write_text(MODULE)
    (tmp_path / "faulty.py").write_text("import torch\nraise RuntimeError('no licence')\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit('usage: script.py')\n")
    (tmp_path / "needy.py").write_text("import a_library_that_is_not_there\n")
    yield tmp_path
    for name in ("mynets", "faulty", "script", "needy"):
        sys.modules.pop(name, None)
