"""What the pruner says it did."""

from __future__ import annotations

from dataclasses import dataclass

from taylor_kernels.pruning.choosing.flops import Cost


@dataclass(frozen=True)
class PruneRecord:
    """One pruning step.

    Attributes:
        step: minibatches seen when it happened, from 1.
        removed: layer -> the filters that went, numbered as in the original layer.
        filters, params, flops: what is left. Filters are output filters of the layers that can be
            pruned; FLOPs are for the example inputs, a multiply-add being two.
        filters_fraction, params_fraction, flops_fraction: the same as fractions of the original.
        threshold: the greatest score among the units that went.
        done: all targets are met.
        blocks: the residual blocks that went; their filters are not in `removed`.
    """

    step: int
    removed: dict[str, tuple[int, ...]]
    filters: int
    params: int
    flops: int
    filters_fraction: float
    params_fraction: float
    flops_fraction: float
    threshold: float
    done: bool
    blocks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        cost: Cost,
        whole: Cost,
        *,
        step: int,
        removed: dict[str, tuple[int, ...]],
        threshold: float,
        done: bool,
        blocks: tuple[str, ...] = (),
    ) -> PruneRecord:
        """The record of a pruning that left `cost` of a model that cost `whole`."""
        left = cost.over(whole)
        return cls(
            step=step,
            removed=removed,
            filters=cost.filters,
            params=cost.params,
            flops=cost.flops,
            filters_fraction=left["filters"],
            params_fraction=left["params"],
            flops_fraction=left["flops"],
            threshold=threshold,
            done=done,
            blocks=blocks,
        )
