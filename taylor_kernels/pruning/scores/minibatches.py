"""What becomes of a minibatch: it is scored, forgotten, or kept until the ranks meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from taylor_kernels.criteria import Criterion
from taylor_kernels.distributed.ranks import Ranks
from taylor_kernels.distributed.tables import check_parts
from taylor_kernels.mixed_precision import Scaling
from taylor_kernels.pruning.choosing.groups import Group
from taylor_kernels.pruning.scores.block_scores import BlockScores
from taylor_kernels.pruning.scores.gathering import Gathering
from taylor_kernels.pruning.scores.unit_scores import UnitScores
from taylor_kernels.shards import in_parts
from taylor_kernels.statistics import Closure, Statistic, checked_tables, filter_count
from taylor_kernels.statistics.base import (
    check_closure,
    check_loss_scale,
    check_no_noise,
    check_weight,
)


class Minibatches:
    """The minibatches between two prunings, on their way into the scores of units.

    Args:
        scores: where they go.
        scaling: what a GradScaler does; None without one.
        blocks: the scores of residual blocks, where these may go.

    Attributes:
        statistic: that is watched; None when nothing is to come.
        steps: how many have counted.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        every: int,
        scores: UnitScores,
        ranks: Ranks | None,
        scaling: Scaling | None,
        blocks: BlockScores | None = None,
    ) -> None:
        self._model, self._criterion, self._every = model, criterion, every
        self._ranks, self._scaling = ranks, scaling
        self.scores, self.blocks = scores, blocks
        self.statistic: Statistic | None = None
        self.steps = 0
        self._seen = 0  # minibatches of the run, those that do not count among them
        self._gathering: Gathering | None = None
        self._groups: Sequence[Group] = ()
        self._in_parts = False

    def restart(self, scores: UnitScores, steps: int) -> None:
        """Go on from the scores of a saved state."""
        self.scores, self.steps, self._seen = scores, steps, steps

    def watch(
        self, statistic: Statistic | None, groups: Sequence[Group], blocks: Sequence[int] = ()
    ) -> None:
        """Take another statistic in place of the one there was, which is taken off the model.

        Args:
            groups: whose units are scored.
            blocks: the numbers of those that are scored.
        """
        if self.statistic is not None:
            self.statistic.close()
        if self.blocks is not None:
            self.blocks.close()
            if statistic is not None:
                self.blocks.watch(self._model, blocks)
        self.statistic, self._groups = statistic, groups
        if statistic is not None:
            statistic.updates = self.steps
        self._gather()

    def _gather(self) -> None:
        """Begin to keep minibatches for the ranks."""
        if self.statistic is not None:
            check_parts(self.statistic, self._ranks)
            if self.blocks is not None:
                self.blocks.check_parts(self._model)
        self._in_parts = in_parts(self._model)
        if self._ranks is None:
            return
        dropped = self.dropped
        layers = {} if self.statistic is None else self.statistic.layers
        sizes = {name: filter_count(layer) for name, layer in layers.items()}
        device = next(self._model.parameters()).device
        self._gathering = Gathering(
            self._ranks, self._criterion, self.statistic, self.scores, sizes, self._groups,
            device, dropped, self.blocks,
        )  # fmt: skip

    @property
    def resharded(self) -> bool:
        """Whether ranks have begun to hold parts of the model's parameters, or have ended to."""
        return self._in_parts != in_parts(self._model)

    def use(self, optimizers: Sequence[Optimizer], scaler: GradScaler | None) -> None:
        """Ask after these optimizers from now on, and another scaler if one is given."""
        if self._scaling is not None:
            self._scaling.use(optimizers, scaler)
        elif scaler is not None:
            self._scaling = Scaling(scaler, self._model, optimizers)

    def scale(self, loss_scale: float) -> float | None:
        """What the loss was multiplied by in all; None for a minibatch that was skipped."""
        assert self.statistic is not None
        if self.resharded:
            self._gather()
        if self._scaling is not None:
            loss_scale = self._scaling.of(self.statistic, loss_scale)
            if self._scaling.skips():
                self.skip()
                return None
        if self._ranks is not None:
            loss_scale *= self._ranks.prepare(self.statistic, self._seen)
        return loss_scale

    def add(self, found: object, scale: float, weight: float) -> bool:
        """Score what the statistic has collected; whether it is time to prune.

        Args:
            scale: what the loss was multiplied by.
        """
        assert self.statistic is not None
        tables = checked_tables(self.statistic, found)
        if self._scaling is not None and not self._scaling.check_finite(self.statistic, tables):
            self.skip()
            return False
        blocks = self.blocks
        gates = {} if blocks is None else blocks.collect(scale, self.statistic.mask)
        if self._gathering is not None:
            self._gathering.add(self.statistic, tables, weight, gates)
            return self._passed()
        check_no_noise(self.statistic.noise)
        if blocks is not None:
            blocks.take(blocks.of(dict(zip(self.statistic.layers, tables, strict=True)), gates), 1)
        self.scores.add(tables, self.statistic.unread)
        self.steps += 1
        return self.scores.count >= self._every

    def check(self, loss_scale: float, closure: Closure | None, weight: float) -> None:
        """The arguments of `Pruner.step` are right, or an error that names one."""
        check_loss_scale(loss_scale)
        check_weight(weight)
        if self.statistic is not None:
            check_closure(self.statistic, closure, self._criterion.name, "step")

    def skip(self) -> None:
        """Forget the minibatch."""
        if self.statistic is None:
            return
        self.statistic.discard()
        if self.blocks is not None:
            self.blocks.discard()
        if self._gathering is not None:
            self._gathering.drop()
            self._passed()

    def absent(self) -> bool:
        """This rank has no part of the minibatch; whether it is time to prune."""
        if self._gathering is None or self.statistic is None:
            return False
        self.statistic.discard()
        if self.blocks is not None:
            self.blocks.discard()
        self._gathering.absent()
        return self._passed()

    def sync(self) -> None:
        """Exchange what the ranks have seen since they did so last."""
        if self._gathering is not None:
            self.steps += self._gathering.exchange()

    def _passed(self) -> bool:
        """A minibatch of the run has passed on this rank, and so on the others."""
        assert self._gathering is not None
        self._seen += 1
        if self._gathering.due(self._every):
            self.sync()
        return self.scores.count >= self._every

    def check_masks(
        self,
        groups: Sequence[Group],
        removed: Sequence[torch.Tensor],
        blocks: Mapping[str, bool],
    ) -> None:
        """All ranks have removed the same filters, and the same blocks."""
        if self._gathering is not None:
            self._gathering.check_masks(groups, removed, blocks)

    @property
    def waiting(self) -> int:
        """Minibatches that are this rank's alone yet."""
        return 0 if self._gathering is None else len(self._gathering)

    @property
    def overflowed(self) -> int:
        return 0 if self._scaling is None else self._scaling.overflowed

    @property
    def dropped(self) -> int:
        return 0 if self._gathering is None else self._gathering.dropped
