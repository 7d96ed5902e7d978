"""Scores of residual blocks: one gate for each, or the sum of what its filters score.

The gate of a block is a factor of 1 on what its branch adds. Its gradient for example n is
s_n = Σ y·dy over the branch's output y: one number per example, from one read of y and dy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.checks import check_flag
from taylor_kernels.criteria import Criterion
from taylor_kernels.hooks import Hook, remove_all
from taylor_kernels.ops.gate_gradients import gate_gradients
from taylor_kernels.pruning.blocks import branch_output
from taylor_kernels.pruning.choosing.flops import Meter
from taylor_kernels.pruning.scores.unit_scores import not_finite
from taylor_kernels.shards import plan_mesh
from taylor_kernels.statistics import get_statistic
from taylor_kernels.statistics.counting import Counting
from taylor_kernels.statistics.hooks.captures import Captures
from taylor_kernels.tracing import Block
from taylor_kernels.tracing.notes.values import Path

#: Statistics of a gate's first-order gradient, which a block's gate has too.
_OF_GATES = ("gates", "example_gates")


def check_blocks(blocks: object, criterion: Criterion) -> None:
    """The argument `blocks` fits the others.

    Raises:
        TypeError: it is no bool.
        ValueError: the criterion says nothing of a whole block.
    """
    check_flag("blocks", blocks)
    if not blocks:
        return
    kind = get_statistic(criterion.statistic)
    if kind.at_gates and kind.name not in _OF_GATES:
        raise ValueError(
            f"blocks: {criterion.name!r} reads gates of channels, and none of a whole block; use "
            "taylor_fo_bn or taylor_fo_gate, or a criterion of the weights, whose scores of a "
            "block's filters add up"
        )


class BlockScores:
    """Running scores of all blocks, as `UnitScores` are of units.

    Of taylor_fo_bn and taylor_fo_gate they are those of the block's gate. Of other criteria they
    are the sum over the block's filters (the first one's, where coupled filters have the first
    one's), relative to the mean over all blocks where layers cannot be compared.

    Args:
        blocks: all there were at first.
        backend: of the kernels.

    Attributes:
        left: the numbers of those that are scored.
        at_gates: the scores are those of the blocks' gates, and not of their filters.
    """

    def __init__(
        self, criterion: Criterion, blocks: Sequence[Block], backend: str | None = None
    ) -> None:
        self._criterion, self._blocks, self._backend = criterion, list(blocks), backend
        self.left: list[int] = []
        kind = get_statistic(criterion.statistic)
        self.at_gates, self._per_example = kind.name in _OF_GATES, kind.per_example
        self._gates: _BranchGates | None = None
        # [B] float64: nan where a block has no score, inf where one of its scores is not finite.
        self._sum: Tensor | None = None
        self._average: Tensor | None = None
        self.count = 0

    def watch(self, model: nn.Module, left: Sequence[int]) -> None:
        """Score these blocks of the model from now on."""
        self.close()
        self.left = list(left)
        if self.at_gates:
            chosen = {number: self._blocks[number] for number in left}
            self._gates = _BranchGates(model, chosen, self._backend)

    def check_parts(self, model: nn.Module) -> None:
        """The activations that gates of blocks are read off are whole on this rank.

        Raises:
            ValueError: a tensor parallel plan has spread them.
        """
        if self.at_gates and plan_mesh(model) is not None:
            raise ValueError(
                f"blocks: {self._criterion.name!r} reads gates of whole blocks, which it cannot "
                "where a tensor parallel plan has spread activations over the ranks; use taylor_fo "
                "or leave blocks= out"
            )

    def close(self) -> None:
        """Take the hooks off the model."""
        if self._gates is not None:
            self._gates.close()
            self._gates = None

    def discard(self) -> None:
        """Forget what was seen since the last minibatch was added."""
        if self._gates is not None:
            self._gates.discard()

    def __len__(self) -> int:
        """How many blocks there were at first."""
        return len(self._blocks)

    def name_of(self, number: int) -> str:
        return self._blocks[number].name

    def collect(
        self, loss_scale: float, masks: Sequence[Tensor] | None = None
    ) -> dict[int, Tensor]:
        """Block -> [1, K], the gradients of its gate since the last call, a table as a layer's is:
        of every example, or their sum. A block that no gradient has reached has none, and none has
        one where the scores are not `at_gates`.

        Args:
            loss_scale: what the loss was multiplied by before backward().
            masks: one for each pass, of the examples that count; None where all do.

        Raises:
            ValueError: the masks do not fit.
        """
        if self._gates is None:
            return {}
        found = {}
        for number, gates in self._gates.collect(masks if self._per_example else None).items():
            table = gates / loss_scale
            found[number] = table[None] if self._per_example else table.sum()[None, None]
        return found

    def of(self, tables: Mapping[str, Tensor], gates: Mapping[int, Tensor]) -> Tensor:
        """[B] float64: those of a minibatch; nan where a block has no score, inf where its score is
        not finite.

        Args:
            tables: layer -> [F, K], of the criterion's statistic.
            gates: what `collect` gave.
        """
        scores: dict[int, Tensor] = {}
        if self.at_gates:
            for number, table in gates.items():
                scores[number] = self._criterion.minibatch_scores(table)[0]
        else:
            of_layers = self._of_filters(tables)
            for number in self.left:
                held = [s for name, s in of_layers.items() if self._blocks[number].holds(name)]
                if held:
                    first = self._criterion.coupled == "first"
                    scores[number] = held[0][0] if first else torch.cat(held).double().sum()
        device = next(iter(tables.values())).device
        found = torch.full((len(self),), torch.nan, dtype=torch.float64, device=device)
        if scores:
            values = torch.stack([s.to(device, torch.float64) for s in scores.values()])
            found[torch.tensor(list(scores))] = values.where(values.isfinite(), torch.inf)
        return found

    def take(self, scores: Tensor, count: int) -> None:
        """Add the sum of the scores, [B], of `count` minibatches."""
        if self._sum is not None:
            past = self._sum.to(scores)
            # inf + nan is nan, but a block that one minibatch has not reached may be broken.
            broken = past.isinf() | scores.isinf()
            scores = (past + scores).masked_fill(broken, torch.inf)
        self._sum = scores
        self.count += count

    def drop(self) -> None:
        """Forget the minibatches since the last pruning."""
        self._sum, self.count = None, 0

    def _of_filters(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer -> [F]: what each filter scores by itself. Scores may look at all rows at once."""
        found: dict[str, Tensor] = {}
        for width in sorted({table.size(1) for table in tables.values()}):
            same = {name: table for name, table in tables.items() if table.size(1) == width}
            rows = torch.cat(list(same.values()))
            scores = self._criterion.minibatch_scores(rows)
            found |= zip(same, scores.split([len(t) for t in same.values()]), strict=True)
        return {name: found[name] for name in tables}

    def check_finite(self) -> None:
        """No block that is left has a score that is not finite; none at all is fine.

        Raises:
            RuntimeError: one has; the message names them.
        """
        assert self._sum is not None
        broken = self._sum.isinf().tolist()
        names = [self.name_of(number) for number in self.left if broken[number]]
        if names:
            raise not_finite(
                f"blocks {', '.join(names)}", f"{len(names)} of {len(self.left)} blocks"
            )

    def worth(self, momentum: float, meter: Meter) -> list[float]:
        """What the blocks that are left are ranked by, averaged as `UnitScores.close_period` does;
        inf for one without a score. A block is a bundle of filters: it is worth its score over
        their number, where that is not relative to other blocks."""
        scores = self._close_period(momentum)
        if not self._criterion.across_layers or self._criterion.coupled == "first":
            return scores
        filters = [max(meter.filters_of(self._blocks[number]), 1) for number in self.left]
        return [score / count for score, count in zip(scores, filters, strict=True)]

    def _close_period(self, momentum: float) -> list[float]:
        assert self._sum is not None
        mean = self._sum.cpu() / self.count
        self._sum, self.count = None, 0
        if self._average is not None:
            mixed = momentum * self._average + (1 - momentum) * mean
            mean = torch.where(self._average.isnan(), mean, mixed)
        self._average = mean
        scores = mean[self.left]
        if not self._criterion.across_layers and (scores.nan_to_num() > 0).any():
            scores = scores / scores[~scores.isnan()].mean()
        return scores.nan_to_num(nan=torch.inf).tolist()

    def averages(self) -> dict[str, float]:
        """Block that is left -> its score as of the last pruning."""
        if self._average is None:
            return {}
        return {self._blocks[n].name: self._average[n].item() for n in self.left}

    def state_dict(self) -> dict[str, Any]:
        total = None if self._sum is None else self._sum.cpu().clone()
        average = None if self._average is None else self._average.clone()
        return {"sum": total, "average": average, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum, self._average = state["sum"], state["average"]
        self.count = state["count"]


class _BranchGates:
    """Hooks on the outputs of branches, that keep s_n of every example (dimension 0)."""

    def __init__(self, model: nn.Module, blocks: Mapping[int, Block], backend: str | None) -> None:
        self._backend = backend
        self._captures = Captures()
        self._names = {number: block.output.module for number, block in blocks.items()}
        self._received: dict[int, list[tuple[int, Tensor]]] = {}  # with the number of the pass
        self._pass = 0
        self._handles = [model.register_forward_pre_hook(Hook(self._on_model))]
        for number, block in blocks.items():
            module = model.get_submodule(block.output.module)
            hook = Hook(self._on_output, number, block.output.module, block.output.returned)
            self._handles.append(module.register_forward_hook(hook))

    def _on_model(self, *_: object) -> None:
        self._pass += 1
        self._captures.forget()

    def _on_output(
        self, number: int, name: str, path: Path, module: nn.Module, args: object, output: Any
    ) -> None:
        tensor = branch_output(output, path)
        if not torch.is_grad_enabled() or not tensor.requires_grad:
            return

        pass_ = self._pass

        def receive(y: Tensor, dy: Tensor) -> None:
            y, dy = (part.unsqueeze(1) if part.dim() == 1 else part for part in (y, dy))
            gates = gate_gradients(y, dy, backend=self._backend)  # any dimension serves: all add up
            self._received.setdefault(number, []).append((pass_, gates.sum(1)))

        self._captures.add(name, number, tensor, receive, self.discard)

    def collect(self, masks: Sequence[Tensor] | None) -> dict[int, Tensor]:
        """Block -> [N] since the last call, of the examples that count."""
        received = self._received
        self.discard()
        if masks is None or not received:
            return {block: torch.cat([s for _, s in parts]) for block, parts in received.items()}
        counting = Counting(masks, (number for parts in received.values() for number, _ in parts))
        return {
            block: torch.cat(
                [s[counting.of(self._names[block], n, len(s)).to(s.device)] for n, s in parts]
            )
            for block, parts in received.items()
        }

    def discard(self) -> None:
        self._received = {}

    def close(self) -> None:
        remove_all(self._handles)
        self.discard()
