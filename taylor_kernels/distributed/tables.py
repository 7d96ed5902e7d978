"""What ranks exchange where the tables of the parts of a minibatch add up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_kernels.distributed.ranks import Ranks
from taylor_kernels.distributed.round import Round, Ticks, shares_gradients
from taylor_kernels.shards import is_sharded, part_count, plan_mesh
from taylor_kernels.statistics import Statistic, held_weight


class TableRound(Round):
    """Tables that add up over the parts of a minibatch: T minibatches of K columns a filter.

    The parts of each minibatch are added in the order of ranks, and what is scored is their sum.
    """

    def _rows(self, tables: Sequence[Tensor]) -> Tensor:
        by_name = dict(zip(self._sizes, tables, strict=True))
        device = tables[0].device
        parts = [self._kind.shared(by_name[name]).to(device) for name in self._order]
        for name, part in zip(self._order, parts, strict=True):
            if part.size(1) != self._kind.shared_columns:
                raise ValueError(
                    f"statistic {self._kind.name!r}: {part.size(1)} columns of layer {name!r} are "
                    f"to be shared among the ranks, and its shared_columns is "
                    f"{self._kind.shared_columns}; set the class attribute"
                )
        return torch.cat([part.flatten() for part in parts]).float()

    def _columns(self, everyone: Ticks) -> Tensor:
        length = sum(self._sizes.values()) * self._kind.shared_columns
        rows = [tick.rows for tick in self._ticks]
        nothing = torch.zeros(length)
        return torch.stack([nothing if row is None else row.cpu() for row in rows])

    def exchange(self, device: torch.device) -> list[list[Tensor]]:
        """The tables of every minibatch that counts, each in the order of layers; a collective."""
        if not self._ticks:
            return []
        everyone, columns = self._exchange(guess=False)
        columns = columns.view(*everyone.state.shape, -1)
        if self._in_parts:
            factor = everyone.present
            if (factor.sum(0) < self._ranks.size).logical_and(everyone.counts).any():
                raise RuntimeError(
                    "absent: each rank holds a part of the weights, and of their gradients, so "
                    "that none can be absent; call update() or step() on all"
                )
        elif shares_gradients(self._kind, self._ranks):
            factor = everyone.shares(everyone.present)
        elif self._kind.across_ranks == "mean":
            factor = everyone.shares(everyone.examples)
        elif self._ranks.loss == "mean":
            factor = everyone.shares(everyone.weight)
        else:
            factor = everyone.present
        found = []
        for minibatch in everyone.counts.nonzero().flatten().tolist():
            total = torch.zeros(columns.size(2), dtype=torch.float64)
            for rank in range(self._ranks.size):
                if everyone.present[rank, minibatch]:
                    total += factor[rank, minibatch] * columns[rank, minibatch]
            found.append(self._tables(total.float().to(device)))
        return found

    def _tables(self, columns: Tensor) -> list[Tensor]:
        width = self._kind.shared_columns
        parts = columns.split([self._sizes[name] * width for name in self._order])
        by_name = {
            name: self._kind.unshared(part.view(-1, width))
            for name, part in zip(self._order, parts, strict=True)
        }
        return [by_name[name] for name in self._sizes]


def exchanges_tables(statistic: Statistic, ranks: Ranks) -> bool:
    """Whether the ranks exchange tables, which they score then, or scores."""
    if statistic.spread is not None:
        return True
    return ranks.minibatch == "global" and statistic.across_ranks in ("sum", "mean")


def check_parts(statistic: Statistic, ranks: Ranks | None) -> None:
    """Weights of which a rank holds a part can be scored.

    Raises:
        ValueError: the ranks are missing, or others than those that hold the parts; or the
            criterion runs the model itself.
    """
    held = [held_weight(layer) for layer in statistic.layers.values()]
    runs = statistic.reads in ("activations", "closure")  # what the whole model does
    if not any(map(is_sharded, statistic.model.parameters() if runs else held)):
        return
    if statistic.reads == "closure":
        raise ValueError(
            "criterion: it differentiates by weights, or runs the model, itself, which it cannot "
            "where a rank holds a part of them; use one that reads what backward() leaves"
        )
    if statistic.reads == "activations":
        mesh = plan_mesh(statistic.model)
        if mesh is not None and not statistic.at_gates:
            raise ValueError(
                "criterion: it puts weight gradients together from inputs and outputs of layers, "
                "which a tensor parallel plan has spread over the ranks; use taylor_fo, or "
                "taylor_fo_gate"
            )
    if ranks is None:
        raise ValueError(
            "ranks: each rank holds a part of the weights (FSDP2 or tensor parallelism); pass "
            "ranks=tk.distributed.Ranks()"
        )
    if ranks.gradients == "local" or any(ranks.size % part_count(one) for one in held):
        raise ValueError(
            "ranks: the weights are spread over ranks, so that gradients are those of all, and "
            f"these {ranks.size} ranks have to hold all parts; pass the group of all of them"
        )


def check_ranks_stream(statistic: Statistic, ranks: Ranks | None) -> None:
    """The ranks take gradients for what they are as they are streamed.

    Raises:
        ValueError: they do not.
    """
    if ranks is not None and statistic.spread is None and ranks.gradients != "local":
        raise ValueError(
            "ranks: gradients that are streamed are scored before anything averages them over the "
            "ranks; pass Ranks(gradients='local'), and run the passes inside no_sync() of "
            "DistributedDataParallel, or without it"
        )
