"""One pruning: what the scores say is to go is masked."""

from __future__ import annotations

import warnings

import torch

from taylor_kernels.pruning.choosing.budget import Budget
from taylor_kernels.pruning.choosing.selection import select_with_blocks
from taylor_kernels.pruning.network import Network
from taylor_kernels.pruning.records import PruneRecord
from taylor_kernels.pruning.scores.minibatches import Minibatches
from taylor_kernels.pruning.scores.unit_scores import UnitScores


def prune(net: Network, minibatches: Minibatches, budget: Budget, momentum: float) -> PruneRecord:
    """Mask the units and blocks that are worth least, by the minibatches since the last pruning.

    Args:
        momentum: weight of the past in the moving average of scores.

    Raises:
        RuntimeError: a score is not finite, and these minibatches are forgotten; the targets are
            out of reach; or layers of the model have been replaced. Nothing has been masked.
    """
    net.check_optimizer()
    if minibatches.statistic is not None:
        net.check_held(minibatches.statistic.layers)
    running, of_blocks = minibatches.scores, minibatches.blocks
    left = [net.blocks[number] for number in net.left]
    budget.check_in_reach(net.meter, net.groups, net.dead, running.unscored, left)
    silent = _silent_to_keep(net, running, budget)
    try:
        if of_blocks is not None:
            of_blocks.check_finite()
        scores = running.close_period(momentum, net.dead, silent)
    except RuntimeError:
        running.forget()
        if of_blocks is not None:
            of_blocks.drop()
        raise
    worth = [] if of_blocks is None else of_blocks.worth(momentum, net.meter)
    taken, blocks = select_with_blocks(net.groups, net.dead, scores, net.meter, budget, left, worth)
    if not blocks and not any(units.numel() for units in taken):
        # Filters that cannot go were refused above, so that blocks alone are left.
        raise RuntimeError(
            f"blocks {', '.join(block.name for block in left)}: they alone could go, and none has "
            "a score in all minibatches since the last pruning, so nothing was pruned; let "
            "gradients reach them, run the passes inside tk.scoring(model), or raise the target"
        )
    went = [score[units] for score, units in zip(scores, taken, strict=True)]
    went.append(torch.tensor([worth[number] for number in blocks], dtype=torch.float64))
    names = tuple(left[number].name for number in blocks)
    return PruneRecord.of(
        net.meter.cost,
        budget.whole,
        step=minibatches.steps,
        removed=net.mask(taken, [net.left[number] for number in blocks]),
        blocks=names,
        threshold=torch.cat(went).max().item(),
        done=budget.met(net.meter),
    )


def _silent_to_keep(net: Network, running: UnitScores, budget: Budget) -> list[bool]:
    """Of each group, whether it stays whole as nothing has been heard of it yet.

    Zeros would let it go first, and its units in no order. Where the targets need them they go all
    the same: the layer may be dead.
    """
    silent = running.silent(net.dead)
    if not any(silent):
        return silent
    staying = [a or b for a, b in zip(silent, running.unscored, strict=True)]
    blocks = [net.blocks[number] for number in net.left]
    keep = budget.in_reach(net.meter, net.groups, net.dead, staying, blocks)
    names = running.layers_of(silent)
    if not running.unscored_layers.keys() >= set(names):
        what = (
            "so these filters stay until there are others"
            if keep
            else "but the targets need these filters, so they go, in no order; begin to prune when "
            "losses depend on them"
        )
        warnings.warn(
            f"{', '.join(names)}: all scores so far are 0, as where no loss has depended on a "
            f"layer, {what}",
            stacklevel=5,
        )
    return silent if keep else [False] * len(silent)
