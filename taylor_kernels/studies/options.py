"""Options that several commands have, checked before any work starts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from taylor_kernels.criteria import Criterion, get_criterion


class Mistake(ValueError):
    """The user's, who is told in one line and not by a traceback."""


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where PyTorch sees one, else the CPU.

    Raises:
        Mistake: it is no device's name, or PyTorch does not see it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise Mistake(f"--device: {name!r} is not known; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Mistake(
            f"--device: PyTorch sees {torch.cuda.device_count()} GPUs, so {name} is not there; use "
            "--device cpu"
        )
    return device


def find_criteria(names: Sequence[str], option: str = "--criteria") -> list[Criterion]:
    """The criteria of these names, which an option gave.

    Raises:
        Mistake: there is none, or one is not known; the message has the nearest names.
    """
    if not names:
        raise Mistake(f"{option}: name at least one, for example taylor_fo_bn")
    try:
        return [get_criterion(name) for name in names]
    except ValueError as error:
        raise Mistake(f"{option}: {str(error).removeprefix('criterion: ')}") from None


def check_both_or_none(model: str | None, data: str | None) -> None:
    """A user's model and its data are named together.

    Raises:
        Mistake: one is not.
    """
    if (model is None) != (data is None):
        given, missing = ("--model", "--data") if model else ("--data", "--model")
        raise Mistake(
            f"{given}: needs {missing} beside it, as in --model package.module:make_model "
            "--data package.module:make_loader"
        )


def check_seed(seed: int) -> None:
    """See that PyTorch's generators take the seed.

    Raises:
        Mistake: they do not.
    """
    if not 0 <= seed < 2**32:
        raise Mistake(f"--seed: {seed} is not between 0 and 2**32 - 1")


def check_writable(folder: Path) -> None:
    """Make the folder of --out.

    Raises:
        Mistake: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Mistake(f"--out: cannot write to {str(folder)!r}: {error.strerror}") from None
