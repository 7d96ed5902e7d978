"""Networks whose layers are worth being left out of a run, and what is seen of such runs."""

from __future__ import annotations

import torch
from torch import nn

from taylor_kernels.tracing import Channels

#: Layers that are large enough to be left out.
WIDTH, SIDE = 16, 40


class Counting:
    """Runs operations; names those that were run, and those that were made."""

    def __init__(self) -> None:
        self.runs: list[tuple[list[str], list[str]]] = []

    def restart(self) -> None:
        self.runs.append(([], []))

    def run(self, func, args, kwargs, made):
        name = func._schema.name.removeprefix("aten::")
        self.runs[-1][made is not None].append(name)
        return func(*args, **kwargs) if made is None else made


def network(middle: nn.Module) -> nn.Sequential:
    layers = nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU()
    return nn.Sequential(*layers, middle, nn.Conv2d(WIDTH, 2, 1))


def same(one: Channels, other: Channels) -> bool:
    return (
        one.skipped == other.skipped
        and one.macs == other.macs
        and one.table() == other.table()
        and one.classes.keys() == other.classes.keys()
        and all(
            all(map(torch.equal, one.classes[name], other.classes[name])) for name in one.classes
        )
    )
