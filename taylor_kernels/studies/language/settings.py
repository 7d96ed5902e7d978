"""What decides a run of `taylor-kernels language`, and the checks before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from taylor_kernels.pruning.scores.block_scores import check_blocks
from taylor_kernels.statistics import get_statistic
from taylor_kernels.studies.language.kinds import KINDS, Scoring
from taylor_kernels.studies.language.measure import Cell, Recipe
from taylor_kernels.studies.language.network import Sizes
from taylor_kernels.studies.language.training import Schedule
from taylor_kernels.studies.options import Mistake, check_writable, find_criteria
from taylor_kernels.studies.settings import StudySettings

DEFAULT_CRITERIA = ("taylor_fo", "taylor_fo_gate", "magnitude_l2", "random")
FRACTIONS = (0.2, 0.3, 0.5)

FULL = Recipe(
    sizes=Sizes(),
    dense=Schedule(steps=1500, lr=2e-3),
    recovery=Schedule(steps=60, lr=3e-4),
    scored=Schedule(steps=0, lr=0.0, windows=8, length=128),
    scoring=Scoring(),
    judged=16,
    repeats=21,
)
QUICK = Recipe(
    sizes=Sizes(width=64, hidden=128, layers=4, heads=4, groups=2, head_dim=16, context=128),
    dense=Schedule(steps=400, lr=4e-3, windows=4, length=128),
    recovery=Schedule(steps=20, lr=5e-4, windows=4, length=128),
    scored=Schedule(steps=0, lr=0.0, windows=4, length=64),
    scoring=Scoring(minibatches=2),
    judged=16,
    repeats=7,
)


@dataclass(frozen=True)
class LanguageSettings(StudySettings):
    """The study as the user asked for it.

    Attributes:
        criteria: the first one's models are those whose speed and memory are measured.
        kinds: names of `KINDS`.
        fractions: of each kind's units that go, in (0, 1).
        draws: how often `random` is drawn.
        quick: a small model, in some minutes.
    """

    out: Path = Path("runs/language")
    criteria: tuple[str, ...] = DEFAULT_CRITERIA
    kinds: tuple[str, ...] = tuple(KINDS)
    fractions: tuple[float, ...] = FRACTIONS
    draws: int = 3
    quick: bool = False

    @property
    def name(self) -> str:
        return "language"

    @property
    def recipe(self) -> Recipe:
        return QUICK if self.quick else FULL

    def check(self) -> None:
        super().check()
        for criterion in find_criteria(self.criteria):
            kind = get_statistic(criterion.statistic)
            if not kind.prunable or kind.reads == "closure":
                raise Mistake(
                    f"--criteria: {criterion.name!r} runs the model itself, which this study does "
                    "not let it; choose another, such as taylor_fo"
                )
            try:
                check_blocks(True, criterion)
            except ValueError as error:
                raise Mistake(f"--criteria: {str(error).removeprefix('blocks: ')}") from None
        for name in self.kinds:
            if name not in KINDS:
                raise Mistake(f"--kinds: {name!r} is not one of {', '.join(map(repr, KINDS))}")
        for value in self.fractions:
            if not (math.isfinite(value) and 0 < value <= 0.9):
                hint = f"; for {value:g}% write {value / 100:g}" if 1 <= value < 100 else ""
                raise Mistake(f"--fractions: {value:g} is not in (0, 0.9]; 0.5 removes half{hint}")
        if self.draws < 1:
            raise Mistake(f"--draws: {self.draws} is below 1")
        check_writable(self.out)
        check_writable(self.cache_folder)

    def cells(self) -> list[Cell]:
        """Every cell, `random` as often as it is drawn."""
        return [
            Cell(kind, fraction, criterion, draw)
            for kind in self.kinds
            for fraction in self.fractions
            for criterion in self.criteria
            for draw in range(self.draws if criterion == "random" else 1)
        ]
