"""What every study is asked for; each adds what is its own."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from taylor_kernels.studies.cache import Cache
from taylor_kernels.studies.options import check_seed, find_device


@dataclass(frozen=True)
class StudySettings:
    """A study as the user asked for it.

    Attributes:
        out: the folder to write to.
        seed: the first seed; a seed decides the split, the network's start and the order of its
            minibatches.
        device: cpu, cuda, cuda:N, or auto: a GPU where PyTorch sees one.
        force: forget what earlier runs have finished.
    """

    out: Path = Path("runs")
    seed: int = 0
    device: str = "auto"
    force: bool = False

    @property
    def cache_folder(self) -> Path:
        """Where what is finished is kept."""
        return self.out / "cache"

    def open_cache(self) -> Cache:
        """What is finished, or nothing if it is to be forgotten."""
        cache = Cache(self.cache_folder)
        if self.force:
            cache.clear()
        return cache

    def torch_device(self) -> torch.device:
        """The device of the run.

        Raises:
            Mistake: it is no device's name, or PyTorch does not see it.
        """
        return find_device(self.device)

    def check(self) -> None:
        """See that the run can be done, without starting it.

        Raises:
            Mistake: an option cannot be right; the message names it and what is.
        """
        check_seed(self.seed)
        self.torch_device()

    @property
    def name(self) -> str:
        """Of the command."""
        raise NotImplementedError

    def command(self) -> str:
        """The command line that gives these settings, defaults left out."""
        defaults = type(self)().plain()
        parts = [f"taylor-kernels {self.name}"]
        for key, value in self.plain().items():
            if value == defaults[key] or key in ("force", "resume"):
                continue
            if isinstance(value, bool):
                parts.append(flag(key))
            else:
                many = value if isinstance(value, list) else [value]
                parts += [f"{flag(key)} {shlex.quote(f'{one}')}" for one in many]
        return " ".join(parts)

    def plain(self) -> dict[str, Any]:
        """The settings as plain JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: str(value)
            if isinstance(value, Path)
            else list(value)
            if isinstance(value, tuple)
            else value
            for key, value in values.items()
        }


def flag(name: str) -> str:
    """A setting as an option of the command line."""
    return f"--{name.replace('_', '-')}"
