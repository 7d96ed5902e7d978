"""A folder of checkpoints that torch.distributed.checkpoint writes and reads.

It holds numbered ones, `checkpoint-00000000` the first. One is whole once it has an index, which is
written last; the latest that is whole counts, and those before it are removed then. What else is in
the folder stays. In each there is an entry for every tensor of the model and of the optimizer's
state, and one, `plain`, with all else: the pruner's state, the extras, and the model's and the
optimizer's with a tensor without memory in the place of each. That is read without running code.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.distributed.ranks import Ranks
from taylor_kernels.pruning.saving.state import check_version, first_line

FORMAT = "taylor_kernels.sharded_checkpoint"
PLAIN, _INDEX = "plain", ".metadata"
#: What a checkpoint is called, and what the files are that PyTorch writes to it.
_NAME = re.compile(r"checkpoint-([0-9]{8})")
_FILE = re.compile(r"\.metadata(\.tmp)?|.*\.distcp", re.DOTALL)
_Path = str | os.PathLike[str]


def named(folder: _Path, number: int) -> Path:
    """The folder of the checkpoint of this number."""
    return Path(folder) / f"checkpoint-{number:08d}"


def _numbers(folder: _Path) -> list[int]:
    found = (_NAME.fullmatch(one.name) for one in Path(folder).iterdir())
    return [int(one[1]) for one in found if one]


def latest(folder: _Path) -> Path:
    """The folder of the latest whole checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    root = Path(folder)
    known = _numbers(root) if root.is_dir() else []
    whole = [n for n in known if (named(root, n) / _INDEX).exists()]
    if not whole:
        raise FileNotFoundError(f"folder: there is no whole checkpoint in {str(root)!r}")
    return named(root, max(whole))


def next_number(folder: _Path) -> int:
    """That of a new checkpoint; the folder is made where it is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return max(_numbers(folder), default=-1) + 1


def remove_older(folder: _Path, number: int) -> None:
    """Remove the checkpoints before this one."""
    for old in _numbers(folder):
        if old < number:
            _remove(named(folder, old))


def _remove(old: Path) -> None:
    """Remove a checkpoint, unless someone has put something else into it."""
    if old.is_dir() and all(one.is_file() and _FILE.fullmatch(one.name) for one in old.iterdir()):
        shutil.rmtree(old, ignore_errors=True)


def write(target: Path, entries: dict[str, Tensor], ranks: Ranks | None) -> None:
    """Write a checkpoint, each rank its own entries; a collective.

    Raises:
        RuntimeError: it could not be written, or another rank stopped.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with _as_one_process():
            dcp.save(
                entries,
                storage_writer=dcp.FileSystemWriter(target),
                process_group=None if ranks is None else ranks.group,
                no_dist=ranks is None,
            )
    except (Exception, CheckpointException) as caught:
        where = "" if ranks is None else f"rank {ranks.rank} of {ranks.size}: "
        raise RuntimeError(
            f"{where}the checkpoint {str(target)!r} could not be written ({_reason(caught)}); has "
            "another rank stopped, or is the disk full? The one before it, if any, is still there"
        ) from caught


def packed(content: dict[str, Any]) -> Tensor:
    """Plain Python as the bytes of a file, [n] uint8, which can be an entry of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def read_plain(target: Path) -> dict[str, Any]:
    """What `plain` holds.

    Raises:
        ValueError: it is damaged, or not one of these.
    """
    import torch.distributed.checkpoint as dcp

    try:
        index = dcp.FileSystemReader(target).read_metadata()
        entry: Any = index.state_dict_metadata[PLAIN]
        packed = torch.empty(entry.size, dtype=torch.uint8)
    except Exception as error:
        raise ValueError(
            f"folder: {str(target)!r} is damaged, or was not written by save_sharded_checkpoint "
            f"({_reason(error)})"
        ) from error
    read(target, {PLAIN: packed})
    try:
        buffer = io.BytesIO(packed.numpy().tobytes())
        content = torch.load(buffer, map_location="cpu", weights_only=True)
        known = content["format"] == FORMAT
    except Exception as error:
        raise ValueError(f"folder: {str(target)!r} is damaged ({_reason(error)})") from error
    if not known:
        raise ValueError(f"folder: {str(target)!r} was not written by save_sharded_checkpoint")
    check_version(content, f"folder: {str(target)!r}")
    return content


def read(target: Path, entries: dict[str, Tensor]) -> None:
    """Fill tensors, each rank its own parts: without a collective, so that none waits for one
    that cannot read.

    Raises:
        ValueError: they are not all there.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with _as_one_process():
            dcp.load(entries, storage_reader=dcp.FileSystemReader(target), no_dist=True)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"folder: {str(target)!r} is damaged ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """The first cause in one line: PyTorch wraps what ranks have raised."""
    failures = getattr(error, "failures", None)
    inner = next((one for one, _ in failures.values()), error) if failures else error
    return f"{type(inner).__name__}: {first_line(inner)}"


@contextmanager
def _as_one_process() -> Iterator[None]:
    """Without PyTorch's remark that no group is used, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
