"""A step of GSM on ResNet-50's parameters beside SGD's and the obvious eager form of it.

`python -m bench.methods gsm --speed` keeps what this measures. All three are timed in turns in one
process, ours and the eager one after both were seen to take the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from bench.harness import Provider, peak_memory
from bench.models import resnet50
from taylor_kernels.methods import GSM
from taylor_kernels.studies.results import Json

COMPRESSION, LR, MOMENTUM, DECAY = 4.0, 1e-4, 0.98, 1e-4
#: Of which the eager step, which takes seconds, has every third.
ROUNDS = 24
EAGER = "eager GSM"


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    found = [nn.Parameter(torch.randn_like(p) * 0.05) for p in resnet50().parameters()]
    for p in found:
        p.grad = torch.randn_like(p) * 0.01
    return found


class EagerGSM:
    """Scores of all weights joined, the Q-th by topk, a mask for each gradient, then a step."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = params
        self.momenta = [torch.zeros_like(p) for p in params]
        self.ranked = [p for p in params if p.dim() in (2, 4)]
        self.active = int(sum(p.numel() for p in self.ranked) / COMPRESSION)

    @torch.no_grad()
    def step(self) -> None:
        scores = torch.cat([(p.grad * p).abs().flatten() for p in self.ranked])
        last = scores.topk(self.active).values[-1]
        for p, z in zip(self.params, self.momenta, strict=True):
            g = p.grad
            if p.dim() in (2, 4):
                g = g * ((p.grad * p).abs() >= last) + DECAY * p
            z.mul_(MOMENTUM).add_(g)
            p.sub_(LR * z)


def milliseconds(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS):
        for name, step in steps.items():
            if name == EAGER and turn % 3:
                continue
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def measure() -> Json:
    mine, theirs, plain = parameters(), parameters(), parameters()
    gsm = GSM(mine, LR, MOMENTUM, DECAY, COMPRESSION)
    eager = EagerGSM(theirs)
    sgd = torch.optim.SGD(plain, LR, MOMENTUM, weight_decay=DECAY, foreach=True)
    gsm.step()
    eager.step()
    sgd.step()
    difference = largest_difference(mine, theirs)
    assert difference < 1e-7, difference
    steps = {"GSM": gsm.step, "SGD, foreach": sgd.step, EAGER: eager.step}
    times = milliseconds(steps)
    peaks = {
        name: peak_memory(Provider(name, step, None, "peer"), torch.device("cpu"))
        for name, step in steps.items()
    }
    to_sgd, to_eager = times["GSM"] / times["SGD, foreach"], times[EAGER] / times["GSM"]
    return {
        "words": f"a step {to_sgd:.2f}× SGD's, {to_eager:.1f}× faster than eager (ResNet-50, CPU)",
        "milliseconds": times,
        "peak_mib": {name: None if p is None else p / 2**20 for name, p in peaks.items()},
        "to_sgd": to_sgd,
        "to_eager": to_eager,
        "elements": sum(p.numel() for p in mine),
    }
