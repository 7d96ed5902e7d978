"""Scoring while a network shrinks: ten steps of structural pruning, new shapes at each.

Times are per step. The first pass over all steps is what a pruning run pays, compilation included;
later passes meet shapes that have been compiled before, which a pruning run never does: they are
the least that a peer could reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache

import taylor_kernels as tk
from bench import peers, reference, shapes
from bench.buffers import Buffers, buffers
from bench.harness import Provider

STEPS, QUICK_STEPS = 10, 2
#: Of the filters, at each step.
KEEP = 0.95
#: A graph for exact shapes takes seconds to compile at every step; these many show it.
STATIC_STEPS = 2
PROVIDERS = (
    "ours",
    "eager",
    "torch.compile, dynamic",
    "torch.compile, default",
    "torch.compile, one graph a step",
)
ROUNDS = 9
CASE = ("pruning_sequence", "resnet50-fp32", "rows")


class Sequence:
    """A way to score one step, run over the steps; counts the graphs compiled on the way."""

    def __init__(self, score: Callable[[Buffers], object], steps: int) -> None:
        self.score, self.steps, self.graphs = score, steps, 0

    def run(self) -> list[object]:
        before = counters["stats"]["unique_graphs"]
        answers = [self.score(step) for step in self.data()]
        self.graphs += counters["stats"]["unique_graphs"] - before
        return answers

    def data(self) -> list[Buffers]:
        return self._steps[: self.steps]

    _steps: list[Buffers]


@lru_cache(maxsize=1)
def steps(quick: bool, device: torch.device) -> tuple[list[Buffers], list[reference.Expected]]:
    """Weights and gradients after 0, 1, ... steps of pruning, and their moments in float64."""
    each = [
        buffers(
            shapes.some(shapes.resnet50_weights(KEEP**i), quick),
            torch.float32,
            device,
            scales=(0.05, 0.001),
        )
        for i in range(QUICK_STEPS if quick else STEPS)
    ]
    return each, [reference.moments(step.first, step.second) for step in each]


@lru_cache(maxsize=1)
def sequences(quick: bool, device: torch.device) -> dict[str, Sequence]:
    axes = peers.AXES["rows"]
    Sequence._steps, _ = steps(quick, device)
    count = len(Sequence._steps)
    torch._dynamo.reset()
    counters.clear()

    def layers_by(function: Callable[..., list[Tensor]]) -> Callable[[Buffers], object]:
        return lambda step: peers.per_layer(
            function, axes, peers.as_3d(step.first), peers.as_3d(step.second)
        )

    graph = peers.static(lambda w, g: peers.per_layer(peers.two, axes, w, g))
    # A function of its own each, or one would profit from what the other compiled.
    dynamic = peers.dynamic(lambda w, g, axes: peers.two(w, g, axes))
    default = torch.compile(lambda w, g, axes: peers.two(w, g, axes))
    every = {
        "ours": Sequence(lambda step: tk.filter_moments(step.first, step.second), count),
        "eager": Sequence(layers_by(peers.two), count),
        "torch.compile, dynamic": Sequence(layers_by(dynamic), count),
        "torch.compile, default": Sequence(layers_by(default), count),
    }
    if device.type == "cpu":  # recompilation is shown there; a GPU has better things to do
        every["torch.compile, one graph a step"] = Sequence(
            lambda step: graph(peers.as_3d(step.first), peers.as_3d(step.second)), STATIC_STEPS
        )
    return every


def providers(quick: bool, device: torch.device) -> list[Provider]:
    _, expected = steps(quick, device)

    def ours(table: list[Tensor]) -> dict[str, list[Tensor]]:
        return {f"rows.{name}": [t[:, i] for t in table] for i, name in enumerate(tk.MOMENTS)}

    def theirs(layers: list[list[Tensor]]) -> dict[str, list[Tensor]]:
        return peers.named(layers, peers.TWO, peers.AXES["rows"])

    def check(label: str) -> Callable[[list], float]:
        name = ours if label == "ours" else theirs
        return lambda answers: max(
            reference.check(name(answer), want)
            for answer, want in zip(answers, expected, strict=False)
        )

    return [
        Provider(label, sequence.run, check(label), "ours" if label == "ours" else "peer")
        for label, sequence in sequences(quick, device).items()
    ]


@contextmanager
def nothing_compiled(device: torch.device) -> Iterator[None]:
    """Inductor starts afresh: other benches have compiled some of the same graphs.

    What it makes once per machine, not per graph (a precompiled header), it makes before the clock.
    """
    with fresh_inductor_cache():
        torch._dynamo.reset()
        torch.compile(lambda x: x + 1)(torch.ones(64, device=device))
        yield


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_pruning_sequence(provider, device, quick, measured, record, rounds) -> None:
    if not measured.holds(CASE):
        with nothing_compiled(device):
            results = measured.get(
                CASE, lambda: providers(quick, device), rounds(ROUNDS), keep_busy=False
            )
        for label, result in results.items():
            count = sequences(quick, device)[label].steps
            result.samples = [sample / count for sample in result.samples]
    sequence = sequences(quick, device).get(provider)
    if sequence is None:
        record(CASE, {}, provider)  # skips
    first = measured.results[provider].first_s
    record(
        CASE,
        measured.results,
        provider,
        steps=sequence.steps,
        graphs=sequence.graphs,
        first_pass_s=first,
        first_pass_per_step_s=first / sequence.steps,
    )
