"""What decides a run of `taylor-kernels at-init`, and the checks before any work starts."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path

from taylor_kernels.methods.frame import FRAMES, Frame
from taylor_kernels.studies.at_init.problem import Recipe
from taylor_kernels.studies.options import Mistake, check_both_or_none, check_writable
from taylor_kernels.studies.settings import StudySettings, flag

#: The methods that keep weights of the start of training: what the command compares.
METHODS = {
    name: frame
    for name, frame in FRAMES.items()
    if frame.weights_from != "end" and frame.granularity == "weight"
}
DEFAULT_METHODS = tuple(name for name in METHODS if METHODS[name].weights_from == "start")
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


@dataclass(frozen=True)
class AtInitSettings(StudySettings):
    """A comparison as the user asked for it: of their model, or of digits where there is none.

    Attributes:
        model, data, val, loss: import paths, "package.module:name".
        method: names of `METHODS`.
        sparsity: the fractions of the weights that go, in [0, 1).
        epochs, lr: of every training, which a cosine takes to 0.
        early: the epoch that a rewound lottery ticket goes back to.
        batches: how many minibatches masks are made from.
        steps: at most so many minibatches of --data are an epoch.
        seeds: how many are run: `seed`, `seed` + 1, ...
    """

    out: Path = Path("runs/at-init")
    model: str | None = None
    data: str | None = None
    val: str | None = None
    loss: str | None = None
    method: tuple[str, ...] = DEFAULT_METHODS
    sparsity: tuple[float, ...] = SPARSITIES
    epochs: int = Recipe.epochs
    lr: float = Recipe.lr
    early: int = Recipe.early
    batches: int = 4
    steps: int | None = None
    seeds: int = 1

    @property
    def name(self) -> str:
        return "at-init"

    @property
    def recipe(self) -> Recipe:
        return Recipe(epochs=self.epochs, lr=self.lr, early=self.early)

    @property
    def frames(self) -> list[Frame]:
        return [METHODS[name] for name in self.method]

    def check(self) -> None:
        super().check()
        check_both_or_none(self.model, self.data)
        for option in ("val", "loss", "steps"):
            if self.model is None and getattr(self, option) is not None:
                raise Mistake(f"--{option}: is for --model and --data; digits have their own")
        for name in self.method:
            if name not in METHODS:
                lower = {known.lower(): known for known in METHODS}
                near = difflib.get_close_matches(name.lower(), lower, n=1)
                hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
                raise Mistake(
                    f"--method: {name!r} is not one of {', '.join(map(repr, METHODS))}{hint}"
                )
        if not self.method:
            raise Mistake("--method: name at least one, such as SynFlow")
        if not self.sparsity:
            raise Mistake("--sparsity: give at least one, such as 0.9")
        for value in self.sparsity:
            if not 0 <= value < 1:
                hint = f"; for {value:g}% write {value / 100:g}" if 1 < value < 100 else ""
                raise Mistake(
                    f"--sparsity: {value:g} is not in [0, 1); 0.9 leaves a tenth of the weights"
                    f"{hint}"
                )
        for name, least in (("epochs", 1), ("batches", 1), ("steps", 1), ("seeds", 1)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise Mistake(f"{flag(name)}: {number} is below {least}")
        if not 0 <= self.early <= self.epochs:
            raise Mistake(f"--early: {self.early} is not between 0 and the {self.epochs} epochs")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise Mistake(f"--lr: {self.lr:g} is not a positive number")
        check_writable(self.out)
        check_writable(self.cache_folder)
