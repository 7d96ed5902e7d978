"""What a pruner watches: a meter on the model's layers, and the optimizers that train it."""

from __future__ import annotations

from collections.abc import Sequence

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from taylor_kernels.criteria import Criterion
from taylor_kernels.distributed.ranks import Ranks
from taylor_kernels.pruning.arguments import check_optimizer
from taylor_kernels.pruning.readout import Readout
from taylor_kernels.pruning.removing.optimizer_state import optimizers_in
from taylor_kernels.pruning.scores.unit_scores import UnitScores
from taylor_kernels.statistics import Statistic


class Watching(Readout):
    """From when a pruner is made until it is done or closed, hooks on the model score what passes.

    Attributes:
        criterion: that ranks the units.
        ranks: the processes that train the model together; None for one alone.
        optimizer: those whose state follows the masks; None for none.
    """

    criterion: Criterion
    ranks: Ranks | None
    optimizer: Optimizer | Sequence[Optimizer] | None
    _kind: type[Statistic]
    _backend: str | None
    _closed: bool

    def use_optimizer(
        self, optimizer: Optimizer | Sequence[Optimizer], *, scaler: GradScaler | None = None
    ) -> None:
        """Let the state of these optimizers follow the masks and compact(), from now on.

        For those that can only be made later, as after fully_shard(). What is masked already is
        masked in their state at the next pruning.

        Args:
            scaler: the GradScaler that they step by; None leaves the one that there is.

        Raises:
            TypeError, ValueError: as those of the argument `optimizer`.
            RuntimeError: the pruner is closed.
        """
        self._check_open()
        check_optimizer(optimizer, self.model)
        self._minibatches.use(optimizers_in(optimizer), scaler)
        self.optimizer = optimizer
        self._network.use(optimizer)
        if self._minibatches.resharded:
            self._watch()  # behind the hooks that a plan has put on the layers

    def close(self) -> None:
        """Take every hook off the model, for good; masked filters are no longer held at zero, while
        masked blocks go on to add zeros.

        compact() can still remove them.
        """
        self._closed = True
        self._network.close()
        self._watch()

    def _new_scores(self) -> UnitScores:
        """Scores of nothing yet, for the model as it is."""
        return UnitScores(
            self.criterion, self._network.groups, self._scored, whole=self._kind.at_gates
        )

    @property
    def _scored(self) -> list[str]:
        """The layers that are looked at, as the model is now."""
        net = self._network
        return self._prunable.scored_at(net.groups, net.blocks_off, gates=self._kind.at_gates)

    def _watch(self) -> None:
        """Put the meter on the model's layers as they are, or take it off when all is done."""
        self._minibatches.watch(None, self._network.groups)
        self._network.in_use = not self.done and not self._closed
        if not self._network.in_use:
            return
        statistic = self._network.statistic(self._kind, self._scored, self._backend)
        statistic.moments = self.criterion.moments
        self._minibatches.watch(statistic, self._network.groups, self._network.left)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the pruner is closed; build a new one to go on pruning")
