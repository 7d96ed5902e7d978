"""What the tests compile, kept in build/tests while nothing that it is made from has changed.

Two processes of a run share it, and so do runs that differ in Python alone.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

from tests.helpers import ROOT

KEPT = ROOT / "build" / "tests"
#: Seconds to wait for another process that makes the same.
PATIENCE = 1200.0
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def kept(
    name: str, files: Iterable[Path], words: Iterable[object], make: Callable[[Path], None]
) -> Path:
    """The folder that `make` filled, now or when all `files` and all `words` were the same.

    `files` are those that the result is made from (`included`), and `words` are to tell everything
    else that it depends on: commands, flags, versions of compilers. An earlier folder of this name
    is removed.
    """
    key = digest(files, words)
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


def included(*sources: Path) -> set[Path]:
    """These sources and all that they include of csrc/ and of their own folders, at any depth."""
    found: set[Path] = set()
    ahead = list(sources)
    while ahead:
        source = ahead.pop()
        if source in found:
            continue
        found.add(source)
        for name in _INCLUDE.findall(source.read_text()):
            places = (source.parent / name, ROOT / "csrc" / name)
            ahead += [place.resolve() for place in places if place.exists()]
    return found


def digest(files: Iterable[Path], words: Iterable[object] = ()) -> str:
    """A name for what is in these files, and these words."""
    hasher = hashlib.sha256()
    for word in words:
        hasher.update(f"{word}\0".encode())
    for path in sorted(files):
        hasher.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:16]
