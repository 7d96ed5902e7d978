"""How pruning probabilities grow in SPP, and the masks that are drawn from them.

Wang, Zhang, Wang, Yu, Hu: "Structured Probabilistic Pruning for Convolutional Neural Network
Acceleration", BMVC 2018. The groups of a layer that are not yet pruned are ranked by score, rank 0
the least important, and their probabilities grow by

    Δ(r) = A·exp(−αr)                       for r ≤ N,    N = −ln(u)/α
    Δ(r) = 2uA − A·exp(−α(2N − r))          for r > N,    α = ln(2/u)/(T − pruned)

where T groups are to go and `pruned` have gone: Δ is A at rank 0, 0 at rank T − pruned, and below 0
above it, so that a group which was held unimportant by mistake recovers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taylor_kernels.ops.rademacher import rademacher_like

#: Bits of a uniform number. float32 holds each of them.
_BITS = 24


def increments(count: int, to_go: int, step: float, decay: float) -> Tensor:
    """Δ of the ranks 0 to count − 1: [count] float64.

    Args:
        count: groups that are not pruned yet.
        to_go: how many of them are still to be pruned, 1 or more.
        step: A.
        decay: u, above 0 and below 1.
    """
    rank = torch.arange(count, dtype=torch.float64)
    alpha = math.log(2 / decay) / to_go
    turn = -math.log(decay) / alpha
    rising = step * torch.exp(-alpha * rank)
    falling = 2 * decay * step - step * torch.exp(-alpha * (2 * turn - rank))
    return torch.where(rank <= turn, rising, falling)


def advanced(
    probabilities: Tensor, scores: Tensor, target: int, step: float, decay: float
) -> Tensor:
    """The probabilities after one update: [n] float32; those that are 1 stay so.

    Args:
        probabilities: [n] float32 in [0, 1].
        scores: [n]; the lowest are the least important, and ties go by position.
        target: how many are to reach 1. Where so many have, the others return to 0.
    """
    pruned = probabilities == 1
    to_go = target - int(pruned.sum())
    if to_go <= 0:
        return pruned.float()
    left = torch.nonzero(~pruned).flatten()
    order = left[scores[left].argsort(stable=True)]
    grown = probabilities[order].double() + increments(left.numel(), to_go, step, decay)
    found = probabilities.clone()
    found[order] = grown.clamp(0, 1).float()
    return found


def drawn(probabilities: list[Tensor], seed: int, iteration: int) -> list[Tensor]:
    """[n] bool for each [n] float32: True, with its probability, for a group that is masked.

    A function of seed, iteration, place in the list and place in the tensor alone: bits of
    Philox4x32-10, the same on every device. 24 of them are a uniform number below 1.
    """
    shapes = [p.new_empty(_BITS, p.numel(), dtype=torch.float32) for p in probabilities]
    seeds = (seed * 0x9E3779B97F4A7C15 + iteration) % 2**64
    signs = rademacher_like(shapes, seed=seeds)
    found = []
    for p, sign in zip(probabilities, signs, strict=True):
        weights = 0.5 ** torch.arange(1, _BITS + 1, device=p.device, dtype=torch.float32)
        uniform = ((sign < 0) * weights[:, None]).sum(0)  # exact: each bit has a place of its own
        found.append(uniform < p)
    return found
