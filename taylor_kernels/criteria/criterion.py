"""A criterion: a rule that makes scores of the table of a statistic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_kernels.checks import check_choice, check_flag
from taylor_kernels.ops.filter_moments import MOMENTS, check_moments
from taylor_kernels.statistics import Reads, get_statistic

_NEEDS: dict[Reads, str] = {
    "weights": "nothing but the weights",
    "forward": "a forward pass",
    "activations": "a forward and a backward pass, which `scoring` makes cheaper",
    "weight gradients": "a forward and a backward pass",
    "closure": "a closure, with which it runs the model itself",
}


@dataclass(frozen=True)
class Criterion:
    """A rule for scoring filters.

    Attributes:
        name: what `tk.Importance(model, name)` and `tk.Pruner(criterion=name)` look up.
        statistic: the name of what it is computed from, one of `tk.statistic_names()`.
        score: from a [F, K] table of the statistic to [F] scores; of a statistic per example also
            to [F, K], a score for each. Greater means more important.
        coupled: how the rows of coupled filters become one: "sum", "mean", or "first", which
            takes the row of the first.
        across_layers: whether scores of different layers can be ranked against each other. The
            Taylor scores all estimate a change of the same loss; norms depend on a layer's size
            and initialisation, so the pruner divides them by their mean in the group.
        formula: the score of a filter, for people to read.
        reference: who proposed it, and where.
        moments: of the statistic "moments", the columns that `score` reads, names of
            `tk.MOMENTS`; None for all. The others are not computed where that saves time, and are
            NaN.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> gradient_norm = tk.Criterion(
        ...     "gradient_norm",
        ...     "moments",
        ...     lambda table: table[:, 4],
        ...     formula="Σ g²",
        ...     moments=("g2",),
        ... )
        >>> gradient_norm.needs
        'a forward and a backward pass'
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> imp = tk.Importance(model, gradient_norm)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> imp.update()
        >>> imp.compute()
        {'': tensor([3., 3.])}
    """

    name: str
    statistic: str
    score: Callable[[Tensor], Tensor]
    coupled: str = "sum"
    across_layers: bool = True
    formula: str = ""
    reference: str = ""
    moments: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for field in ("name", "statistic", "formula", "reference"):
            value = getattr(self, field)
            if not isinstance(value, str):
                raise TypeError(f"{field}: expected a string, got {type(value).__name__}")
        if not self.name:
            raise ValueError("name: is empty; give the criterion one to be looked up by")
        get_statistic(self.statistic)
        if self.moments is not None:
            object.__setattr__(self, "moments", check_moments(self.moments))
            if self.statistic != "moments":
                raise ValueError(
                    f"moments: are columns of the statistic 'moments', and this criterion's is "
                    f"{self.statistic!r}; leave them out"
                )
        if not callable(self.score):
            raise TypeError(f"score: expected a function, got {type(self.score).__name__}")
        check_choice("coupled", self.coupled, ("sum", "mean", "first"))
        check_flag("across_layers", self.across_layers)
        if self.moments is not None:
            self._check_moments(self.moments)

    def _check_moments(self, named: Sequence[str]) -> None:
        """The score reads no other moments than these: whatever is in the other columns of a table
        changes nothing. Of their NaN a comparison, or nansum, would make a finite score."""
        table = torch.rand(8, len(MOMENTS), generator=torch.Generator().manual_seed(0)) + 0.5
        read = []
        try:
            wanted = self.score(table.clone())
            if not torch.equal(self.score(table.clone()), wanted):
                return  # it draws
            for column, name in enumerate(MOMENTS):
                other = table.clone()
                other[:, column] = torch.nan
                if not torch.equal(self.score(other), wanted):
                    read.append(name)
        except Exception:
            return  # it takes other tables than this; what is wrong with it is said in use
        if unnamed := [name for name in read if name not in named]:
            raise ValueError(
                f"moments: {self.name!r} names {', '.join(named)}, and its score reads "
                f"{', '.join(unnamed)} too; name every moment that it reads"
            )

    @property
    def needs(self) -> str:
        """What there must be before a score: passes of the model, or a closure."""
        return _NEEDS[get_statistic(self.statistic).reads]

    def observations(self, table: Tensor) -> Tensor:
        """[F, n] scores of n observations: of each example, or of the table as a whole (n = 1).

        Raises:
            ValueError: `score` did not give one number per filter, or per filter and example.
        """
        scores = self.score(table)
        if not isinstance(scores, Tensor):
            raise ValueError(
                f"criterion {self.name!r}: its score function gave {type(scores).__name__}; "
                "expected a tensor, one number per filter"
            )
        per_example = get_statistic(self.statistic).per_example and scores.shape == table.shape
        if not per_example and scores.shape != table.shape[:1]:
            raise ValueError(
                f"criterion {self.name!r}: its score function gave shape {tuple(scores.shape)} for "
                f"a table of shape {tuple(table.shape)}; expected one number per filter"
            )
        return scores if per_example else scores[:, None]

    def minibatch_scores(self, table: Tensor) -> Tensor:
        """[F] the mean of its observations; 0 of a minibatch without an example."""
        scores = self.observations(table)
        return scores.mean(1) if scores.size(1) else scores.sum(1)
