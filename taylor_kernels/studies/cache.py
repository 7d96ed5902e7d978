"""Finished pieces of a run, kept as files, so that a run that was killed goes on.

A piece is kept under a key of all that decides it: settings, and the code that computes it. Under
another key it is another piece.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taylor_kernels.files import write_atomically
from taylor_kernels.studies.digest import digest
from taylor_kernels.studies.source_code import code_digest


@dataclass(frozen=True)
class Piece:
    """One piece: where it lies, or is to lie."""

    file: Path

    def load(self) -> Any:
        """The piece, or None if there is none; a damaged file is as good as none."""
        try:
            return json.loads(self.file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def save(self, value: Any) -> None:
        """Keep plain JSON, whole or not at all."""
        write_atomically(self.file, lambda file: file.write(json.dumps(value).encode()))

    def made(self, make: Callable[[], Any]) -> Any:
        """The piece, made now if it is not there."""
        value = self.load()
        if value is None:
            self.save(make())
            value = self.load()
        return value


class Cache:
    """A folder of pieces, `<name>-<key>.json` or `.safetensors`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def piece(
        self, name: str, settings: Mapping[str, Any], *, by: Sequence[object], kind: str = "json"
    ) -> Piece:
        """The piece of that name that these settings decide.

        Args:
            settings: plain JSON.
            by: the functions that compute it; their code is part of the key, and what it imports.
        """
        key = digest(json.dumps(settings, sort_keys=True), code_digest(*by))
        return Piece(self.folder / f"{name}-{key}.{kind}")

    def clear(self) -> None:
        """Forget all pieces."""
        for kind in ("json", "safetensors"):
            for file in self.folder.glob(f"*-{'[0-9a-f]' * 16}.{kind}"):
                file.unlink()
