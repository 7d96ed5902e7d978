"""How a step of per-example squared gradients grows with the batch: 8, 16, 32 and 64 images.

Ours reads every example once. Torch-Pruning's loop differentiates the whole batch's graph once per
example, so that four times the work comes with twice the images.
"""

from __future__ import annotations

import pytest

from bench.bench_fisher_step import (
    LOOP,
    NETWORKS,
    OURS,
    PLAIN,
    problem,
    provider,
    relative,
)
from bench.harness import Provider

BATCHES = (8, 16, 32, 64)
ROUNDS = 7
#: A step of the loop may take so long, reckoned from its time with the smallest batch.
LONGEST_S = 30.0
_loop_seconds: dict[str, float] = {}


def expected_seconds(network: str, images: int) -> float:
    """Of the loop, from the smallest batch's; 0 where that has not been measured."""
    return _loop_seconds.get(network, 0.0) * (images / BATCHES[0]) ** 2


@pytest.mark.quick(network=["convnet"], batch=BATCHES[:1])
@pytest.mark.parametrize("way", [PLAIN, OURS, LOOP])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("network", "on"), [("convnet", "cpu"), ("resnet18", "cpu")])
def bench_fisher_batch(
    network, on, batch, way, device, quick, images, measured, record, rounds
) -> None:
    seconds = expected_seconds(network, batch)
    if way == LOOP and seconds > LONGEST_S:
        pytest.skip(f"a step of it would take about {seconds:.0f} s")
    ways = [PLAIN, OURS] if seconds > LONGEST_S else [PLAIN, OURS, LOOP]

    def providers() -> list[Provider]:
        data = problem(network, images(batch), NETWORKS[network][2], device)
        return [provider(label, *data, quick=quick) for label in ways]

    case = ("fisher_batch", network, f"{batch} images")
    results = measured.get(case, providers, rounds(ROUNDS), keep_busy=False)
    if batch == BATCHES[0]:
        _loop_seconds[network] = results[LOOP].median
    record(case, results, way, images=images(batch), **relative(results, way))
