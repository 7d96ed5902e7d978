"""The commands of docs/command-line.md, and the examples of `--help`, run as they stand."""

from __future__ import annotations

import re
import sys

import pytest
from torch.distributed.run import get_args_parser

pytest.importorskip("matplotlib", reason="prune needs matplotlib")
pytest.importorskip("safetensors", reason="prune needs safetensors")
pytest.importorskip("sklearn", reason="the page's data are scikit-learn's")

from taylor_kernels import cli
from taylor_kernels.cli import at_init, prune, score
from taylor_kernels.studies.at_init import pages as at_init_pages
from taylor_kernels.studies.own import artifacts, pages
from taylor_kernels.studies.report import Text
from tests.helpers import ROOT

PAGE = (ROOT / "docs/command-line.md").read_text()
COMMANDS = re.findall(r"^```sh\ntaylor-kernels (.*)\n```$", PAGE, re.MULTILINE)
EXAMPLES = [part.EXAMPLE.partition("taylor-kernels ")[2] for part in (score, prune, at_init)]


@pytest.fixture
def mymodels(tmp_path, monkeypatch, one_thread):
    """The page's module in a working directory of its own."""
    (module,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "mymodels.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    # What takes seconds is tested elsewhere.
    monkeypatch.setattr(artifacts, "exported", lambda *_: 1 / 0)
    for drawn in (pages, at_init_pages):
        monkeypatch.setattr(drawn, "draw", lambda *_, **__: Text("a figure"))
    yield tmp_path
    sys.modules.pop("mymodels", None)


@pytest.mark.parametrize("line", dict.fromkeys([*COMMANDS, *EXAMPLES]))
def test_it_runs(line, mymodels, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    if "--dry-run" not in line:
        assert (mymodels / "runs" / line.split()[0] / "report.html").exists()


def test_the_page_shows_each_command():
    assert sorted({line.split()[0] for line in COMMANDS}) == ["at-init", "prune", "score"]
    assert any("--dry-run" in line for line in COMMANDS)


def test_options_of_the_page_are_options(capsys):
    known = get_args_parser().format_help()  # torchrun's
    for command in ("score", "prune", "compare", "at-init"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known += capsys.readouterr().out
    for option in set(re.findall(r"--[a-z][a-z-]+", PAGE)):
        assert option in known, option
