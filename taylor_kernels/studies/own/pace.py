"""How many filters go at a pruning, so that the targets are met after so many prunings."""

from __future__ import annotations

from math import ceil, sqrt

from taylor_kernels.pruning import Pruner


class Pace:
    """Spreads the way to a pruner's targets over a number of prunings.

    How many filters have to go for a target of FLOPs or parameters is not known beforehand, since
    filters differ in what they cost. So it is estimated anew before every pruning, from what those
    that went have brought; the last pruning takes as many as are needed.

    Args:
        prunings: in all, those that a checkpoint brings back included.
    """

    def __init__(self, pruner: Pruner, prunings: int) -> None:
        self._pruner, self._prunings = pruner, prunings

    def set(self) -> None:
        """Set `per_step` for the next pruning."""
        pruner = self._pruner
        left = self._prunings - len(pruner.history)
        to_go = pruner.whole.filters if left <= 1 else ceil(self._filters_to_go() / left)
        pruner.per_step = max(1, to_go)

    def _filters_to_go(self) -> float:
        pruner = self._pruner
        kept = pruner.cost.over(pruner.whole)
        gone = pruner.whole.filters - pruner.cost.filters
        most = 0.0
        for name, target in pruner.targets.items():
            if kept[name] <= target:
                continue
            if gone and kept[name] < 1:
                most = max(most, (kept[name] - target) * gone / (1 - kept[name]))
            else:
                # Layers behind each other shrink on both sides: their cost falls with the square.
                share = target if name == "filters" else sqrt(target)
                most = max(most, (1 - share) * pruner.whole.filters)
        return most
