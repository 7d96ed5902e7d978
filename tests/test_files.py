"""write_atomically: the old file or the new one, and nothing else in the folder."""

from __future__ import annotations

import os

import pytest

from taylor_kernels.files import write_atomically


def test_the_new_file_replaces_the_old(tmp_path):
    path = tmp_path / "page.html"
    for content in (b"old", b"new"):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_it_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "whole", lambda file: file.write(b""))
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "it"
    path.write_bytes(b"old")

    def fail(*_):
        raise error

    if step != "write":
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_atomically(str(path), fail if step == "write" else lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["it"]


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no folder '{tmp_path / 'no'}'$"):
        write_atomically(tmp_path / "no" / "it", lambda file: file.write(b""))
