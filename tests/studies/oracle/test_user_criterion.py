"""A criterion that the user's own module registers can be named in `--criteria`."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy", reason="compare needs SciPy")

import taylor_kernels as tk
from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.oracle.run import run
from taylor_kernels.studies.oracle.settings import OracleSettings
from tests.helpers.problems import quiet


def test_the_users_modules_are_imported_before_criteria_are_looked_up(tmp_path, monkeypatch):
    registered = "registered_by_a_users_module"
    (tmp_path / "registers.py").write_text(
        "import taylor_kernels as tk\n"
        f"tk.register_criterion(tk.Criterion({registered!r}, 'magnitudes', lambda t: t[:, 0]))\n"
        "model, data = 3, []\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    settings = OracleSettings(
        out=tmp_path, model="registers:model", data="registers:data", criteria=(registered,),
        device="cpu",
    )  # fmt: skip
    with pytest.raises(Mistake, match="--model: registers:model is a int"):
        run(settings, quiet())
    assert registered in tk.criterion_names()
