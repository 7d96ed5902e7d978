"""What tests compile is compiled again when a file that it is made from changes, and only then."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.helpers import ROOT, kept
from tests.helpers.kept import included

CSRC = ROOT / "csrc"
SOURCES = sorted([*(CSRC / "cpu").rglob("*.cpp"), *(CSRC / "cuda").rglob("*.cu")])


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to ask")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_included_are_the_files_that_the_compiler_reads(source):
    command = ["g++", "-std=c++20", "-DTK_ISA=baseline", f"-I{CSRC}", "-MM", "-MG", "-x", "c++"]
    done = subprocess.run([*command, source], capture_output=True, text=True, check=True)
    read = {(CSRC / name).resolve() for name in done.stdout.replace("\\\n", " ").split()[1:]}
    ours = {path for path in read if path.is_relative_to(CSRC) and path.exists()}
    assert len(ours) > 1
    assert ours <= included(source)


def test_it_is_made_again_when_what_it_includes_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    monkeypatch.setattr(kept, "KEPT", tmp_path / "kept")
    texts = {
        "main.cpp": '#include <vector>\n#include "near.h"\n',
        "near.h": '#  include "common/far.h"\n',
        "csrc/common/far.h": '#include "near.h"\nint far;\n',
        "csrc/common/near.h": "int near;\n",
        "csrc/common/other.h": "int other;\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    made = []

    def ask(*words):
        kept.kept("it", included(tmp_path / "main.cpp"), words, made.append)
        return len(made)

    assert [ask(), ask()] == [1, 1]
    for count, name in enumerate([*texts][:-1], 2):
        (tmp_path / name).write_text(texts[name] + "int more;\n")
        assert [ask(), ask()] == [count, count], name
    (tmp_path / "csrc/common/other.h").write_text("")
    assert ask() == count
    assert [ask("-O2"), ask("-O2")] == [count + 1, count + 1]
