"""What a language model loses: kinds of units, each pruned alone and all of them together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.statistics import get_statistic
from taylor_kernels.studies.language.training import byte_loss
from taylor_kernels.studies.training import count_parameters

#: More filters than any layer has: no filter goes, so that blocks alone may.
_ALL = 10**6


@dataclass(frozen=True)
class Kind:
    """A kind of unit, of which a fraction goes.

    Attributes:
        name: as in the tables.
        of: what the fraction is of.
        counted: "filters" or "params", by which the pruner counts it; "blocks" are counted here.
        options: arguments of the pruner that leave all other units where they are.
    """

    name: str
    of: str
    counted: str
    options: dict[str, Any] = field(default_factory=dict)


#: The stream is written by every `out` and `down`, and by the embedding: one of them keeps it.
_STREAM, _HEADS, _NEURONS = "embed", "*.attention.query", "*.feed_forward.gate"
KINDS = {
    kind.name: kind
    for kind in (
        Kind("feed-forward", "the neurons", "filters", {"ignore": (_STREAM, _HEADS)}),
        Kind(
            "heads", "the key and value heads, with their query heads", "filters",
            {"ignore": (_STREAM, _NEURONS)},
        ),
        Kind("width", "the stream's channels", "filters", {"ignore": (_HEADS, _NEURONS)}),
        Kind("blocks", "the branches", "blocks", {"blocks": True, "min_filters": _ALL}),
        Kind("all", "the parameters", "params", {"blocks": True}),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Scoring:
    """How units are scored and go: in `rounds`, each after `minibatches` new minibatches.

    Attributes:
        momentum: weight of earlier rounds in a score.
    """

    rounds: int = 4
    minibatches: int = 3
    momentum: float = 0.5


def prune(
    model: nn.Module,
    kind: Kind,
    fraction: float,
    criterion: str,
    example: Tensor,
    windows: Iterator[Tensor],
    scoring: Scoring,
) -> tuple[tk.Pruner, float]:
    """Mask a fraction of a kind's units, in place, the weights staying what they are.

    Args:
        example: an input of the model.
        windows: minibatches to score on; none is drawn for a criterion that reads weights alone.

    Returns:
        The pruner, whose compact() removes what is masked, and the fraction of the kind's units
        that has gone.
    """
    of_blocks = kind.counted == "blocks"
    options = dict(kind.options)
    if of_blocks:  # stopped by their number, before the pruner has met a target of its own
        inside = sum(
            p.numel() for name, p in model.named_parameters()
            if p.dim() > 1 and name.startswith("layers.")
        )  # fmt: skip
        options["params"] = 1 - inside / count_parameters(model)
    else:
        options[kind.counted] = 1 - fraction
    pruner = tk.Pruner(
        model,
        example,
        criterion,
        every=scoring.minibatches,
        per_step=1 if of_blocks else fraction / scoring.rounds,
        momentum=scoring.momentum,
        **options,
    )
    reads_weights = get_statistic(pruner.criterion.statistic).reads == "weights"
    there = len(pruner.blocks)
    wanted = round(fraction * there) if of_blocks else there + 1

    def enough() -> bool:
        return pruner.done or there - len(pruner.blocks) >= wanted

    model.train()
    while not enough():
        if not reads_weights:
            model.zero_grad()
            byte_loss(model, next(windows)).backward()
        pruner.step()
    model.zero_grad()
    pruner.close()
    if of_blocks:
        return pruner, 1 - len(pruner.blocks) / there
    return pruner, 1 - pruner.cost.over(pruner.whole)[kind.counted]
