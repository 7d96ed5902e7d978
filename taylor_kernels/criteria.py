"""Criteria: how a filter's raw statistics become its score. Arithmetic only, no kernel is called.

A criterion names the source of its statistics (taylor_kernels/statistics) and a function from a
table of them, [filters, columns], to scores: [filters], or [filters, examples] from example_gates.
Of coupled filters the pruner first makes one row, then a score: Taylor statistics add up (the
shared gate of Molchanov et al.), magnitudes are averaged, since a channel does not matter more for
being made by more layers.

| name | score of a filter | from |
|---|---|---|
| taylor_fo | Σ (gw)² over its weights, per minibatch | Molchanov et al. 2019, eq. 8 |
| taylor_fo_joint | (Σ gw)² | ibid., the joint form |
| taylor_abs | Σ abs(gw) | Molchanov et al. 2017 without the activation average |
| taylor_fo_bn | s², s = γ g_γ + β g_β: a gate after BatchNorm, per minibatch | 2019, section 3.2 |
| taylor_fo_gate | mean over examples of s², s = Σ (y − b)·dy | the same gate, per example |
| taylor_so | Σ q² over its weights, q = g·w − ½·w·(HW) | 2019, the expansion to second order |
| taylor_so_bn | q², q = s − ½ H1 over all gates | the same, on gates |
| taylor_so_diag | (s − ½h)², h the gate's curvature (Gauss-Newton) | the same, one gate at a time |
| obd_bn | ½h | LeCun et al. 1989, optimal brain damage, on gates |
| obd_fisher | ½ Σ w² · mean over examples of g² | OBD with the empirical Fisher matrix |
| obd_fisher_mc | the same of the model's own Fisher, from one random probe | Schraudolph 2002 |
| obd_hutchinson | ½ Σ w² diag H, by random probes | OBD with the estimator of Hutchinson 1990 |
| magnitude_l1, magnitude_l2 | Σ abs(w), Σ w² | Li et al. 2017 |
| bn_scale | abs(γ) | Liu et al. 2017, network slimming |
| snip | Σ abs(gw), over its sum in the whole network | Lee et al. 2019 |
| random | a fixed uniform draw | the control |
| oracle | (L(W) − L(W with the filter removed))² | Molchanov et al. 2019, eq. 3 |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_kernels.ops.filter_moments import MOMENTS

#: What a criterion can be computed from; taylor_kernels/statistics says what each table holds.
SOURCES = (
    "moments",
    "gates",
    "example_gates",
    "gate_curvature",
    "gate_products",
    "weight_products",
    "hutchinson",
    "fisher",
    "fisher_probe",
    "magnitudes",
    "bn_scale",
    "random",
    "loss_change",
)


@dataclass(frozen=True)
class Criterion:
    """A rule for scoring filters.

    Attributes:
        name: what `tk.Importance(model, name)` and `tk.Pruner(importance=name)` look up.
        source: one of `SOURCES`.
        score: from a [F, K] table of the source's statistics to [F] scores; from example_gates
            to [F, K], a score per example. Greater means more important.
        coupled: how the rows of coupled filters become one: "sum", "mean", or "first", which
            takes the row of the first.
        across_layers: whether scores of different layers can be ranked against each other. The
            Taylor scores all estimate a change of the same loss; norms depend on a layer's size
            and initialisation, so the pruner divides them by their mean in the group.
    """

    name: str
    source: str
    score: Callable[[Tensor], Tensor]
    coupled: str = "sum"
    across_layers: bool = True

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source: {self.source!r} is not one of {', '.join(SOURCES)}")
        if not callable(self.score):
            raise TypeError(f"score: expected a function, got {type(self.score).__name__}")
        if self.coupled not in ("sum", "mean", "first"):
            raise ValueError(f"coupled: {self.coupled!r} is not one of sum, mean, first")

    def observations(self, table: Tensor) -> Tensor:
        """[F, n] scores of n observations: of each example, or of the table as a whole (n = 1).

        Raises:
            ValueError: `score` did not give one number per filter, or per filter and example.
        """
        scores = self.score(table)
        per_example = self.source == "example_gates" and scores.shape == table.shape
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
        ValueError: the name is taken.
    """
    if criterion.name in _CRITERIA:
        raise ValueError(
            f"criterion: {criterion.name!r} is registered already; choose another name"
        )
    _CRITERIA[criterion.name] = criterion
    return criterion


def criterion_names() -> list[str]:
    """The names of all registered criteria."""
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
    """h of gates, [F]; of coupled ones that of their shared gate, since its square comes last."""
    return table[:, 1:].square().sum(1)


for _criterion in (
    Criterion("taylor_fo", "moments", _moment("gw2")),
    Criterion("taylor_fo_joint", "moments", lambda table: _moment("gw")(table).square()),
    Criterion("taylor_abs", "moments", _moment("abs_gw")),
    Criterion("taylor_fo_bn", "gates", lambda table: table[:, 0].square()),
    Criterion("taylor_fo_gate", "example_gates", Tensor.square),
    Criterion("taylor_so", "weight_products", lambda table: table[:, 1]),
    Criterion("taylor_so_bn", "gate_products", lambda table: table[:, 0].square()),
    Criterion("taylor_so_diag", "gate_curvature", lambda t: (t[:, 0] - _curvature(t) / 2).square()),
    Criterion("obd_bn", "gate_curvature", lambda table: _curvature(table) / 2),
    Criterion("obd_fisher", "fisher", lambda table: table[:, 0] / 2),
    Criterion("obd_fisher_mc", "fisher_probe", lambda table: table[:, 0] / 2),
    Criterion("obd_hutchinson", "hutchinson", lambda table: table[:, 0] / 2),
    Criterion("magnitude_l1", "magnitudes", lambda table: table[:, 0], "mean", False),
    Criterion("magnitude_l2", "magnitudes", lambda table: table[:, 1], "mean", False),
    Criterion("bn_scale", "bn_scale", lambda table: table[:, 0], "mean"),
    Criterion("snip", "moments", _share_of_sum),
    Criterion("random", "random", lambda table: table[:, 0], "first"),
    Criterion("oracle", "loss_change", lambda table: table[:, 0].square()),
):
    register_criterion(_criterion)
