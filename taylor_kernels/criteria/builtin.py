"""The criteria that this package brings, with their formulas and where they come from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from taylor_kernels.criteria.criterion import Criterion
from taylor_kernels.ops.filter_moments import MOMENTS


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

BUILTIN = (
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
)  # fmt: skip
