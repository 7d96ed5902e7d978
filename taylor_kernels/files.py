"""Files that are there whole, or as they were before, whenever the writing is stopped."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(
    path: str | bytes | os.PathLike[str], write: Callable[[BinaryIO], object]
) -> None:
    """Write a file all at once: a crash or a power cut leaves the old file or the new one.

    A file that is there keeps its permissions; a link stays, and what it points at is written.

    Args:
        write: called with an open binary file. If it raises, the file at `path` is as it was.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: the path is that of a folder.
    """
    target = Path(os.fsdecode(path))
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    if target.is_dir():
        raise IsADirectoryError(f"path: {os.fspath(target)!r} is a folder; give the file a name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {os.fspath(target.parent)!r}")
    # The draft lies in the same folder, so that the replacement is a rename.
    draft = target.parent / f".{os.getpid()}.{secrets.token_hex(8)}.tmp"
    try:
        with draft.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            draft.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        raise
    if hasattr(os, "O_DIRECTORY"):
        # The rename itself lasts through a power cut only once the folder is on the disk. The file
        # is written whether or not the folder can be opened and flushed, which some cannot.
        with contextlib.suppress(OSError):
            folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
