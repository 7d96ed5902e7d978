"""Criteria: how a filter's raw statistics become its score. Arithmetic only, no kernel is called.

A criterion names its statistic (taylor_kernels/statistics) and a function from a table of that,
[filters, columns], to scores. Of coupled filters the pruner first makes one row, then a score:
Taylor statistics add up (the shared gate of Molchanov et al.), magnitudes are averaged, since a
channel does not matter more for being made by more layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        if self.coupled not in ("sum", "mean", "first"):
            raise ValueError(f"coupled: {self.coupled!r} is not one of sum, mean, first")
        if not isinstance(self.across_layers, bool):
            raise TypeError(
                f"across_layers: expected True or False, got {type(self.across_layers).__name__}"
            )
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


_CRITERIA: dict[str, Criterion] = {}


def register_criterion(criterion: Criterion) -> Criterion:
    """Make a criterion known by its name.

    Raises:
        TypeError: it is no `Criterion`.
        ValueError: the name is taken.

    Example:
        >>> import taylor_kernels as tk
        >>> criterion = tk.Criterion("weight_sum", "magnitudes", lambda table: table[:, 0])
        >>> tk.register_criterion(criterion) is criterion
        True
        >>> "weight_sum" in tk.criterion_names()
        True
    """
    if not isinstance(criterion, Criterion):
        raise TypeError(
            f"criterion: expected a tk.Criterion, got {type(criterion).__name__}; make one of a "
            "name, a statistic and a score function"
        )
    if criterion.name in _CRITERIA:
        raise ValueError(
            f"criterion: {criterion.name!r} is registered already; choose another name"
        )
    _CRITERIA[criterion.name] = criterion
    return criterion


def criterion_names() -> list[str]:
    """The names of all registered criteria.

    Example:
        >>> import taylor_kernels as tk
        >>> tk.criterion_names()[:3]
        ['taylor_fo', 'taylor_fo_joint', 'taylor_abs']
    """
    return list(_CRITERIA)


def get_criterion(criterion: str | Criterion) -> Criterion:
    """The criterion of that name; a `Criterion` is returned as it is.

    Raises:
        ValueError: no such name; the message holds the nearest right ones.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if not isinstance(criterion, str):
        raise TypeError(
            f"criterion: expected a name or a tk.Criterion, got {type(criterion).__name__}"
        )
    if criterion not in _CRITERIA:
        near = difflib.get_close_matches(criterion, _CRITERIA, n=3, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else f"there are {criterion_names()}"
        )
        raise ValueError(f"criterion: {criterion!r} is not known; {hint}")
    return _CRITERIA[criterion]


def _moment(name: str) -> Callable[[Tensor], Tensor]:
    column = MOMENTS.index(name)
    return lambda table: table[:, column]


def _share_of_sum(table: Tensor) -> Tensor:
    saliency = _moment("abs_gw")(table)
    return saliency / saliency.sum().clamp_min(torch.finfo(saliency.dtype).tiny)


def _curvature(table: Tensor) -> Tensor:
    """h of gates, [F]; of coupled ones that of their shared gate, since products come last."""
    slopes, signed = table[:, 1:].chunk(2, 1)
    return (slopes * signed).sum(1)


def _second_order(table: Tensor) -> Tensor:
    return (table[:, 0] - _curvature(table) / 2).square()


def _first(table: Tensor) -> Tensor:
    return table[:, 0]


_MOLCHANOV_2019 = "Molchanov et al. 2019, Importance estimation for neural network pruning"
_OBD = "LeCun et al. 1989, Optimal brain damage"

