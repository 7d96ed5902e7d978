"""The short examples in examples/ run as they stand."""

from __future__ import annotations

import runpy

import pytest

from tests.helpers import ROOT
from tests.integrations.conftest import library

#: These have tests of their own: the front page's, one that needs Avalanche, one of processes,
#: and one that trains a language model.
ELSEWHERE = (
    "prune_digits.py",
    "continual_digits.py",
    "prune_ddp.py",
    "prune_language_model.py",
)
#: Libraries that no requirement of the tests names.
NEEDS = {
    "backpack_squares.py": "backpack",
    "laplace_diagonal.py": "laplace",
    "modelopt_importance.py": "modelopt",
    "opacus_ghost_clipping.py": "opacus",
    "trainer_accelerate.py": "accelerate",
    "trainer_lightning.py": "lightning",
    "trainer_transformers.py": "transformers",
}
SHORT = [p for p in sorted((ROOT / "examples").glob("*.py")) if p.name not in ELSEWHERE]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.name)
def test_it_runs_and_is_short(path, tmp_path, monkeypatch):
    if path.name in NEEDS:
        library(NEEDS[path.name])
    monkeypatch.chdir(tmp_path)
    code = [line for line in path.read_text().split('"""\n', 1)[1].splitlines() if line.strip()]
    assert len(code) <= 16
    names = runpy.run_path(str(path), run_name="__main__")
    assert all(p.isfinite().all() for p in names["model"].parameters())
