"""One network after another: masks of every method at every sparsity, and what they can learn.

What is finished is kept: the masks of a method at a sparsity, and each network that was trained.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from taylor_kernels.methods.frame import Frame
from taylor_kernels.studies.at_init.problem import Problem, Recipe, Trainer
from taylor_kernels.studies.own.parts import seed_everything
from taylor_kernels.studies.own.task import as_mistakes

if TYPE_CHECKING:
    from taylor_kernels.studies.cache import Cache, Piece
    from taylor_kernels.studies.progress import Advance, ProgressLog
    from taylor_kernels.studies.results import Json

#: What a table says of a network -> the control of `Frame.finish`.
CONTROLS = {"as found": None, "shuffled": "shuffle", "drawn anew": "reinit"}
#: What is drawn at random is drawn anew for each purpose.
_FINDING, _FINISHING = 1, 2


@dataclass(frozen=True)
class Measurement:
    """What is measured of a problem, and where what is finished lies."""

    problem: Problem
    recipe: Recipe
    cache: Cache
    log: ProgressLog

    def dense(self) -> Json:
        """The figures of the network that keeps all weights."""
        piece = self._piece("dense", {})
        if (found := piece.load()) is None:
            with self._task("dense", self.recipe.epochs) as advance:
                model = self.problem.make()
                Trainer(self.problem, self.recipe, advance)(model, 0, self.recipe.epochs)
                piece.save(self.problem.figures(model))
            found = piece.load()
        return dict(found)

    def curve(self, frame: Frame, sparsities: Sequence[float]) -> list[Json]:
        """The figures of a method's networks at each sparsity, under each control.

        Returns:
            A dict each: method, control, sparsity, seed, `left` (of each layer the weights that
            are left), loss and perhaps accuracy.

        Raises:
            Mistake: the method cannot score the model, or a training fails.
        """
        every = [(s, label) for s in sparsities for label in CONTROLS]
        pieces = {each: self._finished(frame, *each) for each in every}
        todo = [each for each, piece in pieces.items() if piece.load() is None]
        if todo:
            trained = len(todo) + frame.times * (frame.mask_from == "end") * len(
                {s for s, _ in todo if self._found(frame, s).load() is None}
            )
            with self._task(frame.name, self.recipe.epochs * trained) as advance:
                for sparsity, label in todo:
                    found = self._masks(frame, sparsity, advance)
                    pieces[sparsity, label].save(self._trained(frame, found, label, advance))
        facts = {"method": frame.name, "seed": self.problem.seed}
        return [
            facts
            | {"sparsity": sparsity, "control": label}
            | {"left": self._found(frame, sparsity).load()["left"]}
            | pieces[sparsity, label].load()
            for sparsity, label in every
        ]

    def _masks(self, frame: Frame, sparsity: float, advance: Advance) -> dict[str, Tensor]:
        """The masks of a method, found now or in an earlier run."""
        shapes = {name: p.shape for name, p in self.problem.make().named_parameters()}
        return {
            name: unpacked(text, shapes[name])
            for name, text in self._found(frame, sparsity)
            .made(partial(self._find, frame, sparsity, advance))["masks"]
            .items()
        }

    def _find(self, frame: Frame, sparsity: float, advance: Advance) -> Json:
        problem, recipe = self.problem, self.recipe
        model = problem.make()
        seed_everything(problem.seed, _FINDING)
        with as_mistakes():
            masks = frame.find(
                model,
                1 - sparsity,
                Trainer(problem, recipe, advance),
                recipe.epochs,
                batches=problem.scored,
                loss=problem.loss,
                early=recipe.early,
            )
        return {
            "masks": {name: packed(mask) for name, mask in masks.items()},
            "left": {name: int(mask.sum()) for name, mask in masks.items()},
        }

    def _trained(
        self, frame: Frame, masks: Mapping[str, Tensor], label: str, advance: Advance
    ) -> Json:
        problem, recipe = self.problem, self.recipe
        model, trainer = problem.make(), Trainer(problem, recipe, advance)
        if frame.weights_from == "early":
            trainer(model, 0, recipe.early)
        device = next(model.parameters()).device
        seed_everything(problem.seed, _FINISHING)
        with as_mistakes():
            held = frame.finish(
                model,
                {name: mask.to(device) for name, mask in masks.items()},
                trainer,
                recipe.epochs,
                early=recipe.early,
                control=CONTROLS[label],
                generator=torch.Generator().manual_seed(problem.seed),
            )
        held.close()
        return problem.figures(model)

    def _found(self, frame: Frame, sparsity: float) -> Piece:
        return self._piece("masks", {"frame": asdict(frame), "sparsity": sparsity})

    def _finished(self, frame: Frame, sparsity: float, label: str) -> Piece:
        settings = {"frame": asdict(frame), "sparsity": sparsity, "control": label}
        return self._piece("trained", settings)

    def _piece(self, name: str, settings: Mapping[str, Any]) -> Piece:
        key = {
            "problem": self.problem.key,
            "scored": len(self.problem.scored),
            "recipe": asdict(self.recipe),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **settings,
        }
        return self.cache.piece(name, key, by=[Measurement, *self.problem.by])

    def _task(self, what: str, epochs: int) -> Any:
        return self.log.task(f"seed {self.problem.seed}: {what}", epochs)


def packed(mask: Tensor) -> str:
    """A mask's bits as text."""
    return base64.b85encode(np.packbits(mask.cpu().numpy()).tobytes()).decode()


def unpacked(text: str, shape: torch.Size) -> Tensor:
    """The mask of `packed`."""
    bits = np.frombuffer(base64.b85decode(text), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=shape.numel())).bool().view(shape)
