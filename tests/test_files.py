"""write_atomically: the old file or the new one, and nothing else in the folder."""

from __future__ import annotations

import os
import stat

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


def test_links_permissions_and_names_of_any_kind(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real.name)
    write_atomically(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert (real.read_bytes(), real.stat().st_mode & 0o777) == (b"new", 0o640)
    long = tmp_path / ("n" * 255)
    write_atomically(os.fsencode(long), lambda file: file.write(b"long"))
    assert long.read_bytes() == b"long"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    flush = os.fsync

    def refuses_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuses_folders)
    write_atomically(tmp_path / "it", lambda file: file.write(b"new"))
    assert (tmp_path / "it").read_bytes() == b"new"
