"""`python -m bench.bench_pruner_step`: what `tk.Pruner` adds to a step of training.

ResNet-18, MobileNetV2 and EfficientNet-B0 of pytorchcv, 4 images of 224², one thread, SGD. Copies
of a network with the same weights are trained in turns, one of them with a pruner (taylor_fo_bn,
every=10), step by step: a machine that slows down slows both. A round is ten steps and holds one
pruning. At the end the pruner's network is compacted, and goes on being scored and pruned in a
few rounds more, beside the plain one. Into bench/results/step/result.json, which
`python -m tools.docs_blocks` shows.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import taylor_kernels as tk
from bench.harness import use_threads
from bench.timing import CpuTimer
from taylor_kernels import system

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path("bench/results/step/result.json")
NETWORKS = {
    "ResNet-18": "resnet18",
    "MobileNetV2": "mobilenetv2_w1",
    "EfficientNet-B0": "efficientnet_b0",
}
IMAGES, SIZE, EVERY = 4, 224, 10
#: A step with a pruner over a plain one, prunings included.
LIMIT = 1.02
#: After `compact()`.
ROUNDS_COMPACTED = 3
#: Before the clock: the first passes find out where gates stand and what is rounding noise.
WARM_UP = EVERY


@contextmanager
def without_hooks() -> Iterator[None]:
    """Inside, a step of an optimizer is a plain one: hooks on all optimizers, as those that write
    the masked entries of the network beside this one, are put aside."""
    hooks = dict(_global_optimizer_post_hooks)
    _global_optimizer_post_hooks.clear()
    yield
    _global_optimizer_post_hooks.update(hooks)


def trained(
    model: nn.Module, x: Tensor, y: Tensor, pruned: bool
) -> tuple[Callable[[], None], tk.Pruner | None]:
    """A step of training a network, and its pruner."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    pruner = None
    if pruned:
        pruner = tk.Pruner(
            model,
            x[:1],
            "taylor_fo_bn",
            filters=0.2,
            every=EVERY,
            per_step=0.01,
            optimizer=optimizer,
        )

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if pruner is not None:
            pruner.step()
        with nullcontext() if pruned else without_hooks():
            optimizer.step()

    return step, pruner


class Found(NamedTuple):
    """Seconds of each round of a plain network and of one with a pruner: way -> rounds.

    Attributes:
        masked, compacted: before and after `compact()`.
        parameters: the share of them that `compact()` left.
    """

    masked: dict[str, list[float]]
    compacted: dict[str, list[float]]
    parameters: float


def in_turns(model: nn.Module, rounds: int) -> Found:
    """A plain copy of the network and one with a pruner, as its filters are masked and then cut."""
    x, y = torch.randn(IMAGES, 3, SIZE, SIZE), torch.randint(0, 10, (IMAGES,))
    plain = copy.deepcopy(model)
    plain_step, _ = trained(plain, x, y, False)
    pruned_step, pruner = trained(model, x, y, True)
    assert pruner is not None
    steps = {"plain": plain_step, "with a pruner": pruned_step}
    for _ in range(WARM_UP):
        for step in steps.values():
            step()
    masked = _rounds(steps, rounds)
    pruner.compact()
    left, whole = (sum(p.numel() for p in one.parameters()) for one in (model, plain))
    return Found(masked, _rounds(steps, ROUNDS_COMPACTED), left / whole)


def _rounds(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    timer = CpuTimer()
    found: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(rounds):
        total = dict.fromkeys(steps, 0.0)
        for number in range(EVERY):
            ways = list(steps)
            for way in ways if number % 2 else reversed(ways):  # neither is always the second
                total[way] += timer.time(steps[way]).seconds
        for way, seconds in total.items():
            found[way].append(seconds)
    return found


def over_plain(found: dict[str, list[float]]) -> float:
    """The median over rounds of a round with a pruner over the plain one beside it."""
    pairs = zip(found["with a pruner"], found["plain"], strict=True)
    return statistics.median(ours / plain for ours, plain in pairs)


def network(name: str) -> nn.Module:
    from tests.zoo.vision import pytorchcv

    torch.manual_seed(0)
    model, _ = pytorchcv(name, SIZE)
    return model.train()


def result(labels: Sequence[str], rounds: int) -> dict[str, Any]:
    with use_threads(1):
        found = {label: in_turns(network(NETWORKS[label]), rounds) for label in labels}
    return {
        "machine": {"processor": system.cpu_model(), "threads": 1},
        "versions": system.package_versions("torch", "pytorchcv"),
        "images": IMAGES,
        "size": SIZE,
        "every": EVERY,
        "rounds": {label: one.masked for label, one in found.items()},
        "compacted": {
            label: {"parameters": one.parameters, "rounds": one.compacted}
            for label, one in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=NETWORKS, help="measure this one, and keep the others")
    given = parser.parse_args()
    found = result([given.only] if given.only else list(NETWORKS), given.rounds)
    if given.only and (ROOT / RESULT).exists():
        kept = json.loads((ROOT / RESULT).read_text())
        for part in ("rounds", "compacted"):
            known = kept[part] | found[part]
            found[part] = {label: known[label] for label in NETWORKS if label in known}
    (ROOT / RESULT).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / RESULT).write_text(json.dumps(found, indent=1) + "\n")
    ratios = {label: over_plain(rounds) for label, rounds in found["rounds"].items()}
    for label, ratio in ratios.items():
        print(f"{label}: {ratio:.3f} of a plain step, limit {LIMIT}")
    raise SystemExit(max(ratios.values()) > LIMIT)


if __name__ == "__main__":
    main()
