"""Finished pieces of a long job, kept as files, so that a job that was killed goes on.

A piece belongs to the settings that decide it: under other settings it is another piece.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import taylor_kernels

Json = Any
_PACKAGE = Path(taylor_kernels.__file__).parent
#: What of the package decides no figure.
_BESIDE = (
    "studies/pruning/*", "pruning/*", "cli.py", "plots.py", "report.py", "options.py",
    "progress.py", "system.py", "studies/oracle/findings.py", "studies/oracle/pages.py",
    "studies/oracle/plots.py", "studies/oracle/tables.py",
)  # fmt: skip


class Pieces:
    """A folder of pieces; `<name>-<key>.json`, each written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Forget all pieces."""
        for kind in ("json", "safetensors"):
            for file in self.folder.glob(f"*-{'[0-9a-f]' * 16}.{kind}"):
                file.unlink()

    def file(self, name: str, settings: Mapping[str, Json], kind: str = "json") -> Path:
        """Where the piece of these settings lies, or is to lie."""
        return self.folder / f"{name}-{digest(json.dumps(settings, sort_keys=True))}.{kind}"

    def load(self, name: str, settings: Mapping[str, Json]) -> Json:
        """The piece, or None if there is none; a damaged file is as good as none."""
        try:
            return json.loads(self.file(name, settings).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def save(self, name: str, settings: Mapping[str, Json], value: Json) -> None:
        write_whole(self.file(name, settings), json.dumps(value))

    def made(self, name: str, settings: Mapping[str, Json], make: Callable[[], Json]) -> Json:
        """The piece, made now if it is not there."""
        piece = self.load(name, settings)
        if piece is None:
            self.save(name, settings, make())
            piece = self.load(name, settings)
        return piece


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there whole, or as it was before, whenever this is stopped."""
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def digest(*parts: str | bytes) -> str:
    """16 hexadecimal digits that stand for the parts."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(f"{len(data)}:".encode())
        total.update(data)
    return total.hexdigest()[:16]


def digest_tensors(tensors: Iterable[Tensor]) -> str:
    """The same of the values, shapes and dtypes of tensors."""
    parts: list[str | bytes] = []
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        parts += [f"{tuple(tensor.shape)} {tensor.dtype}", flat.view(torch.uint8).numpy().tobytes()]
    return digest(*parts)


def digest_package() -> str:
    """The same of the code of this package that decides a figure."""
    files = {
        file
        for kind in ("*.py", "*.so")
        for file in _PACKAGE.rglob(kind)
        if not any(fnmatchcase(file.relative_to(_PACKAGE).as_posix(), one) for one in _BESIDE)
    }
    return digest_files(files)


def digest_source(*objects: object) -> str:
    """The same of the files that functions, and the classes of modules and their parts, are from.

    PyTorch's stand for themselves by its version, which is part of the settings.
    """
    files = set()
    for thing in objects:
        for owner in thing.modules() if isinstance(thing, nn.Module) else [thing]:
            named = owner if inspect.isfunction(owner) else type(owner)
            file = getattr(sys.modules.get(named.__module__), "__file__", None)
            if file is not None and named.__module__.partition(".")[0] != "torch":
                files.add(Path(file))
    return digest_files(files)


def digest_files(files: Iterable[Path]) -> str:
    """The same of what is in files."""
    return digest(*(file.read_bytes() for file in sorted(files)))


def rounded(value: Json, digits: int = 6) -> Json:
    """Plain JSON: floats to so many significant digits, and null for those that are not finite."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
