"""The cells of the study: a kind, a fraction, a criterion and a draw each.

What is finished is kept: the dense model, each cell, and each model whose speed is to be measured.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.statistics import Random
from taylor_kernels.studies.digest import digest_tensors
from taylor_kernels.studies.language.kinds import KINDS, Scoring, prune
from taylor_kernels.studies.language.network import ByteLlama, Sizes
from taylor_kernels.studies.language.text import Text, even_windows
from taylor_kernels.studies.language.training import (
    Schedule,
    bits_per_byte,
    minibatches,
    train,
)
from taylor_kernels.studies.training import count_parameters
from taylor_kernels.studies.weights import load_weights, save_weights

if TYPE_CHECKING:
    from taylor_kernels.studies.cache import Cache, Piece
    from taylor_kernels.studies.progress import ProgressLog
    from taylor_kernels.studies.results import Json

#: Of logits in float64, over the largest of them: what is masked and what is removed may differ by.
SAME = 1e-10
#: Seeds of what is drawn, apart from the study's own.
_SCORED, _RECOVERED = 1_000_000, 2_000_000


@dataclass(frozen=True)
class Recipe:
    """The model, its training, and how it is pruned and judged.

    Attributes:
        dense, recovery: how the model is trained, and trained on after pruning.
        scored: windows to score on, of which `Scoring` says how many minibatches.
        judged: windows of held-out text that perplexity is of.
        repeats: forward passes that each time is the median of.
    """

    sizes: Sizes
    dense: Schedule
    recovery: Schedule
    scored: Schedule
    scoring: Scoring
    judged: int
    repeats: int


@dataclass(frozen=True)
class Cell:
    """One pruning; `draw` numbers those of a criterion that draws."""

    kind: str
    fraction: float
    criterion: str
    draw: int = 0

    @property
    def words(self) -> str:
        return f"{self.kind} {self.fraction:.0%}, {self.criterion}"


@dataclass(frozen=True)
class Measurement:
    """What is measured of one dense model, and where what is finished lies."""

    text: Text
    recipe: Recipe
    seed: int
    cache: Cache
    log: ProgressLog

    def dense(self) -> tuple[nn.Module, Json]:
        """The trained model, and its figures, those of training on included."""
        schedule = self.recipe.dense
        recipe = {"sizes": asdict(self.recipe.sizes), "dense": asdict(schedule)}
        piece = self._piece("dense", {"recipe": recipe}, by=[train, ByteLlama], kind="safetensors")
        model = self.untrained()
        if not self._loaded(model, piece):
            with self.log.task("train the dense model", schedule.steps) as advance:
                train(model, self.text.train, schedule, seed=self.seed, on_step=advance)
            save_weights(model, piece.file)
        facts = self._piece("dense-figures", {}).made(
            lambda: {"bits": self._bits(model), "recovered": self._recovered(copy.deepcopy(model))}
        )
        return model, {"parameters": count_parameters(model), **facts}

    def cell(self, dense: nn.Module, cell: Cell, *, keep: bool = False) -> Json:
        """The figures of a pruning.

        Args:
            keep: the pruned model too, to be measured later.

        Raises:
            RuntimeError: the model computes something else when what was masked is removed.
        """
        piece = self._piece("cell", asdict(cell))
        file = self.pruned_file(cell)
        if (found := piece.load()) is None or (keep and not file.exists()):
            piece.save(self._measured(dense, cell, file if keep else None))
            found = piece.load()
        return {**asdict(cell), **found}

    def _measured(self, dense: nn.Module, cell: Cell, file: Path | None) -> Json:
        start, model = time.perf_counter(), copy.deepcopy(dense)
        windows = minibatches(self.text.train, self.recipe.scored, _SCORED + self.seed)
        with Random.seeded(self.seed + cell.draw):
            pruner, gone = prune(
                model, KINDS[cell.kind], cell.fraction, cell.criterion, self._example, windows,
                self.recipe.scoring,
            )  # fmt: skip
        masked = self._exact(model)
        with warnings.catch_warnings():  # the optimizer of recovery is made afterwards
            warnings.filterwarnings("ignore", r"compact\(\) has put new parameters")
            pruner.compact()
        removed = self._exact(model)
        difference = ((masked - removed).abs().max() / masked.abs().max()).item()
        if not difference <= SAME:
            raise RuntimeError(
                f"{cell.words}: logits differ by {difference:.1e} of the largest when what was "
                "masked is removed; please report it"
            )
        if file is not None:
            tk.save_pruned(file, pruner)
        return {
            "gone": gone,
            "parameters": count_parameters(model),
            "blocks": [name for record in pruner.history for name in record.blocks],
            "widths": {n: m.weight.size(0) for n, m in model.named_modules()
                       if isinstance(m, nn.Linear)},
            "difference": difference,
            "bits": self._bits(model),
            "recovered": self._recovered(model),
            "seconds": time.perf_counter() - start,
        }  # fmt: skip

    def _recovered(self, model: nn.Module) -> float:
        train(model, self.text.train, self.recipe.recovery, seed=_RECOVERED + self.seed)
        return self._bits(model)

    def _bits(self, model: nn.Module) -> float:
        return bits_per_byte(model, self.windows(self.recipe.judged))

    @torch.no_grad()
    def _exact(self, model: nn.Module) -> Tensor:
        """Logits in float64, of a copy: masks are copied with a model."""
        return copy.deepcopy(model).double().eval()(self.windows(2)[:, :-1])

    @property
    def _example(self) -> Tensor:
        return self.windows(2)[:, :16]

    def windows(self, number: int) -> Tensor:
        """[number, context + 1] of held-out text."""
        return even_windows(self.text.held_out, number, self.recipe.sizes.context + 1)

    def untrained(self) -> nn.Module:
        """The model before it has learned anything, the same on every call."""
        torch.manual_seed(self.seed)
        return ByteLlama(self.recipe.sizes).to(self.text.train.device)

    def _loaded(self, model: nn.Module, piece: Piece) -> bool:
        try:
            return load_weights(model, piece.file)
        except ValueError as error:
            self.log.say(f"{error}; training again")
            return False

    def pruned_file(self, cell: Cell) -> Path:
        """Where the model of a cell is, or is to be, kept."""
        return self._piece("pruned", asdict(cell), kind="safetensors").file

    def _piece(
        self, name: str, settings: Json, *, by: Sequence[object] = (), kind: str = "json"
    ) -> Piece:
        key = {
            "seed": self.seed,
            "text": digest_tensors((self.text.train, self.text.held_out)),
            "recipe": asdict(self.recipe) | {"repeats": 0},
            "threads": torch.get_num_threads(),
            "device": self.text.train.device.type,
            "torch": torch.__version__,
            **settings,
        }
        return self.cache.piece(name, key, by=by or [Measurement], kind=kind)
