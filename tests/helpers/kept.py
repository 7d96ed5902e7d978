"""What the tests compile, kept in build/tests while nothing that it is made from has changed.

Two processes of a run share it, and so do runs that differ in Python alone.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

from tests.helpers import ROOT

KEPT = ROOT / "build" / "tests"
#: Seconds to wait for another process that makes the same.
PATIENCE = 1200.0


def kept(
    name: str, folders: Iterable[Path], words: Iterable[object], make: Callable[[Path], None]
) -> Path:
    """The folder that `make` filled, now or when all files of `folders` and all `words` were the
    same.

    `words` are to tell everything else that the result depends on: commands, flags, versions of
    compilers. An earlier folder of this name is removed.
    """
    key = _digest(folders, words)
    KEPT.mkdir(parents=True, exist_ok=True)
    target = KEPT / f"{name}-{key}"
    with FileLock(KEPT / f"{name}.lock", timeout=PATIENCE):
        if not target.exists():
            unfinished = KEPT.glob(f"{name}.part*")  # of a process that was killed
            for old in (*KEPT.glob(f"{name}-{'?' * len(key)}"), *unfinished):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=KEPT, prefix=f"{name}.part") as part:
                whole = Path(part) / "made"
                whole.mkdir()
                make(whole)
                whole.rename(target)
    return target


def _digest(folders: Iterable[Path], words: Iterable[object]) -> str:
    hasher = hashlib.sha256()
    for word in words:
        hasher.update(f"{word}\0".encode())
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                hasher.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
                hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]
