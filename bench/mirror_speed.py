"""A step of MirrorDescent on ResNet-50's weights, beside eager PyTorch and torch.optim.Adam.

    python -m bench.mirror_speed           # adds what it finds to bench/results/methods/mirror.json

All take the same parameters and gradients in turns, each with its state. Eager is the same step
(md-tanh-s with Adam) of the in-place operations that PyTorch has, by tensors and by `_foreach`; it
is checked against ours first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.methods import keep
from bench.shapes import elements, resnet50_weights
from bench.timing import CpuTimer
from taylor_kernels.backends.native import _native
from taylor_kernels.methods import MirrorDescent
from taylor_kernels.studies.methods.mirror import STUDY
from taylor_kernels.studies.results import Json, circumstances

RATE, DECAYS, EPS, BETA = 1e-3, (0.9, 0.999), 1e-8, 1.02
ROUNDS = 9
Step = Callable[[], object]


class Eager:
    """md-tanh-s with Adam, a tensor after the other."""

    def __init__(self, params: Sequence[Tensor], duals: Sequence[Tensor]) -> None:
        self.params, self.step_number = params, 0
        self.duals = [dual.clone() for dual in duals]
        self.first = [torch.zeros_like(dual) for dual in duals]
        self.second = [torch.zeros_like(dual) for dual in duals]

    def rate(self) -> float:
        self.step_number += 1
        one, two = (1 - decay**self.step_number for decay in DECAYS)
        return RATE * two**0.5 / one

    @torch.no_grad()
    def step(self) -> None:
        rate = self.rate()
        for param, x, m, v in zip(self.params, self.duals, self.first, self.second, strict=True):
            g = param.grad
            m.lerp_(g, 1 - DECAYS[0])
            v.mul_(DECAYS[1]).addcmul_(g, g, value=1 - DECAYS[1])
            x.addcdiv_(m, v.sqrt().add_(EPS), value=-rate)
            torch.mul(x, BETA, out=param.detach()).tanh_()


class Foreach(Eager):
    """The same by lists."""

    @torch.no_grad()
    def step(self) -> None:
        rate = self.rate()
        grads = [param.grad for param in self.params]
        torch._foreach_lerp_(self.first, grads, 1 - DECAYS[0])
        torch._foreach_mul_(self.second, DECAYS[1])
        torch._foreach_addcmul_(self.second, grads, grads, value=1 - DECAYS[1])
        below = torch._foreach_sqrt(self.second)
        torch._foreach_add_(below, EPS)
        torch._foreach_addcdiv_(self.duals, self.first, below, value=-rate)
        projected = torch._foreach_mul(self.duals, BETA)
        torch._foreach_tanh_(projected)
        torch._foreach_copy_([param.detach() for param in self.params], projected)


def steps(shapes: Sequence[tuple[int, ...]]) -> dict[str, Step]:
    """Name -> a step; ours and eager ones agree."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) / 10) for s in shapes]
    duals = [param.detach().clone() for param in params]
    plain = [torch.nn.Parameter(dual.clone()) for dual in duals]
    for param, other in zip(params, plain, strict=True):
        param.grad = torch.randn(param.shape, generator=generator) / 100
        other.grad = param.grad
    options = dict(lr=RATE, betas=DECAYS, eps=EPS, beta_scale=BETA, beta_interval=10**9)
    ours = MirrorDescent(params, **options, check_gradients=False)
    eager, foreach = Eager(params, duals), Foreach(params, duals)
    ours.step()
    wanted = [param.detach().clone() for param in params]
    for other in (eager, foreach):
        other.step()
        for param, expected in zip(params, wanted, strict=True):
            torch.testing.assert_close(param.detach(), expected, rtol=1e-5, atol=1e-6)
    checked = MirrorDescent.__new__(MirrorDescent)
    checked.__dict__.update(ours.__dict__, _check_gradients=True)
    every: dict[str, Step] = {
        "ours": ours.step,
        "ours, gradients checked": checked.step,
        "eager": eager.step,
        "eager foreach": foreach.step,
        "Adam (foreach)": torch.optim.Adam(plain, foreach=True).step,
        "Adam (fused)": torch.optim.Adam(plain, fused=True).step,
    }
    for step in every.values():
        step()
    return every


def measure() -> Json:
    shapes = resnet50_weights()
    every, timer = steps(shapes), CpuTimer()
    times: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(ROUNDS):
        for name, step in every.items():
            times[name].append(1e3 * timer.time(step).seconds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    words = (
        f"{medians['ours']:.0f} ms a step of ResNet-50; Adam (foreach) "
        f"{medians['Adam (foreach)']:.0f}, eager {medians['eager']:.0f}"
    )
    isa = _native.cpu_isa() if _native is not None else "none"
    return {"words": words, "ms": medians, "elements": elements(shapes), "isa": isa}


def main() -> None:
    start = time.perf_counter()
    found = measure()
    for name, milliseconds in found["ms"].items():
        print(f"{name:26} {milliseconds:7.1f} ms")
    seconds, threads = time.perf_counter() - start, torch.get_num_threads()
    command = "python -m bench.mirror_speed"
    keep(STUDY, {"speed": found | circumstances(command, torch.device("cpu"), threads, seconds)})


if __name__ == "__main__":
    main()
