"""What a pruner says of itself: costs, widths, scores, and why layers stay."""

from __future__ import annotations

from torch import Tensor, nn

from taylor_kernels.checks import check_count
from taylor_kernels.hooks import OnModel
from taylor_kernels.pruning.choosing.budget import Budget
from taylor_kernels.pruning.choosing.flops import Cost
from taylor_kernels.pruning.network import Network
from taylor_kernels.pruning.prunable import Prunable
from taylor_kernels.pruning.records import PruneRecord
from taylor_kernels.pruning.scores.minibatches import Minibatches
from taylor_kernels.statistics import Statistic


class Progress(OnModel):
    """How far a pruning has come, of any object that prunes a `Network` within a `Budget`."""

    _budget: Budget
    _history: list[PruneRecord]
    _network: Network
    _prunable: Prunable

    @property
    def done(self) -> bool:
        """All targets are met; step() does nothing more, and what is masked stays off."""
        return self._budget.met(self._network.meter)

    @property
    def history(self) -> tuple[PruneRecord, ...]:
        """All prunings so far."""
        return tuple(self._history)

    @property
    def cost(self) -> Cost:
        """Filters, parameters and FLOPs that are left, masked ones not counted."""
        return self._network.meter.cost

    @property
    def whole(self) -> Cost:
        """The same of the original model."""
        return self._budget.whole

    @property
    def widths(self) -> dict[str, int]:
        """Layers that can be pruned -> filters left, masked ones not counted."""
        return self._network.widths

    @property
    def original_widths(self) -> dict[str, int]:
        """Layers that can be pruned -> filters at the start."""
        return dict(self._prunable.widths)


class Readout(Progress):
    """What can be read off a pruner at any time; `Pruner` holds what it is read off."""

    model: nn.Module
    _kind: type[Statistic]
    _minibatches: Minibatches

    @property
    def overflowed(self) -> int:
        """Minibatches that did not count, since the scaler skips the optimizer's steps of them."""
        return self._minibatches.overflowed

    @property
    def dropped(self) -> int:
        """Minibatches that did not count on any of the `ranks`, since one of them had gradients
        that were not finite, or called skip()."""
        return self._minibatches.dropped

    @property
    def per_step(self) -> int:
        """How many filters go at a pruning; a schedule may set it between prunings.

        It is an argument and no part of the state: a run that resumes sets it again.
        """
        return self._budget.filters

    @per_step.setter
    def per_step(self, filters: int) -> None:
        check_count("per_step", filters)
        self._budget.filters = filters

    @property
    def needs_closure(self) -> bool:
        """Whether step() is to be called with a closure; otherwise it takes none."""
        return self._kind.reads == "closure"

    @property
    def skipped(self) -> dict[str, str]:
        """Layers whose filters are not removed -> the reason."""
        return self._prunable.skipped | self._minibatches.scores.unscored_layers

    @property
    def blocks(self) -> tuple[str, ...]:
        """The residual blocks that are left, masked ones not counted; none without `blocks`."""
        return tuple(self._network.blocks[number].name for number in self._network.left)

    def block_scores(self) -> dict[str, float]:
        """Block that is left -> the moving average of its score as of the last pruning.

        Empty before the first pruning, and without `blocks`.
        """
        blocks = self._minibatches.blocks
        return {} if blocks is None else blocks.averages()

    def scores(self) -> dict[str, Tensor]:
        """Layer -> [F] moving averages of its present filters' scores as of the last pruning.

        Coupled filters have the score of their unit; masked ones, and those that cannot go, nan.
        Empty before the first pruning.
        """
        return self._minibatches.scores.by_layer(self._network.dead, self._network.layers)
