"""The text of the language-model study: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: One module in so many is held out: never trained on, never scored on.
HELD_OUT = 10


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes of other modules to judge on, [bytes] uint8 each."""

    train: Tensor
    held_out: Tensor
    train_modules: int
    held_out_modules: int

    def to(self, device: torch.device) -> Text:
        train, held_out = self.train.to(device), self.held_out.to(device)
        return Text(train, held_out, self.train_modules, self.held_out_modules)


def load_text(files: Sequence[Path] | None = None) -> Text:
    """The modules that lie at the top of the standard library, every tenth of them held out.

    Args:
        files: others in their place.

    Raises:
        ValueError: there are fewer than ten.
    """
    if files is None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if len(files) < HELD_OUT:
        raise ValueError(f"files: {len(files)} modules, of which one in {HELD_OUT} is held out")
    held_out = files[HELD_OUT - 1 :: HELD_OUT]
    train = [file for n, file in enumerate(files, 1) if n % HELD_OUT]
    return Text(_joined(train), _joined(held_out), len(train), len(held_out))


def _joined(files: Sequence[Path]) -> Tensor:
    data = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def random_windows(data: Tensor, number: int, length: int, generator: torch.Generator) -> Tensor:
    """[number, length] int64, each from anywhere in the data."""
    starts = torch.randint(len(data) - length + 1, (number, 1), generator=generator)
    places = (starts + torch.arange(length)).to(data.device)
    return data[places].long()


def even_windows(data: Tensor, number: int, length: int) -> Tensor:
    """[number, length] int64, spread evenly over all of the data; the same on every call."""
    starts = torch.linspace(0, len(data) - length, number).long()[:, None]
    return data[(starts + torch.arange(length)).to(data.device)].long()
