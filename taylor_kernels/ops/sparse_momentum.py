"""sparse_momentum: a step of momentum SGD in which the gradient reaches some weights only.

    z ← β z + η w + B∘g        w ← w − α z

B is 1 where a table of `global_threshold` names the weight and 0 elsewhere, where weights decay:
the step of Global Sparse Momentum SGD (Ding et al., NeurIPS 2019, eq. 8 and 9).
Kernels: csrc/common/sparse_momentum.h, backends/triton/sparse_momentum.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_kernels.backends import check_name, kernel
from taylor_kernels.layout import MomentumItem, SparseMomentumArgs, in_memory_order
from taylor_kernels.ops._in_place import Changed, check_lists, define_in_place
from taylor_kernels.ops.global_threshold import widest


def sparse_momentum(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    table: Tensor,
    *,
    lr: Sequence[float],
    momentum: Sequence[float],
    weight_decay: Sequence[float],
    ranked: Sequence[bool] | None = None,
    row_scores: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> None:
    """Change weights and momenta in place, in one launch for the list.

    Nothing is changed if the table says that a score was not finite.

    Args:
        weights: float32, float16, bfloat16 or float64, of any shapes, on one device; any strides
            (contiguous and channels_last are changed in place, others through a copy).
        grads, momenta: each with its weight's shape, dtype and device.
        table: [3] int64, of `global_threshold(weights, count, factors=grads, ranked=ranked)`.
        lr, momentum, weight_decay: one number for each weight.
        ranked: of each weight, whether the table speaks of it; gradients reach all of the others.
        row_scores: in place of |g·w|, float32 [weight.size(0)] for each ranked weight: then the
            table is that of these tensors, and a row is reached or is not.
        backend: one of `taylor_kernels.available_backends()`; None picks by device.

    Raises:
        TypeError, ValueError: what is no such tensor, or does not match.
        RuntimeError: the named backend cannot run here.
    """
    check_name(backend)
    count = len(weights)
    ranked = [True] * count if ranked is None else list(ranked)
    rows = [None] * count if row_scores is None else list(row_scores)
    _op(
        list(weights), list(grads), list(momenta), table, rows, ranked,
        list(lr), list(momentum), list(weight_decay), backend,
    )  # fmt: skip


def _run(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    table: Tensor,
    row_scores: Sequence[Tensor | None],
    ranked: Sequence[bool],
    lr: Sequence[float],
    momentum: Sequence[float],
    weight_decay: Sequence[float],
    backend: str | None,
) -> list[Tensor]:
    check_lists(weights=weights, grads=grads, momenta=momenta)
    device = weights[0].device
    for name, each in {
        "row_scores": row_scores,
        "ranked": ranked,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
    }.items():
        if len(each) != len(weights):
            raise ValueError(f"{name}: {len(each)} values for {len(weights)} weights")
    if table.shape != (3,) or table.dtype is not torch.int64 or table.device != device:
        raise ValueError("table: expected what global_threshold returns for these weights")
    run = kernel("sparse_momentum", device, widest(weights), backend)
    changed, items, first = Changed(), [], 0
    for i, (w, g, z, rows, is_ranked) in enumerate(
        zip(weights, grads, momenta, row_scores, ranked, strict=True)
    ):
        if not w.numel():
            continue
        if rows is not None and (
            rows.shape != w.shape[:1] or rows.dtype is not torch.float32 or rows.device != device
        ):
            raise ValueError(
                f"row_scores[{i}]: expected float32 [{w.size(0)}] on {device}, got {rows.dtype} "
                f"{list(rows.shape)} on {rows.device}"
            )
        item = MomentumItem(
            changed.add(w, w),
            in_memory_order(w, g).contiguous(),
            changed.add(w, z),
            None if rows is None else rows.contiguous(),
            w.numel(),
            w.numel() // w.size(0) if w.dim() else 1,
            first,
            w.dtype,
            is_ranked,
            lr[i],
            weight_decay[i],
            momentum[i],
        )
        items.append(item)
        if is_ranked:
            first += item.elements if rows is None else len(rows)
    if items:
        run(SparseMomentumArgs(table, items))
    return changed.write_back()


_op = define_in_place(
    "sparse_momentum(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor table, "
    "Tensor?[] row_scores, bool[] ranked, float[] lr, float[] momentum, float[] weight_decay, "
    "str? backend)",
    _run,
)
