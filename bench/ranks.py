"""`python -m bench.ranks 1 2 4 1000`: what scoring and pruning over ranks cost beside a step.

ResNet-18 under DistributedDataParallel, gloo, on 1, 2 and 4 processes of this machine; bytes that
are given to the collective beside the formula of docs/distributed.md, and those that the loopback
device carries; and a rank of 1,000, whose collective is a counted copy of its own payload, with the
memory that a pruning takes there. Results: bench/results, beside those of other numbers of ranks
kept there. It takes a minute or two; nothing else should run beside it, nor use that device.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import taylor_kernels as tk
from bench.harness import peak_growth
from bench.models import resnet18
from taylor_kernels.system import cpu_model
from tests.distributed.launch import ran

RESULTS = Path(__file__).parent / "results" / "ranks" / "result.json"
SIMULATED = 1000
CRITERIA = ("taylor_fo_bn", "taylor_fo")
BATCH, IMAGE, EVERY, STEPS = 8, 32, 3, 15
#: Exchanges whose bytes on the loopback device are counted; other traffic is small beside them.
EXCHANGES = 20


class Simulated(tk.distributed.Ranks):
    """One of many ranks, all of which hold what it holds."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size
        super().__init__()

    def _join(self, group: object) -> None:
        pass

    def _all_gather(self, payload: torch.Tensor) -> torch.Tensor:
        return payload.repeat(self.size)


def formula(criterion: str, pruner: tk.Pruner) -> int:
    """Bytes that a rank sends at a pruning: the scores, then a hash of each layer's mask."""
    layers = pruner.original_widths
    if criterion == "taylor_fo":  # scores of units
        columns, scored = sum(group.size for group in pruner._network.first), len(layers)
    else:  # gates of the layers that stand for their units, of every minibatch
        names = pruner._scored
        columns, scored = EVERY * sum(layers[name] for name in names), len(names)
    return 16 + 24 * EVERY + 4 * columns + scored + 8 * (1 + len(layers))


def timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def loopback() -> int | None:
    """Bytes that the loopback device has sent so far."""
    path = Path("/sys/class/net/lo/statistics/tx_bytes")
    return int(path.read_text()) if path.exists() else None


def on_the_wire(ranks: tk.distributed.Ranks, sent: int) -> float | None:
    """Bytes on the loopback device for each rank, headers included, of an exchange of so many."""
    payload = torch.zeros(sent, dtype=torch.uint8)
    dist.barrier()
    before = loopback()
    for _ in range(EXCHANGES):
        ranks.gather(payload)
    dist.barrier()
    after = loopback()
    if before is None or after is None:
        return None
    return (after - before) / EXCHANGES / ranks.size


def pruned(criterion: str, ranks: tk.distributed.Ranks, *, alone: bool = False) -> dict[str, Any]:
    """Median seconds of a training step, of an update and of a pruning."""
    torch.manual_seed(0)
    model = resnet18()
    wrapped = model if alone else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, y = torch.randn(BATCH, 3, IMAGE, IMAGE), torch.randint(1000, (BATCH,))

    def train() -> None:
        optimizer.zero_grad()
        cross_entropy(wrapped(x), y).backward()
        optimizer.step()

    def score() -> None:
        optimizer.zero_grad()
        cross_entropy(wrapped(x), y).backward()

    plain = [timed(train) for _ in range(STEPS // 2 + 2)][2:]
    pruner = tk.Pruner(
        model, x[:1], criterion, filters=0.5, every=EVERY, optimizer=optimizer, ranks=ranks,
        verify=False,
    )  # fmt: skip
    before, counts = ranks.bytes_sent, ranks.collectives
    watched, updates, prunings, memory = [], [], [], None
    for number in range(STEPS):
        backward = timed(score)
        length = len(pruner.history)
        if alone and number == STEPS - 1:  # the last pruning, whose time is not taken
            memory = peak_growth(pruner.step)[1]
            break
        took = timed(pruner.step)
        (prunings if len(pruner.history) > length else updates).append(took)
        watched.append(backward + timed(optimizer.step))
    times = len(pruner.history)
    sent, collectives = formula(criterion, pruner), ranks.collectives - counts
    given = (ranks.bytes_sent - before) / times
    return {
        "train": statistics.median(plain),
        "watched": statistics.median(watched[2:]),
        "update": statistics.median(updates[2:]),
        "pruning": statistics.median(prunings[1:]),
        "bytes": given,
        "formula": sent,
        "wire": None if alone else on_the_wire(ranks, sent),
        "memory": memory,
        "collectives": collectives / times,
        "filters": pruner.whole.filters,
    }


def measured(rank: int, size: int) -> dict[str, Any]:
    return {criterion: pruned(criterion, tk.distributed.Ranks()) for criterion in CRITERIA}


def main(sizes: list[int]) -> None:
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text())["ranks"] if RESULTS.exists() else {}
    for size in sizes:
        if size < SIMULATED:
            kept[str(size)] = ran(size, measured)[0]
        else:
            kept[str(size)] = {c: pruned(c, Simulated(size), alone=True) for c in CRITERIA}
    result = {
        "machine": {"processor": cpu_model(), "cores": os.cpu_count(), "torch": torch.__version__},
        "settings": {"batch": BATCH, "image": IMAGE, "every": EVERY},
        "ranks": dict(sorted(kept.items(), key=lambda item: int(item[0]))),
    }
    RESULTS.parent.mkdir(exist_ok=True, parents=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [1, 2, 4, SIMULATED])