for _criterion in (
    Criterion(
        "taylor_fo", "moments", _moment("gw2"),
        formula="Σ (gw)² over its weights, per minibatch",
        reference=f"{_MOLCHANOV_2019}, eq. 8",
        moments=("gw2",),
    ),
    Criterion(
        "taylor_fo_joint", "moments", lambda table: _moment("gw")(table).square(),
        formula="(Σ gw)²",
        reference=f"{_MOLCHANOV_2019}, the joint form of eq. 8",
        moments=("gw",),
    ),
    Criterion(
        "taylor_abs", "moments", _moment("abs_gw"),
        formula="Σ abs(gw)",
        reference="Molchanov et al. 2017, Pruning convolutional neural networks for resource "
        "efficient inference, without the average over activations",
        moments=("abs_gw",),
    ),
    Criterion(
        "taylor_fo_bn", "gates", lambda table: table[:, 0].square(),
        formula="s², s = γ g_γ + β g_β: a gate after BatchNorm, per minibatch",
        reference=f"{_MOLCHANOV_2019}, section 3.2",
    ),
    Criterion(
        "taylor_fo_gate", "example_gates", Tensor.square,
        formula="mean over examples of s², s = Σ (y − b)·dy",
        reference=f"{_MOLCHANOV_2019}, section 3.2, per example",
    ),
    Criterion(
        "taylor_so", "weight_products", lambda table: table[:, 1],
        formula="Σ q² over its weights, q = g·w − ½·w·(HW)",
        reference=f"{_MOLCHANOV_2019}, the expansion to second order",
    ),
    Criterion(
        "taylor_so_bn", "gate_products", lambda table: table[:, 0].square(),
        formula="q², q = s − ½ H1 over all gates",
        reference=f"{_MOLCHANOV_2019}, the expansion to second order, on gates",
    ),
    Criterion(
        "taylor_so_diag", "gate_curvature", _second_order,
        formula="(s − ½h)², h the gate's curvature (Gauss-Newton), sampled",
        reference=f"{_MOLCHANOV_2019}, the expansion to second order, one gate at a time",
    ),
    Criterion(
        "taylor_so_diag_exact", "gate_curvature_exact", _second_order,
        formula="(s − ½h)², h exact: a backward pass per output",
        reference=f"{_MOLCHANOV_2019}, the expansion to second order, one gate at a time",
    ),
    Criterion(
        "obd_bn", "gate_curvature", lambda table: _curvature(table) / 2,
        formula="½h, h the gate's curvature (Gauss-Newton), sampled",
        reference=f"{_OBD}, on gates",
    ),
    Criterion(
        "obd_bn_exact", "gate_curvature_exact", lambda table: _curvature(table) / 2,
        formula="½h, h exact: a backward pass per output",
        reference=f"{_OBD}, on gates",
    ),
    Criterion(
        "obd_fisher", "fisher", lambda table: table[:, 0] / 2,
        formula="½ Σ w² · mean over examples of g²",
        reference=f"{_OBD}, with the empirical Fisher matrix",
    ),
    Criterion(
        "obd_fisher_mc", "fisher_probe", lambda table: table[:, 0] / 2,
        formula="½ Σ w² · E g², of the model's own Fisher matrix, from one random probe",
        reference=f"{_OBD}, with the matrix of Schraudolph 2002, Fast curvature matrix-vector "
        "products",
    ),
    Criterion(
        "obd_hutchinson", "hutchinson", lambda table: table[:, 0] / 2,
        formula="½ Σ w² diag H, by random probes",
        reference=f"{_OBD}, with the estimator of Hutchinson 1990",
    ),
    Criterion(
        "magnitude_l1", "magnitudes", _first, "mean", False,
        formula="Σ abs(w)",
        reference="Li et al. 2017, Pruning filters for efficient ConvNets",
    ),
    Criterion(
        "magnitude_l2", "magnitudes", lambda table: table[:, 1], "mean", False,
        formula="Σ w²",
        reference="Li et al. 2017, Pruning filters for efficient ConvNets",
    ),
    Criterion(
        "bn_scale", "bn_scale", _first, "mean",
        formula="abs(γ) of the BatchNorm behind it",
        reference="Liu et al. 2017, Learning efficient convolutional networks through network "
        "slimming",
    ),
    Criterion(
        "snip", "moments", _share_of_sum,
        formula="Σ abs(gw), over its sum in the whole network",
        reference="Lee et al. 2019, SNIP: single-shot network pruning",
        moments=("abs_gw",),
    ),
    Criterion(
        "random", "random", _first, "first",
        formula="a fixed uniform draw",
        reference="the control",
    ),
    Criterion(
        "oracle", "loss_change", lambda table: table[:, 0].square(),
        formula="(L(W) − L(W with the filter removed))²",
        reference=f"{_MOLCHANOV_2019}, eq. 3",
    ),
):  # fmt: skip
    register_criterion(_criterion)
