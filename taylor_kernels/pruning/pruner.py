"""`Pruner`: the standard iterative loop over Taylor scores.

Molchanov et al. 2019: statistics of coupled filters are summed and scored every minibatch, the
scores averaged over the minibatches between two prunings and then, with `momentum`, over the
prunings; the cheapest units of the whole network go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from taylor_kernels.criteria import Criterion
from taylor_kernels.distributed.ranks import Ranks
from taylor_kernels.distributed.tables import check_parts
from taylor_kernels.hooks import OnModel
from taylor_kernels.mixed_precision import Scaling
from taylor_kernels.pruning.arguments import (
    check_arguments,
    check_count,
    check_optimizer,
    one_criterion,
)
from taylor_kernels.pruning.budget import UNREAD, Budget
from taylor_kernels.pruning.flops import Cost
from taylor_kernels.pruning.gathering import Gathering
from taylor_kernels.pruning.network import Network, check_free
from taylor_kernels.pruning.optimizer_state import optimizers_in
from taylor_kernels.pruning.prunable import find_prunable
from taylor_kernels.pruning.records import PruneRecord
from taylor_kernels.pruning.selection import select
from taylor_kernels.pruning.state import check_pruner_state, pruner_state
from taylor_kernels.pruning.unit_scores import UnitScores
from taylor_kernels.shards import is_sharded
from taylor_kernels.statistics import (
    Closure,
    Statistic,
    checked_tables,
    filter_count,
    get_statistic,
)
from taylor_kernels.statistics.base import (
    check_closure,
    check_loss_scale,
    check_no_noise,
    check_weight,
)
from taylor_kernels.statistics.counting import Mask, counted
from taylor_kernels.tracing.running import new_garbage_only, outside_inference_mode


class Pruner(OnModel):
    """Prunes a model while it trains.

    Args:
        model: pruned in place. Filters of its output layers are never removed.
        example_inputs: what to trace and count FLOPs on: a tensor, a tuple or list of arguments,
            or a dict of keyword arguments; on the model's device.
        criterion: its name, or a `Criterion`; None stands for taylor_fo_bn.
        flops, params, filters: the fractions to keep, in (0, 1]; at least one. All that are given
            are met. `filters` is of the output filters of the layers that can be pruned.
        every: minibatches between two prunings.
        per_step: filters to remove at a pruning: a count, or a fraction of those there were at
            the start.
        momentum: weight of the past in the moving average across prunings.
        round_to: widths of pruned layers stay multiples of this, or what they were.
        ignore: module names, patterns (*, ?) or modules whose filters stay; a container stands
            for all layers in it.
        optimizer: one, or a sequence of all that train the model; their state is zeroed with the
            masks and cut with the model. Without one, make a new optimizer after compact(): one
            made before holds the old parameters.
        min_filters: every layer keeps at least so many.
        backend: of the kernels; see `tk.available_backends()`.
        verify: prove on a float64 copy that every group can be masked exactly; turned off, the
            model's memory is needed once less and mistakes of the tracing go unseen.
        ranks: the processes that train the model together (`tk.distributed.Ranks`), each of which
            makes the same pruner of the module inside DistributedDataParallel. They score as one
            and prune the same filters, or raise an error that names the first layer that differs.
        scaler: the GradScaler of the training loop. Its scale is divided out, whether or not
            unscale_() has been called, and minibatches whose steps it skips do not count.
        importance: deprecated, the old name of `criterion`.

    Raises:
        ValueError, TypeError: an argument is wrong, a target cannot be reached, nothing can be
            pruned, or an earlier Pruner of the model is open. The model is as it was.
        RuntimeError: the backend is not available here.
        TimeoutError, MemoryError: the model takes minutes, or gigabytes of labels, to trace.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = tk.Pruner(
        ...     model, torch.randn(1, 4), filters=0.5, every=2, per_step=4, optimizer=optimizer
        ... )
        >>> while not pruner.done:
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     record = pruner.step()
        ...     optimizer.step()
        >>> record.filters, record.filters_fraction
        (8, 0.5)
        >>> pruner.compact()[0]
        Linear(in_features=4, out_features=8, bias=True)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        criterion: str | Criterion | None = None,
        *,
        flops: float | None = None,
        params: float | None = None,
        filters: float | None = None,
        every: int = 10,
        per_step: int | float = 0.02,
        momentum: float = 0.9,
        round_to: int = 1,
        ignore: Sequence[str | nn.Module] = (),
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        min_filters: int = 1,
        backend: str | None = None,
        verify: bool = True,
        importance: str | Criterion | None = None,
        ranks: Ranks | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        self.criterion = one_criterion(criterion, importance)
        targets = check_arguments(
            model,
            self.criterion,
            {"flops": flops, "params": params, "filters": filters},
            every=every,
            per_step=per_step,
            momentum=momentum,
            round_to=round_to,
            min_filters=min_filters,
            optimizer=optimizer,
            backend=backend,
        )
        check_free(model)
        self.model = model
        self.optimizer = optimizer
        self.targets = targets
        self._reads = get_statistic(self.criterion.statistic).reads
        self._at_gates = get_statistic(self.criterion.statistic).at_gates
        self._every, self._momentum, self._backend = every, momentum, backend
        with outside_inference_mode(), new_garbage_only():
            prunable = find_prunable(
                model,
                example_inputs,
                ignore,
                round_to=round_to,
                min_filters=min_filters,
                reads=self._reads,
                verify=verify,
            )
            self._prunable = prunable
            self._budget = Budget(prunable.meter, prunable.groups, targets, per_step)
            self._network = Network(model, prunable, optimizer)
            self._scores = self._new_scores()
            self._steps = 0
            self.ranks = ranks
            self._scaling = (
                None if scaler is None else Scaling(scaler, model, optimizers_in(optimizer))
            )
            self._gathering: Gathering | None = None
            self._seen = 0  # minibatches of the run, those that do not count among them
            self._history: list[PruneRecord] = []
            self._statistic: Statistic | None = None
            self._closed = False
            self._watch()

    def step(
        self,
        *,
        loss_scale: float = 1.0,
        closure: Closure | None = None,
        weight: float = 1.0,
        mask: Mask | None = None,
    ) -> PruneRecord | None:
        """Score the minibatch; prune if it is the `every`-th. Between backward() and
        optimizer.step().

        Args:
            loss_scale: what the loss was multiplied by before backward() (a GradScaler's
                get_scale()). For a minibatch whose gradients overflowed, call skip() in place of
                step().
            closure: for criteria that run the model themselves (taylor_so_diag and others):
                `lambda: loss_fn(model(x), y)`, not scaled. That is a forward pass more: in train
                mode it moves BatchNorm's statistics, and draws dropout, a second time.
            weight: of this rank's minibatch in that of all `ranks`, as in `Importance.update`.
            mask: which examples, or tokens, count and are no padding, as in `Importance.update`.

        Returns:
            What was pruned, or None.

        Raises:
            ValueError: a closure is missing, or given to a criterion that takes none; a mask does
                not fit.
            RuntimeError: a score is not finite. Nothing has been masked then, and the minibatches
                since the last pruning are forgotten. Or the gradients of gates are rounding noise,
                which says nothing of what is to go; the targets cannot be reached without
                layers that no gradient reaches; the pruner is closed; or other code cut the model.
        """
        self._check_open()
        if self.ranks is not None:
            self._network.zero_gradients()
        if self._statistic is None:
            return None
        check_loss_scale(loss_scale)
        check_weight(weight)
        check_closure(self._statistic, closure, self.criterion.name, "step")
        self._network.check_unchanged()
        if self._in_parts != self._is_in_parts():
            self._gather()  # the model has been sharded since
        with outside_inference_mode():
            if self._scaling is not None:
                loss_scale = self._scaling.of(self._statistic, loss_scale)
                if self._scaling.skips():
                    self.skip()
                    return None
            if self.ranks is not None:
                loss_scale *= self.ranks.prepare(self._statistic, self._seen)
            with counted(self._statistic, mask):
                found = self._statistic.collect(loss_scale=loss_scale, closure=closure)
            tables = checked_tables(self._statistic, found)
            if self._scaling is not None and not self._scaling.check_finite(tables):
                self.skip()
                return None
            if self._gathering is not None:
                self._gathering.add(self._statistic, tables, weight)
                return self._passed()
            check_no_noise(self._statistic.noise)
            self._scores.add(tables, self._statistic.unread)
            self._steps += 1
            return self._prune() if self._scores.count >= self._every else None

    def skip(self) -> None:
        """Forget the minibatch: in place of step(), for one that is not to count, as one whose
        gradients overflowed.

        Without it the next step() would add what backward() left of that minibatch to its own. It
        does not count towards `every`.

        Raises:
            RuntimeError: the pruner is closed.
        """
        self._check_open()
        if self._statistic is None:
            return
        self._statistic.discard()
        if self._gathering is not None:
            self._gathering.drop()
            self._passed()

    def absent(self) -> PruneRecord | None:
        """In place of step() on a rank that has no part of the minibatch: it counts for nothing.

        Ranks whose loaders end early call it until the others are done.

        Raises:
            RuntimeError: the pruner is closed, or has no `ranks`; and as step() does.
        """
        self._check_open()
        if self.ranks is None:
            raise RuntimeError("absent: the pruner has no ranks=, so there is no one to wait for")
        self._network.zero_gradients()
        if self._gathering is None or self._statistic is None:
            return None
        self._statistic.discard()
        self._gathering.absent()
        with outside_inference_mode():
            return self._passed()

    def sync(self) -> None:
        """Exchange what the `ranks` have seen since they did so last; a collective.

        To be called before state_dict(). Without ranks, or if nothing came since, it does nothing.

        Raises:
            RuntimeError: a rank did not come in time, or the ranks do not fit together.
        """
        if self._gathering is not None:
            self._steps += self._gathering.exchange()

    @property
    def overflowed(self) -> int:
        """Minibatches that did not count, since the scaler skips the optimizer's steps of them."""
        return 0 if self._scaling is None else self._scaling.overflowed

    @property
    def dropped(self) -> int:
        """Minibatches that did not count on any of the `ranks`, since one of them had gradients
        that were not finite, or called skip()."""
        return 0 if self._gathering is None else self._gathering.dropped

    def _passed(self) -> PruneRecord | None:
        """A minibatch of the run has passed on this rank, and so on the others."""
        assert self._gathering is not None
        self._seen += 1
        if self._gathering.due(self._every):
            self.sync()
        return self._prune() if self._scores.count >= self._every else None

    def _prune(self) -> PruneRecord:
        net = self._network
        net.check_optimizer()
        self._budget.check_in_reach(net.meter, net.groups, net.dead, self._scores.unscored)
        scores = self._scores.close_period(self._momentum, net.dead)
        taken = select(net.groups, net.dead, scores, net.meter, self._budget)
        went = [score[units] for score, units in zip(scores, taken, strict=True)]
        record = PruneRecord.of(
            net.meter.cost,
            self.whole,
            step=self._steps,
            removed=net.mask(taken),
            threshold=torch.cat(went).max().item(),
            done=self.done,
        )
        self._history.append(record)
        self.check_masks()
        if record.done:
            self._watch()
        return record

    def check_masks(self) -> None:
        """All `ranks` have removed the same filters; a collective. Prunings do it themselves.

        Raises:
            RuntimeError: they have not; the message names the first layer that differs.
        """
        if self._gathering is not None:
            removed = self._network.state()["removed"]
            self._gathering.check_masks(self._network.first, removed)

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
        return self._reads == "closure"

    @property
    def done(self) -> bool:
        """All targets are met; step() does nothing more, and what is masked stays off."""
        return self._budget.met(self._network.meter)

    @property
    def history(self) -> tuple[PruneRecord, ...]:
        """All prunings so far."""
        return tuple(self._history)

    @property
    def skipped(self) -> dict[str, str]:
        """Layers whose filters are not removed -> the reason."""
        return self._prunable.skipped | dict.fromkeys(self._scores.unread_layers, UNREAD)

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

    def scores(self) -> dict[str, Tensor]:
        """Layer -> [F] moving averages of its present filters' scores as of the last pruning.

        Coupled filters have the score of their unit; masked ones, and those that cannot go, nan.
        Empty before the first pruning.
        """
        return self._scores.by_layer(self._network.dead, self.model)

    def compact(self) -> nn.Module:
        """Remove what is masked from the model, in place, with the optimizer's state.

        Training goes on as it would have masked, and so does pruning. Not between backward() and
        step(): what the backward pass left for scoring would be lost (between step() and
        optimizer.step() it is fine).

        Returns:
            The model.
        """
        with outside_inference_mode():
            self.sync()
            self.check_masks()
            gone = self._network.compact()
            self._scores.drop(gone, self._network.groups)
            self._watch()
        return self.model

    def removal(self) -> tuple[dict[str, dict[int, Tensor]], dict[str, dict[str, Any]]]:
        """What compact() has taken off the original model: tensor -> dimension -> indices [n], and
        module -> attribute -> what it became. `save_pruned` keeps it.

        Raises:
            ValueError: filters are masked that compact() has not removed.
        """
        state = self._network.state()
        if not all(map(torch.equal, state["removed"], state["compacted"])):
            raise ValueError("pruner: it holds filters at zero; call compact() first")
        channels = self._prunable.channels
        return channels.entries(state["compacted"]), channels.attributes(state["compacted"])

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
        if self._scaling is not None:
            self._scaling.use(optimizers_in(optimizer), scaler)
        elif scaler is not None:
            self._scaling = Scaling(scaler, self.model, optimizers_in(optimizer))
        self.optimizer = optimizer
        self._network.use(optimizer)
        if self._in_parts != self._is_in_parts():
            self._watch()  # behind the hooks that a plan has put on the layers

    def close(self) -> None:
        """Take every hook off the model, for good; masked filters are no longer held at zero.

        compact() can still remove them.
        """
        self._closed = True
        self._network.close()
        self._watch()

    def state_dict(self) -> dict[str, Any]:
        """Everything the pruner needs to go on, as tensors and plain Python.

        Save it beside the model's and the optimizer's (`save_checkpoint` does all three). It is
        the same on all `ranks`, and holds for any number of them.

        Raises:
            RuntimeError: there are minibatches that the ranks have not exchanged yet.
        """
        if self._gathering is not None and len(self._gathering):
            raise RuntimeError(
                f"state_dict: {len(self._gathering)} minibatches are this rank's alone yet; call "
                "sync() on every rank first"
            )
        masks, scores = self._network.state(), self._scores.state_dict()
        structure, name = self._prunable.structure, self.criterion.name
        return pruner_state(structure, name, masks, scores, self._steps, self._history)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a pruner of the same original model stopped.

        The model's structure follows: what had been removed is removed, what was masked is
        masked. Load the model's own state_dict after this one, and the optimizer's after that
        (`load_checkpoint` does).

        Raises:
            ValueError: the state is damaged, or of another model or criterion, or the model has
                lost filters that the state still has. Nothing has changed.
            RuntimeError: the pruner is closed.
        """
        state = self._checked(state)
        with outside_inference_mode():
            self._network.restore(state["removed"], state["compacted"])
            self._scores = self._new_scores()
            self._scores.load_state_dict(state["scores"])
            self._steps = self._seen = state["steps"]
            self._history = [PruneRecord(**record) for record in state["history"]]
            self._watch()

    def shapes_after(self, state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes that `load_state_dict(state)` would give what it cuts; raises as that does."""
        return self._network.shapes_after(self._checked(state)["compacted"])

    def _checked(self, state: dict[str, Any]) -> dict[str, Any]:
        self._check_open()
        state = check_pruner_state(state, self._prunable.structure, self.criterion.name)
        self._network.stale(state["compacted"])
        return state

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the pruner is closed; build a new one to go on pruning")

    def _new_scores(self) -> UnitScores:
        return UnitScores(self.criterion, self._network.groups, self._scored, whole=self._at_gates)

    @property
    def _scored(self) -> list[str]:
        return self._prunable.scored_at(self._network.groups, gates=self._at_gates)

    def _watch(self) -> None:
        """Put the meter on the model's layers as they are, or take it off when all is done."""
        if self._statistic is not None:
            self._statistic.close()
            self._statistic = None
        self._network.in_use = not self.done and not self._closed
        if self._network.in_use:
            kind = get_statistic(self.criterion.statistic)
            self._statistic = self._network.statistic(kind, self._scored, self._backend)
            self._statistic.updates = self._steps
        self._gather()

    def _is_in_parts(self) -> bool:
        """Whether a rank holds a part of the model's parameters."""
        return any(map(is_sharded, self.model.parameters()))

    def _gather(self) -> None:
        """Begin to keep minibatches for the ranks."""
        if self._statistic is not None:
            check_parts(self._statistic, self.ranks)
        self._in_parts = self._is_in_parts()
        if self.ranks is None:
            return
        dropped = self.dropped
        layers = {} if self._statistic is None else self._statistic.layers
        sizes = {name: filter_count(layer) for name, layer in layers.items()}
        groups, device = self._network.groups, next(self.model.parameters()).device
        self._gathering = Gathering(
            self.ranks,
            self.criterion,
            self._statistic,
            self._scores,
            sizes,
            groups,
            device,
            dropped,
        )
