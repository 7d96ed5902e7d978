"""Which axis of each table shrinks.

A reshape leaves a choice: of a dimension cut into heads and positions either whole heads go, or
the same positions of every head. Each table of cells may have one axis along which it shrinks; the
other axes are kept whole. Axes that are one (the heads of queries, keys and values) are chosen
together. Some orders of choosing are tried, and for each set of tables that hang together the one
that leaves most output channels free is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from taylor_kernels.tracing.notes.atoms import MEETS_FIXED, Reason, Vector
from taylor_kernels.tracing.notes.forest import Forest
from taylor_kernels.tracing.notes.record import Record
from taylor_kernels.tracing.resolving.axis_kinds import families_of, kinds_of
from taylor_kernels.tracing.resolving.cuts import Asked, Matched, Parts, Sets, match
from taylor_kernels.tracing.resolving.grids import FREE, Grids, settle
from taylor_kernels.tracing.resolving.shuffles import runs, shuffles


@dataclass(frozen=True)
class Choice:
    """How a reshape was resolved.

    Attributes:
        module, operation: where it ran.
        shape: the grid.
        axis: the axis along which it can shrink, None if it has to stay as it is.
    """

    module: str
    operation: str
    shape: tuple[int, ...]
    axis: int | None


@dataclass(frozen=True)
class Resolution:
    """Classes of atoms.

    Attributes:
        label: for each atom its class.
        why: for each atom the number of the reason that keeps it, or FREE.
        reasons: by number.
        choices: one for each reshape that cut or joined channels.
    """

    label: Vector
    why: Vector
    reasons: list[Reason]
    choices: list[Choice]


class Chooser:
    """Chooses the axes along which tables shrink.

    Args:
        record: of a run, its atoms no two of which are known to be one.
        grids: its tables.
        parts: its cuts whose parts have to stay in proportion.
        why: for each atom the number of the reason that keeps it, or FREE.
        reasons: by number; others are added.
    """

    def __init__(
        self,
        record: Record,
        grids: Sequence[Grids],
        parts: Sequence[Parts],
        why: Vector,
        reasons: list[Reason],
    ) -> None:
        self.record, self.parts, self.why, self.reasons = record, parts, why, reasons
        self.tables = record.tables
        self.forest = forest = Forest(record.count)
        self.shuffles = shuffles(record, forest.label)
        self.numbers: dict[Reason, int] = {}
        self.keeping: dict[tuple[int, int | None], int] = {}
        self._matched: dict[Asked, Sets] = {}
        self._known: dict[tuple[int, bytes, bytes], Matched] = {}
        self._shrunk: dict[tuple[int, int], tuple[Vector, Vector, Vector]] = {}
        settled = settle(grids, forest, why)
        label = forest.label
        self.kinds = kinds_of(self.tables, label)
        self.family, self.owner = families_of(self.tables, label)
        heads = {int(a) for vector in record.heads for a in label[vector]}
        self.uses: dict[int, list[tuple[int, int]]] = {}
        self.width: dict[int, int] = {}
        self.head: dict[int, bool] = {}
        dead: set[int] = set()
        for number, table in enumerate(self.tables):
            for dim, axis in enumerate(table.axes):
                kind = self.kinds[number][dim]
                self.uses.setdefault(kind, []).append((number, dim))
                classes = label[axis]
                free = np.unique(classes[settled[axis] == FREE]).size
                self.width[kind] = max(self.width.get(kind, 0), free)
                here = bool(heads) and not heads.isdisjoint(classes.tolist())
                self.head[kind] = self.head.get(kind, False) or here
                if dim not in table.allowed or not free or (classes == classes[0]).all():
                    dead.add(kind)
        self.candidates = [kind for kind in self.uses if kind not in dead]

    def resolution(self) -> Resolution:
        """The classes with the axes shrinking that leave most free."""
        orders: list[Callable[[int], tuple]] = [
            lambda kind: (-self.head[kind], -len(self.uses[kind]), -self.width[kind], kind),
            lambda kind: (-self.width[kind], kind),
            lambda kind: (self.head[kind], -self.width[kind], -kind),
            lambda kind: (-len(self.uses[kind]), kind),
            lambda kind: (kind,),
        ]
        chosen: list[set[int]] = []
        for order in orders:
            picked = self._pick(sorted(self.candidates, key=order))
            if picked not in chosen:
                chosen.append(picked)
        if len(chosen) == 1:
            return self._result(*self._apply(chosen[0]), chosen[0])
        results = [self._apply(kinds) for kinds in chosen]
        scores = [self._score(*result) for result in results]
        with_heads = {
            self.family[number]
            for kind, uses in self.uses.items()
            if self.head[kind]
            for number, _ in uses
        }
        best: set[int] = set()
        for family in set(self.family):

            def value(option: int, family: int = family) -> tuple[int, int]:
                filters, units = scores[option].get(family, (0, 0))
                return (filters, 0 if family in with_heads else units)

            option = max(range(len(chosen)), key=lambda o: (value(o), -o))
            best |= {
                kind for kind in chosen[option] if self.family[self.uses[kind][0][0]] == family
            }
        result = results[chosen.index(best)] if best in chosen else self._apply(best)
        return self._result(*result, best)

    def _result(self, forest: Forest, why: Vector, best: set[int]) -> Resolution:
        choices = [
            Choice(
                *table.where,
                tuple(axis.size for axis in table.axes),
                next((d for d, kind in enumerate(self.kinds[n]) if kind in best), None),
            )
            for n, table in enumerate(self.tables)
        ]
        return Resolution(forest.label, why, self.reasons, choices)

    def _pick(self, ordered: Sequence[int]) -> set[int]:
        taken: set[int] = set()
        busy: set[int] = set()
        for kind in ordered:
            tables = [number for number, _ in self.uses[kind]]
            if len(tables) == len(set(tables)) and busy.isdisjoint(tables):
                taken.add(kind)
                busy.update(tables)
        return taken

    def _apply(self, kinds: Collection[int]) -> tuple[Forest, Vector]:
        """Classes and reasons with these kinds of axes shrinking."""
        forest, why = self.forest.copy(), self.why.copy()
        pairs, rows = [], []
        fixed: list[tuple[Vector, int]] = []
        lives = [next((d for d, k in enumerate(ks) if k in kinds), None) for ks in self.kinds]
        turned = [s for s in self.shuffles if all(lives[n] == d for n, d in s.live)]
        moved = {number for shuffle in turned for number, _ in shuffle.live}
        for number, table in enumerate(self.tables):
            live = lives[number]
            kept = self._kept(number, live)
            fixed += [(axis, kept) for dim, axis in enumerate(table.axes) if dim != live]
            if live is None:
                fixed.append((table.cells, kept))
            elif table.kind == "rows" and live == 1:
                bounds = tuple(range(0, table.cells.size + 1, table.axes[1].size))
                rows.append(Parts(table.cells, bounds, self.reasons[kept]))
            elif number not in moved:
                places, cells, alone = self._cells_of(number, live)
                pairs.append((places, cells))
                if alone.size:
                    fixed.append((alone, self._number(Reason(MEETS_FIXED, *table.where))))
        if fixed:
            sizes = [atoms.size for atoms, _ in fixed]
            numbers = np.repeat([kept for _, kept in fixed], sizes)
            np.minimum.at(why, np.concatenate([atoms for atoms, _ in fixed]), numbers)
        forest.unite(pairs)
        for shuffle in turned:
            left = runs(shuffle, forest)
            if left.size:
                np.minimum.at(why, left, self._number(shuffle.reason))
        # A reason for one atom of a class is a reason for all.
        by_class = np.full(why.size, FREE)
        np.minimum.at(by_class, forest.label, why)
        for parts in (*self.parts, *rows):
            alone = self._match(parts, forest, by_class)
            if alone.size:
                by_class[alone] = self._number(parts.reason)
        return forest, by_class[forest.label]

    def _cells_of(self, number: int, live: int) -> tuple[Vector, Vector, Vector]:
        """What a table's cells are one with, and they, where it shrinks along this axis; and what
        meets no atom there, as beside channels of the model's input, and so has to stay."""
        if (number, live) not in self._shrunk:
            table = self.tables[number]
            after = math.prod(axis.size for axis in table.axes[live + 1 :])
            axis = table.axes[live]
            cells = np.tile(axis.repeat(after), table.cells.size // (after * axis.size))
            one, other = cells != 0, table.cells != 0
            both = one & other
            alone = np.maximum(cells, table.cells)[one != other]
            self._shrunk[number, live] = cells[both], table.cells[both], alone
        return self._shrunk[number, live]

    def _match(self, parts: Parts, forest: Forest, by_class: Vector) -> Vector:
        """`match`, which finds the same where another choice has left these classes the same.

        Args:
            by_class: for each class the number of the reason that keeps it, or FREE. Only free
                classes are made one, so that it stays right.

        Returns:
            The classes that find no match.
        """
        label = forest.label[parts.vector]
        chosen = (parts.vector != 0) & (by_class[label] == FREE)
        label = label[chosen]
        key = id(parts.vector), chosen.tobytes(), label.tobytes()
        if key not in self._known:
            self._known[key] = match(parts, chosen, label, self._matched)
        one, other, alone = self._known[key]
        if one.size:
            forest.unite([(one, other)])
        return alone

    def _kept(self, number: int, live: int | None) -> int:
        """The number of the reason that keeps a table's other axes."""
        if (number, live) not in self.keeping:
            table = self.tables[number]
            module, operation = table.where
            shape = " x ".join(str(axis.size) for axis in table.axes)
            text = f"is cut into {shape} by {operation} in {module!r}, " + (
                "which has to stay so"
                if live is None
                else f"of which only dimension {live} shrinks"
            )
            self.keeping[number, live] = self._number(Reason(text, module, operation))
        return self.keeping[number, live]

    def _number(self, reason: Reason) -> int:
        if reason not in self.numbers:
            self.numbers[reason] = len(self.reasons)
            self.reasons.append(reason)
        return self.numbers[reason]

    def _score(self, forest: Forest, why: Vector) -> dict[int, tuple[int, int]]:
        """Free output channels, and units of them, for each family of tables."""
        filters: dict[int, int] = {}
        units: dict[int, set[int]] = {}
        before = self.forest.label
        for product in self.record.products:
            owners = self.owner[before[product.outputs]]
            free = why[product.outputs] == FREE
            classes = np.unique(forest.label[product.outputs][free])
            if owners.size and owners.max() >= 0 and len(classes) + (not free.all()) >= 2:
                family = self.family[int(owners.max())]
                filters[family] = filters.get(family, 0) + int(free.sum())
                units.setdefault(family, set()).update(classes.tolist())
        return {family: (count, len(units[family])) for family, count in filters.items()}
