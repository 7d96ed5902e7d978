"""A pruner's state: saved, and taken on by a pruner of the same original model."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from taylor_kernels.pruning.choosing.groups import by_schedule
from taylor_kernels.pruning.records import PruneRecord
from taylor_kernels.pruning.removing.removal import Removal
from taylor_kernels.pruning.saving.state import check_pruner_state, pruner_state
from taylor_kernels.pruning.watching import Watching
from taylor_kernels.tracing.run.running import outside_inference_mode


class Resumable(Watching):
    """What a pruner gives of itself to others: its state, and to ranks their agreement."""

    @abstractmethod
    def _prune(self) -> PruneRecord:
        """Mask what the minibatches since the last pruning say is to go."""

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
        with outside_inference_mode():
            return self._prune() if self._minibatches.absent() else None

    def sync(self) -> None:
        """Exchange what the `ranks` have seen since they did so last; a collective.

        To be called before state_dict(). Without ranks, or if nothing came since, it does nothing.

        Raises:
            RuntimeError: a rank did not come in time, or the ranks do not fit together.
        """
        self._minibatches.sync()

    def check_masks(self) -> None:
        """All `ranks` have removed the same filters and blocks; a collective. Prunings do it
        themselves.

        Raises:
            RuntimeError: they have not; the message names the first layer or block that differs.
        """
        if self.ranks is not None:
            removed = self._network.state()["removed"]
            blocks = self._network.block_state()
            gone = dict(zip(blocks["names"], blocks["removed"].tolist(), strict=True))
            self._minibatches.check_masks(self._network.first, removed, gone)

    def removal(self) -> Removal:
        """What compact() has taken off the original model, which `save_pruned` keeps.

        Raises:
            ValueError: filters are masked that compact() has not removed.
        """
        state, blocks = self._network.state(), self._network.block_state()
        if not all(map(torch.equal, state["removed"], state["compacted"])) or not torch.equal(
            blocks["removed"], blocks["compacted"]
        ):
            raise ValueError("pruner: it holds filters at zero; call compact() first")
        gone = self._network.blocks_off
        channels = self._prunable.channels.leaving(gone)
        return Removal(
            channels.entries(state["compacted"]),
            channels.attributes(state["compacted"]),
            tuple(place for block in gone for place in block.places),
            channels.orders(state["compacted"]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything the pruner needs to go on, as tensors and plain Python.

        Save it beside the model's and the optimizer's (`save_checkpoint` does all three). It is
        the same on all `ranks`, and holds for any number of them.

        Raises:
            RuntimeError: there are minibatches that the ranks have not exchanged yet.
        """
        if waiting := self._minibatches.waiting:
            raise RuntimeError(
                f"state_dict: {waiting} minibatches are this rank's alone yet; call "
                "sync() on every rank first"
            )
        masks, scores = self._network.state(), self._minibatches.scores.state_dict()
        structure, name = self._prunable.structure, self.criterion.name
        steps = self._minibatches.steps
        blocks = None
        if self._minibatches.blocks is not None:
            blocks = self._network.block_state() | {"scores": self._minibatches.blocks.state_dict()}
        return pruner_state(structure, name, masks, scores, steps, self._history, blocks)

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
            off, gone = self._of_blocks(state)
            self._network.restore(state["removed"], state["compacted"], off, gone)
            scores = self._new_scores()
            scores.load_state_dict(state["scores"])
            self._minibatches.restart(scores, state["steps"])
            if self._minibatches.blocks is not None:
                self._minibatches.blocks.load_state_dict(state["blocks"]["scores"])
            self._history = [PruneRecord(**record) for record in state["history"]]
            self._watch()

    def shapes_after(self, state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes that `load_state_dict(state)` would give what it cuts; raises as that does."""
        state = self._checked(state)
        return self._network.shapes_after(state["compacted"], self._of_blocks(state)[1])

    def gone_after(self, state: dict[str, Any]) -> list[str]:
        """The names of the model's state that would go with whole blocks; raises as that does."""
        return self._network.gone_after(self._of_blocks(self._checked(state))[1])

    def _of_blocks(self, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """[B] bool: the blocks that a state has removed in any way, and those it has compacted."""
        blocks = state.get("blocks")
        if blocks is None:
            none = torch.zeros(0, dtype=torch.bool)
            return none, none
        return blocks["removed"], blocks["compacted"]

    def _checked(self, state: dict[str, Any]) -> dict[str, Any]:
        self._check_open()
        names = None if self._minibatches.blocks is None else self._network.block_state()["names"]
        staged = {number for _, numbers in by_schedule(self._network.first) for number in numbers}
        structure, criterion = self._prunable.structure, self.criterion.name
        state = check_pruner_state(state, structure, criterion, names, staged)
        self._network.check_in_step(state)
        self._network.stale(state["compacted"], self._of_blocks(state)[1])
        return state
