"""What is pruned at initialization: networks that have not learned anything, and their data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from taylor_kernels.methods.masks import ranked_weights
from taylor_kernels.methods.pruning_at_init import Loss
from taylor_kernels.studies.data import Split, load_digits, minibatches
from taylor_kernels.studies.digest import digest_tensors
from taylor_kernels.studies.networks import DigitsCnn
from taylor_kernels.studies.options import Mistake
from taylor_kernels.studies.own.judge import Judge
from taylor_kernels.studies.own.task import figures
from taylor_kernels.studies.training import sgd

if TYPE_CHECKING:
    from taylor_kernels.studies.progress import Advance
    from taylor_kernels.studies.results import Json

Pair = tuple[Any, Any]
#: Images that are judged at once.
_CHUNK = 256


@dataclass(frozen=True)
class Recipe:
    """How every network is trained: momentum SGD under a cosine from `lr` to 0.

    Attributes:
        early: the epoch whose weights a rewound lottery ticket goes back to.
    """

    epochs: int = 8
    lr: float = 0.05
    weight_decay: float = 5e-4
    early: int = 1


@dataclass(frozen=True)
class Problem:
    """A network and its data under one seed.

    Attributes:
        make: gives the network, untrained, with the same start whenever it is called.
        epoch: the minibatches (inputs, targets) of an epoch of a number, the same on every call.
        per_epoch: how many these are.
        scored: those that masks are made from.
        judged: gives those that a trained network is judged on.
        judge, loss: the loss of a minibatch, and of outputs and targets.
        key: plain JSON of all that decides these, beside the code of `by`.
    """

    name: str
    seed: int
    make: Callable[[], nn.Module]
    epoch: Callable[[int], Iterable[Pair]]
    per_epoch: int
    scored: Sequence[Pair]
    judged: Callable[[], Iterable[Pair]]
    judge: Judge
    loss: Loss
    key: Json
    by: Sequence[object]

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Mean loss, and of a classifier the accuracy, in eval mode."""
        return figures(self.judge, model, enumerate(self.judged()))

    def weights(self) -> dict[str, int]:
        """Name -> number of weights of the layers that can be pruned."""
        return {name: weight.numel() for name, weight in ranked_weights(self.make()).items()}


class Trainer:
    """Trains a model from one epoch to another, as `Frame.run` asks for it; the rate depends on
    the epoch alone."""

    def __init__(self, problem: Problem, recipe: Recipe, advance: Advance) -> None:
        self._problem, self._recipe, self._advance = problem, recipe, advance

    def __call__(self, model: nn.Module, first: int, last: int) -> None:
        problem, recipe = self._problem, self._recipe
        optimizer = sgd(model, recipe.lr, recipe.weight_decay)
        model.train()
        for epoch in range(first, last):
            for number, pair in enumerate(problem.epoch(epoch)):
                part = (epoch + number / problem.per_epoch) / recipe.epochs
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * part))
                where = f"on minibatch {number} of epoch {epoch},"
                optimizer.zero_grad()
                loss = problem.judge(model, pair, where).loss
                if not math.isfinite(value := loss.item()):
                    raise Mistake(
                        f"--lr: the loss is {value} {where} so lower it, or look at the data"
                    )
                loss.backward()
                optimizer.step()
            self._advance(f"loss {value:.3f}")


def digits_problem(
    name: str,
    make: Callable[[], nn.Module],
    train: Split,
    test: Split,
    seed: int,
    *,
    batches: int,
    batch_size: int = 64,
    by: Sequence[object] = (),
) -> Problem:
    """A network of ours on images.

    Args:
        make: gives the network; it is seeded before.
        batches: so many minibatches of the first epoch are what masks are made from.
        by: the functions and classes that made network and data.
    """

    def made() -> nn.Module:
        torch.manual_seed(seed)
        return make().to(train.images.device)

    def epoch(number: int) -> Iterator[Pair]:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        return minibatches(train, batch_size, generator)

    def judged() -> Iterator[Pair]:
        return zip(test.images.split(_CHUNK), test.labels.split(_CHUNK), strict=True)

    return Problem(
        name,
        seed,
        made,
        epoch,
        len(train) // batch_size,
        list(itertools.islice(epoch(0), batches)),
        judged,
        Judge(None, None),
        F.cross_entropy,
        {
            "name": name,
            "seed": seed,
            "batch_size": batch_size,
            "start": digest_tensors(made().state_dict().values()),
            "data": digest_tensors((train.images, train.labels, test.images, test.labels)),
        },
        [digits_problem, *by],
    )


def cnn_on_digits(seed: int, batches: int, device: torch.device) -> Problem:
    """The network of the command where the user gives none."""
    data = load_digits(seed).to(device)
    return digits_problem(
        "cnn", DigitsCnn, data.train, data.test, seed, batches=batches, by=[DigitsCnn, load_digits]
    )
