"""Adaptive channel and layer pruning: what goes of each layer, and which layers, nobody sets.

A reconstruction: of the method only the abstract is known, in which channels and layers are cut in
proportions that are learned, down to half of the parameters without loss. What is built here:

- An L1 penalty on gates: on γ of the norm behind each channel (Liu et al. 2017, "Learning efficient
  convolutional networks through network slimming"), and on one number g for each residual block,
  by which its branch is multiplied: a soft threshold at every step, of lr·λ on γ, and of lr·λ·n on
  g, n the filters that are left in the block, since g scales what all of them come to.
- A layer's channels fall by a threshold from the layer's own distribution: the smallest go whose
  squares together are no more than a share `tolerance` of the layer's Σ γ². Blocks fall in the same
  way among all blocks, so one whose gate has reached 0 always does.
- What falls is masked, and what is left trains on; λ grows until the target is met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import inf
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from taylor_kernels.checks import check_flag, check_number
from taylor_kernels.criteria import get_criterion
from taylor_kernels.methods.block_gates import BlockGates
from taylor_kernels.methods.channel_gates import ChannelGates, learning_rates, shares
from taylor_kernels.pruning.arguments import check_arguments
from taylor_kernels.pruning.choosing.budget import Budget, remedy_out_of_reach
from taylor_kernels.pruning.choosing.selection import select_with_blocks
from taylor_kernels.pruning.in_use import check_free
from taylor_kernels.pruning.network import Network
from taylor_kernels.pruning.prunable import find_prunable
from taylor_kernels.pruning.readout import Progress
from taylor_kernels.pruning.records import PruneRecord
from taylor_kernels.pruning.removing.optimizer_state import optimizers_in
from taylor_kernels.statistics.base import check_loss_scale
from taylor_kernels.tracing.run.running import new_garbage_only, outside_inference_mode

_VERSION = 1
#: More filters than any model has: nothing but thresholds and targets ends a pruning.
_ALL = 2**62


class AdaptivePruner(Progress):
    """Prunes channels and whole residual blocks while a model trains (a reconstruction).

    `step()` comes between backward() and the optimizer's step. When `done`, train on to fine-tune,
    before or after `compact()`, which removes what is masked and takes the gates of blocks into the
    layers.

    Args:
        model: pruned in place. Layers without a norm with a scale behind them stay as they are.
        example_inputs: as `tk.Pruner` takes them.
        optimizer: what trains the model; its rates scale the penalty, and its state is cut.
        flops, params, filters: the fractions to keep, in (0, 1], at least one: when to stop. How
            much of which layer goes is not set.
        strength: λ of the penalty at first.
        growth: what λ is multiplied by at every pruning, at least 1.
        tolerance: the share of a layer's Σ γ² that may go at a pruning.
        every: steps between two prunings.
        blocks: whole residual blocks may go.
        ignore, round_to, min_filters, verify: as `tk.Pruner` takes them.

    Attributes:
        done: the targets are met; nothing is penalised any more.
        strength: λ now.

    Raises:
        TypeError, ValueError: as `tk.Pruner`, or an argument here is out of range; or no channel
            has a norm with a scale that the optimizer trains. The model is as it was.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(
        ...     nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
        ... )
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = tk.methods.AdaptivePruner(
        ...     model, torch.randn(1, 1, 3, 3), optimizer=optimizer, params=0.5, blocks=False,
        ...     every=10, strength=0.1,
        ... )
        >>> while not pruner.done:
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 1, 3, 3)).square().mean().backward()
        ...     record = pruner.step()
        ...     optimizer.step()
        >>> pruner.compact()[0].out_channels <= 8
        True
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        optimizer: Optimizer | Sequence[Optimizer],
        flops: float | None = None,
        params: float | None = None,
        filters: float | None = None,
        strength: float = 3e-3,
        growth: float = 1.02,
        tolerance: float = 0.05,
        every: int = 50,
        blocks: bool = True,
        ignore: Sequence[str | nn.Module] = (),
        round_to: int = 1,
        min_filters: int = 1,
        verify: bool = True,
    ) -> None:
        targets = check_arguments(
            model,
            get_criterion("bn_scale"),
            {"flops": flops, "params": params, "filters": filters},
            every=every,
            per_step=1,
            momentum=0.0,
            round_to=round_to,
            min_filters=min_filters,
            optimizer=optimizer,
            backend=None,
            verify=verify,
        )
        if not optimizers_in(optimizer):
            raise ValueError("optimizer: the penalty follows its learning rates; give the one used")
        check_flag("blocks", blocks)
        check_number("strength", strength, lambda v: 0 < v < inf, "a number above 0")
        check_number("growth", growth, lambda v: 1 <= v < inf, "1 or more")
        check_number("tolerance", tolerance, lambda v: 0 < v < 1, "a share above 0 and below 1")
        check_free(model)
        self.model, self.strength = model, float(strength)
        self._optimizer = optimizer
        self._growth, self._tolerance, self._every = float(growth), float(tolerance), every
        self._channel_gates = ChannelGates(model, learning_rates(optimizer))
        with outside_inference_mode(), new_garbage_only():
            self._prunable = find_prunable(
                model, example_inputs, ignore, round_to=round_to, min_filters=min_filters,
                statistic=None, verify=verify, blocks=blocks,
            )  # fmt: skip
            if not any(map(self._channel_gates.of, self._prunable.groups)):
                raise ValueError(
                    "model: no channel that could go has a norm behind it with a scale that the "
                    "optimizer trains, so there is nothing to penalise; use tk.Pruner"
                )
            self._budget = Budget(
                self._prunable.meter, self._prunable.groups, targets, _ALL, self._prunable.blocks,
                remedy_out_of_reach(self._prunable.skipped, round_to, min_filters),
            )  # fmt: skip
            self._network = Network(model, self._prunable, optimizer)
            self._block_gates = BlockGates(model, self._prunable.blocks)
        self._steps = 0
        self._history: list[PruneRecord] = []

    @property
    def gates(self) -> dict[str, float]:
        """Residual block that is left, and has a gate -> its gate."""
        return self._block_gates.values(self._network.left)

    @property
    def skipped(self) -> dict[str, str]:
        """Layers whose filters are not removed, unless their block is -> the reason."""
        found = dict(self._prunable.skipped)
        for group in self._network.groups:
            if not self._channel_gates.of(group):
                reason = "no norm behind it has a scale that the optimizer trains"
                found |= {slot.owner: reason for slot in group.producers}
        return found

    def step(self, *, loss_scale: float = 1.0) -> PruneRecord | None:
        """Shrink the gates, and at every `every`-th step mask what has fallen.

        Between backward() and optimizer.step().

        Args:
            loss_scale: what the loss was multiplied by before backward() (a GradScaler's
                get_scale()). Where gradients have overflowed, call skip() in place of step().

        Returns:
            What went, or None.

        Raises:
            ValueError: the scale is no positive number.
            RuntimeError: γ or a gate is not finite; nothing was masked then. Or other code has cut
                the model.
        """
        check_loss_scale(loss_scale)
        self._network.check_unchanged()
        with torch.no_grad(), outside_inference_mode():
            net, done, rates = self._network, self.done, learning_rates(self._optimizer)
            strength = 0.0 if done else self.strength
            self._block_gates.step(
                max(rates.values(), default=0.0),
                [strength * net.meter.filters_of(block) for block in net.blocks],
                loss_scale,
            )
            if done:
                return None
            self._channel_gates.shrink(net.groups, rates, strength)
            self._steps += 1
            return self._prune() if self._steps % self._every == 0 else None

    def skip(self) -> None:
        """Forget the minibatch."""
        self._block_gates.discard()

    def _prune(self) -> PruneRecord | None:
        net = self._network
        scores = [
            self._channel_gates.shares(group, dead, self._tolerance)
            for group, dead in zip(net.groups, net.dead, strict=True)
        ]
        left = net.left
        worth = shares(self._block_gates.energies(left), self._tolerance).tolist()
        net.check_optimizer()
        taken, gone = select_with_blocks(
            net.groups, net.dead, scores, net.meter, self._budget,
            [net.blocks[number] for number in left], worth,
        )  # fmt: skip
        self.strength *= self._growth
        if not gone and not any(units.numel() for units in taken):
            return None
        went = [score[units] for score, units in zip(scores, taken, strict=True)]
        went.append(torch.tensor([worth[number] for number in gone], dtype=torch.float64))
        record = PruneRecord.of(
            net.meter.cost, self.whole, step=self._steps,
            removed=net.mask(taken, [left[number] for number in gone]),
            threshold=torch.cat(went).max().item(), done=self.done,
            blocks=tuple(net.blocks[left[number]].name for number in gone),
        )  # fmt: skip
        self._block_gates.keep(net.left)
        self._history.append(record)
        return record

    def compact(self) -> nn.Module:
        """Remove what is masked, in place, with the optimizer's state. Once `done`, the gates of
        the blocks that are left become part of their layers.

        Returns:
            The model.
        """
        with outside_inference_mode():
            self._network.compact()
            if self.done:
                self._block_gates.fold()
        return self.model

    def close(self) -> None:
        """Take every hook off the model; masked filters are no longer held, gates are taken into
        their layers."""
        self._block_gates.fold()
        self._network.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything it needs to go on, as tensors and plain Python; beside the model's and the
        optimizer's."""
        return {
            "version": _VERSION,
            "structure": self._prunable.structure,
            "masks": self._network.state(),
            "blocks": self._network.block_state(),
            "gates": self._block_gates.state_dict(),
            "strength": self.strength,
            "steps": self._steps,
            "history": [asdict(record) for record in self._history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stopped; of the same original model, made with the same arguments.

        The model's structure follows: load the model's own state_dict after this one, and the
        optimizer's after that.

        Raises:
            ValueError: the state is of another model. Nothing has changed.
        """
        own = self._network.block_state()["names"]
        if (
            not isinstance(state, Mapping)
            or state.get("version") != _VERSION
            or state.get("structure") != self._prunable.structure
            or state["blocks"]["names"] != own
        ):
            raise ValueError(
                "state: it is no state_dict of an AdaptivePruner of this model; make the pruner of "
                "the model as it was at first, with the same arguments"
            )
        masks, blocks = state["masks"], state["blocks"]
        with outside_inference_mode():
            self._network.restore(
                masks["removed"], masks["compacted"], blocks["removed"], blocks["compacted"]
            )
            self._block_gates.load_state_dict(state["gates"])
            self._block_gates.keep(self._network.left)
        self.strength, self._steps = state["strength"], state["steps"]
        self._history = [PruneRecord(**record) for record in state["history"]]
