"""What the removal of units asks of a model: of its tensors, attributes, norms and routers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from taylor_kernels.tracing.answer.counters import shrunk
from taylor_kernels.tracing.answer.units import Group, index
from taylor_kernels.tracing.answer.vectors import Vectors
from taylor_kernels.tracing.model.code import Place
from taylor_kernels.tracing.notes.across import Kept
from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.experts import ExpertWeights, Result


@dataclass(frozen=True)
class _Staying:
    """Which places of vectors of classes stay.

    Attributes:
        gone: [classes] bool, those that go.
        before: [classes] bool, those that have been removed before, if any have.
    """

    gone: npt.NDArray[np.bool_]
    before: npt.NDArray[np.bool_] | None

    def places(self, vector: Vector) -> Tensor | None:
        """Where in a vector those are that stay, of what is there; None if all do."""
        there = vector if self.before is None else vector[~self.before[vector]]
        gone = self.gone[there]
        return index(np.flatnonzero(~gone)) if gone.any() else None

    def count(self, vector: Vector) -> int:
        """How many of a vector are there."""
        return vector.size - (0 if self.before is None else int(self.before[vector].sum()))


class Consequences:
    """The recipe for masking and removal: what goes with the units of a model's groups.

    Attributes:
        groups: groups of interchangeable units.
        bare: of the layers those that are no convolution or linear layer.
    """

    groups: list[Group]
    bare: dict[str, tuple[tuple[str, int], ...]]
    _vectors: Vectors
    _whole: Vectors  # of the model before anything was removed
    _before: npt.NDArray[np.bool_]  # [classes], those that have been removed
    _why: Vector

    def entries(
        self, dead: Sequence[Tensor], before: Sequence[Tensor] | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """What goes with the dead units: tensor -> dimension -> indices [n] ascending.

        Masking fills these with zeros (with `fills` where a tensor is named there); removal
        deletes them, from the tensor, its gradient and optimizer state of its shape.

        Args:
            dead: for each group [U] bool, True for units that go.
            before: for each group [U] bool, True for units that have been removed before; indices
                are of what is left without them.
        """
        if before is None:
            return self._vectors.entries(self._gone(dead))
        return self._whole.entries(self._gone(dead), self._before | self._gone(before))

    def orders(
        self, dead: Sequence[Tensor], before: Sequence[Tensor] | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """How removing the dead units changes the order of what is left: tensor -> dimension ->
        which of the places [n] comes first, second and so on, once the indices of `entries` have
        been deleted. Only where it changes, which is in stages (see `Group.stage`).

        Args:
            dead: for each group [U] bool, True for units that go.
            before: as of `entries`.

        Raises:
            ValueError: units of a stage do not go in step.
        """
        if not self._whole.arrangement.stages:
            return {}
        earlier = self._before if before is None else self._before | self._gone(before)
        return self._whole.orders(self._gone(dead), earlier)

    def kept_by_norms(
        self, dead: Sequence[Tensor], before: Sequence[Tensor] | None = None
    ) -> dict[str, Kept]:
        """What masking the dead units asks of norms across channels.

        A norm whose statistics are of all its channels (LayerNorm, RMSNorm, GroupNorm of one group)
        has to be run on the channels that are kept, so that masking is removal.

        Args:
            dead: for each group [U] bool, True for units that go.
            before: as of `entries`.

        Returns:
            Module -> what it is run on: the channels' dimension in its input, from the end, the
            indices [n] of those that stay and more; only modules of which some go.
        """
        if not self._vectors.across:
            return {}
        staying = self._staying(dead, before)
        return {
            name: Kept(
                call.dim,
                kept,
                staying.count(vector),
                call.rank,
                call.returned,
                call.cut,
                call.weights,
                self._counting(name, vector) if call.weights else (),
            )
            for name, (call, vector) in self._vectors.across.items()
            if (kept := staying.places(vector)) is not None
        }

    def _counting(self, name: str, vector: Vector) -> tuple[str, ...]:
        """The attributes of a module that count these classes."""
        return tuple(
            attribute
            for module, attribute, _, counted in self._vectors.counters
            if module == name and np.array_equal(counted, vector)
        )

    def kept_by_called_norms(
        self, dead: Sequence[Tensor], before: Sequence[Tensor] | None = None
    ) -> dict[str, tuple[tuple[Place, tuple[int, Tensor] | None], ...]]:
        """What masking the dead units asks of norms that a module's own code calls as functions.

        Args:
            dead: for each group [U] bool, True for units that go.
            before: as of `entries`.

        Returns:
            Module -> for each call its place in the code, with the channels' number and the places
            [n] of those that it is run on; None for calls that none go of. Those at one place are
            in the order of a run. Only modules of which some go.
        """
        found: dict[str, tuple[tuple[Place, tuple[int, Tensor] | None], ...]] = {}
        if not self._vectors.called:
            return found
        staying = self._staying(dead, before)
        for name, calls in self._vectors.called.items():
            kept = tuple(
                (place, None)
                if vector is None or (places := staying.places(vector)) is None
                else (place, (staying.count(vector), places))
                for place, vector in calls
            )
            if any(call is not None for _, call in kept):
                found[name] = kept
        return found

    def kept_by_routers(
        self, dead: Sequence[Tensor], before: Sequence[Tensor] | None = None
    ) -> dict[str, tuple[Tensor, tuple[Result, ...]]]:
        """What masking the dead units asks of routers: to choose among the experts that are kept.

        Args:
            dead: for each group [U] bool, True for units that go.
            before: as of `entries`.

        Returns:
            Router -> the numbers [n] of the experts that stay, and what the router returns; only
            routers some of whose experts go.
        """
        if not self._vectors.mixtures:
            return {}
        staying = self._staying(dead, before)
        return {
            name: (kept, mixture.results)
            for name, (mixture, vector) in self._vectors.mixtures.items()
            if (kept := staying.places(vector)) is not None
        }

    def _staying(self, dead: Sequence[Tensor], before: Sequence[Tensor] | None) -> _Staying:
        return _Staying(self._gone(dead), None if before is None else self._gone(before))

    def experts_needed(self, group: Group) -> int:
        """So many units of a group stay at least, of which a router chooses that many for each
        token; 0 where the units are no experts."""
        mine = group.classes.numpy()
        counts = [
            m.top_k for m, vector in self._vectors.mixtures.values() if np.isin(vector, mine).any()
        ]
        return max(counts, default=0)

    @property
    def routed(self) -> set[str]:
        """Parameters with an expert for each index of dimension 0, of which a token goes through as
        many, however many there are."""
        return {part for mixture, _ in self._vectors.mixtures.values() for part in mixture.parts}

    @property
    def expert_weights(self) -> list[ExpertWeights]:
        """How channels go through the weights of experts, by mixture."""
        return self._vectors.expert_weights(self.bare)

    def attributes(self, dead: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
        """What removing the dead units makes of module attributes: module -> attribute -> value.

        An integer stays an integer, a tuple or list of them a tuple or list.

        Args:
            dead: for each group [U] bool, True for units that go.
        """
        return shrunk(self._vectors.counters, self._gone(dead))

    def _gone(self, dead: Sequence[Tensor]) -> npt.NDArray[np.bool_]:
        if len(dead) != len(self.groups):
            raise ValueError(
                f"dead: expected {len(self.groups)} masks, one a group, got {len(dead)}"
            )
        for group, mask in zip(self.groups, dead, strict=True):
            if mask.shape != group.classes.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"dead: the mask of group {group.name!r} must be {group.size} bools, got "
                    f"{mask.dtype} of shape {tuple(mask.shape)}"
                )
        gone = np.zeros(self._why.size, bool)
        if dead:
            # All groups at once: a proof asks this several times for each of its runs.
            classes = torch.cat([group.classes for group in self.groups])
            gone[classes[torch.cat([mask.cpu() for mask in dead])].numpy()] = True
        return gone
