"""`Pruner`: the standard iterative loop over Taylor scores.

Molchanov et al. 2019: statistics of coupled filters are summed and scored every minibatch, the
scores averaged over the minibatches between two prunings and then, with `momentum`, over the
prunings; the cheapest units of the whole network go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from taylor_kernels.criteria import Criterion
from taylor_kernels.distributed.ranks import Ranks, check_ranks
from taylor_kernels.mixed_precision import Scaling
from taylor_kernels.pruning.arguments import check_arguments, one_criterion
from taylor_kernels.pruning.choosing.budget import Budget, remedy_out_of_reach
from taylor_kernels.pruning.in_use import check_free
from taylor_kernels.pruning.network import Network
from taylor_kernels.pruning.one_pruning import prune
from taylor_kernels.pruning.prunable import find_prunable
from taylor_kernels.pruning.records import PruneRecord
from taylor_kernels.pruning.removing.optimizer_state import optimizers_in
from taylor_kernels.pruning.resuming import Resumable
from taylor_kernels.pruning.scores.block_scores import BlockScores, check_blocks
from taylor_kernels.pruning.scores.minibatches import Minibatches
from taylor_kernels.pruning.uninterrupted import uninterrupted
from taylor_kernels.statistics import Closure, get_statistic
from taylor_kernels.statistics.counting import Mask, counted
from taylor_kernels.tracing.run.running import new_garbage_only, outside_inference_mode


class Pruner(Resumable):
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
        blocks: whole residual blocks may go too: the branch with its parameters, while the tensor
            that it is added to stays. A block is ranked like a bundle of all its filters, by its
            score over their number: of taylor_fo_bn and taylor_fo_gate that of a gate on what the
            branch adds, Σ y·dy; of other criteria the sum over its filters.
        outputs: names of fields, or places, of what the model returns that others read, as
            ("logits",); whatever else it returns, such as `encoder_last_hidden_state`, may change
            its width. None: all of it keeps its width, but for state that the model takes back.
        importance: deprecated, the old name of `criterion`.

    Raises:
        ValueError, TypeError: an argument is wrong, a target cannot be reached, nothing can be
            pruned, or an earlier Pruner of the model is open. The model is as it was.
        RuntimeError: the backend is not available here.
        TimeoutError, MemoryError: the model takes minutes, or gigabytes of labels, to trace; or the
            models of other threads take ten minutes.

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
        blocks: bool = False,
        outputs: Sequence[str | int] | None = None,
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
            verify=verify,
        )
        check_blocks(blocks, self.criterion)
        check_ranks(ranks)
        check_free(model)
        self.model = model
        self.optimizer = optimizer
        self.targets = targets
        self._kind = get_statistic(self.criterion.statistic)
        self._momentum, self._backend = momentum, backend
        with outside_inference_mode(), new_garbage_only():
            prunable = find_prunable(
                model,
                example_inputs,
                ignore,
                round_to=round_to,
                min_filters=min_filters,
                statistic=self._kind,
                verify=verify,
                blocks=blocks,
                outputs=outputs,
            )
            self._prunable = prunable
            self._budget = Budget(
                prunable.meter, prunable.groups, targets, per_step, prunable.blocks,
                remedy_out_of_reach(prunable.skipped, round_to, min_filters),
            )  # fmt: skip
            self._network = Network(model, prunable, optimizer)
            self.ranks = ranks
            scaling = None if scaler is None else Scaling(scaler, model, optimizers_in(optimizer))
            self._minibatches = Minibatches(
                model, self.criterion, every, self._new_scores(), ranks, scaling,
                BlockScores(self.criterion, prunable.blocks, backend) if blocks else None,
            )  # fmt: skip
            self._history: list[PruneRecord] = []
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
                layers, or blocks, that no gradient reaches, or without channels whose layers have
                all gone with their blocks; the pruner is closed; or, at a pruning at the latest,
                other code cut the model.
        """
        self._check_open()
        if self.ranks is not None:
            self._network.zero_gradients()
        minibatches = self._minibatches
        if minibatches.statistic is None:
            return None
        minibatches.check(loss_scale, closure, weight)
        with outside_inference_mode():
            scale = minibatches.scale(loss_scale)
            if scale is None:
                return None
            try:
                with counted(minibatches.statistic, mask):
                    found = minibatches.statistic.collect(loss_scale=scale, closure=closure)
                    due = minibatches.add(found, scale, weight)
            except Exception:
                self._network.check_unchanged()  # else of no interest before a pruning
                self._network.check_held(minibatches.statistic.layers)
                raise
            return self._prune() if due else None

    def skip(self) -> None:
        """Forget the minibatch: in place of step(), for one that is not to count, as one whose
        gradients overflowed.

        Without it the next step() would add what backward() left of that minibatch to its own. It
        does not count towards `every`.

        Raises:
            RuntimeError: the pruner is closed.
        """
        self._check_open()
        self._minibatches.skip()

    def _prune(self) -> PruneRecord:
        self._network.check_unchanged()
        record = prune(self._network, self._minibatches, self._budget, self._momentum)
        self._history.append(record)
        self.check_masks()
        if record.blocks:
            self._minibatches.scores.regroup(self._network.groups, self._scored)
        if record.done or record.blocks:
            self._watch()
        return record

    def compact(self) -> nn.Module:
        """Remove what is masked from the model, in place, with the optimizer's state.

        Training goes on as it would have masked, and so does pruning. Not between backward() and
        step(): what the backward pass left for scoring would be lost (between step() and
        optimizer.step() it is fine). Ctrl-C waits until all is cut.

        Returns:
            The model.
        """
        with outside_inference_mode():
            self.sync()
            self.check_masks()
        with outside_inference_mode(), uninterrupted():
            gone = self._network.compact()
            self._minibatches.scores.drop(gone, self._network.groups)
            self._minibatches.scores.regroup(self._network.groups, self._scored)
            self._watch()
        return self.model
