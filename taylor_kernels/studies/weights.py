"""Trained networks, and their weights as files, so that none is trained twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from taylor_kernels.files import write_atomically
from taylor_kernels.studies.data import Split
from taylor_kernels.studies.digest import digest_tensors
from taylor_kernels.studies.training import Schedule, train

if TYPE_CHECKING:
    from taylor_kernels.studies.cache import Cache, Piece
    from taylor_kernels.studies.progress import ProgressLog


@dataclass(frozen=True)
class Trained:
    """A trained network, the file that it is kept in, and whether it was there already."""

    model: nn.Module
    file: Path
    cached: bool


def trained_network(
    make: Callable[[], nn.Module],
    seed: int,
    data: Split,
    schedule: Schedule,
    cache: Cache,
    log: ProgressLog,
    *,
    label: str,
) -> Trained:
    """The network that `make` builds, trained on `data` now or in an earlier run.

    `seed` decides its start and the order of its minibatches.
    """
    torch.manual_seed(seed)
    model = make().to(data.images.device)
    piece = training_piece(model, seed, data, schedule, cache)
    try:
        if load_weights(model, piece.file):
            return Trained(model, piece.file, cached=True)
    except ValueError as error:
        log.say(f"{error}; training again")
    with log.task(label, schedule.epochs) as advance:
        generator = torch.Generator().manual_seed(seed)
        train(model, data, schedule, generator=generator, on_epoch=advance)
    save_weights(model, piece.file)
    return Trained(model, piece.file, cached=False)


def training_piece(
    start: nn.Module, seed: int, data: Split, schedule: Schedule, cache: Cache
) -> Piece:
    """Where the weights are kept that training makes of an untrained network."""
    settings = {
        "network": repr(start),
        "start": digest_tensors(start.state_dict().values()),
        "data": digest_tensors((data.images, data.labels)),
        "seed": seed,
        "schedule": asdict(schedule),
        "threads": torch.get_num_threads(),
        "device": data.images.device.type,
        "torch": torch.__version__,
    }
    return cache.piece("network", settings, by=[trained_network, start], kind="safetensors")


def save_weights(model: nn.Module, file: Path) -> None:
    """Write the model's state as safetensors, whole or not at all."""
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    write_atomically(file, lambda part: part.write(save(state)))


def load_weights(model: nn.Module, file: Path) -> bool:
    """Load what `save_weights` wrote; False if there is no such file.

    Raises:
        ValueError: the file is damaged or of another model.
    """
    if not file.exists():
        return False
    try:
        model.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError, OSError):
        raise ValueError(f"{file} is damaged or of another network") from None
    return True
