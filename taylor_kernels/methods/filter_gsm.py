"""GSM for filters, a form of ours: what the paper does to weights, done to all that makes a filter.

A filter is a unit of `tk.trace`: its weights, bias and norm, and those of the filters that skip
connections tie to it. Its score is |Σ g·w| over all of these, the change of the loss, to first
order, when it is scaled; those of the Q greatest get their gradient, all others decay and go.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.methods.gsm import GSM
from taylor_kernels.ops.filter_moments import needed_moments
from taylor_kernels.ops.global_threshold import global_threshold, greatest_masks
from taylor_kernels.ops.sparse_momentum import sparse_momentum
from taylor_kernels.pruning.removing.removal import remove
from taylor_kernels.tracing import trace


class FilterGSM(GSM):
    """Global Sparse Momentum SGD over filters rather than weights: not the paper's, but ours.

    Exactly Q = ⌊filters / compression⌋ filters get their gradient in a step. The norm and the bias
    of a filter are passive with it, and decay: BatchNorm would undo the decay of the weights before
    it. Filters of outputs, and others that `tk.trace` says must stay, take plain steps.

    Args:
        model: all of its parameters are trained.
        example_inputs: what the model is called with, as `tk.trace` takes it.
        lr, momentum, weight_decay, compression, backend: those of `GSM`; compression is of filters.

    Raises:
        ValueError: a number out of its range, a model none of whose filters can go, or with
            transposed convolutions.
        FloatingPointError: by `step`, scores that are not finite; the message names the layer, and
            nothing is changed.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> layers = torch.nn.Linear(8, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3)
        >>> model, x = torch.nn.Sequential(*layers), torch.randn(32, 8)
        >>> optimizer = tk.methods.FilterGSM(model, x, lr=0.1, compression=4)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(x).square().mean().backward()
        ...     _ = optimizer.step()
        >>> optimizer.compact()[0]
        Linear(in_features=8, out_features=10, bias=True)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        lr: float = 1e-2,
        momentum: float = 0.99,
        weight_decay: float = 5e-4,
        compression: float = 4.0,
        *,
        backend: str | None = None,
    ) -> None:
        self._model, self._channels = model, trace(model, example_inputs).gone_at_zero()
        sizes = [group.size for group in self._channels.groups]
        if not sizes:
            raise ValueError("model: no filters of it can go; see tk.trace(model, example_inputs)")
        self._sizes, self._filters = sizes, sum(sizes)
        self._owners = self._find_owners()
        super().__init__(
            model.parameters(), lr, momentum, weight_decay, compression, backend=backend
        )

    @property
    def active(self) -> int:
        """Q: how many filters get their gradient in a step."""
        share = self._filters / self.param_groups[0]["compression"]
        return max(math.floor(share * (1 + 1e-12)), 1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of all parameters that have a gradient.

        Returns:
            What `closure` gives, which is called first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        weights = [p for p in group["params"] if p.grad is not None and p.numel()]
        if not weights:
            return loss
        self._check([(p, group) for p in weights])
        scores = self._sums([(p, p.grad) for p in weights if id(p) in self._owners]).abs()
        self._check_finite(scores)
        table = global_threshold([scores], self.active, backend=self._backend)
        (kept,) = greatest_masks([scores], table)
        owned = [id(p) in self._owners for p in weights]
        sparse_momentum(
            weights,
            [self._masked(p, kept) for p in weights],
            [self._momentum(p) for p in weights],
            table,
            lr=[float(group["lr"])] * len(weights),
            momentum=[float(group["momentum"])] * len(weights),
            weight_decay=[
                float(group["weight_decay"]) if mine or p.dim() > 1 else 0.0
                for p, mine in zip(weights, owned, strict=True)
            ],
            ranked=[False] * len(weights),
            backend=self._backend,
        )
        return loss

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """Set all filters to zero but the Q of greatest Σ w², and one of each layer at least.

        Returns:
            For each traced group a bool mask of the filters that are kept.
        """
        sums = self._sums([(p, p) for p in self.param_groups[0]["params"] if id(p) in self._owners])
        self._check_finite(sums)
        table = global_threshold([sums], self.active, backend=self._backend)
        (kept,) = greatest_masks([sums], table)
        for part, each in zip(kept.split(self._sizes), sums.split(self._sizes), strict=True):
            part[each.argmax()] = True
        for p in self.param_groups[0]["params"]:
            if id(p) in self._owners:
                off = ~self._rows(p, kept)
                p.masked_fill_(off, 0)
                self._momentum(p).masked_fill_(off, 0)
        return list(kept.split(self._sizes))

    def compact(self) -> nn.Module:
        """`finish`, and remove the filters that are cut; train on with another optimizer."""
        remove(self._model, self._channels, [~kept.cpu() for kept in self.finish()])
        return self._model

    def _find_owners(self) -> dict[int, Tensor]:
        """Of each parameter that filters are made of, for each row the filter's number, or −1."""
        known: dict[int, int] = {}
        number = 0
        for group in self._channels.groups:
            for slot in group.producers:
                weight, axis = self._channels.weights_of(slot.owner)[0]
                if axis:
                    raise ValueError(
                        f"model: {slot.owner!r} is a transposed convolution, or another weight "
                        "whose filters do not lie along its first dimension; use tk.Pruner, or "
                        "GSM for single weights"
                    )
                classes = self._channels.classes[weight][0]
                for unit, places in enumerate(slot.index.tolist()):
                    known |= {int(classes[place]): number + unit for place in places}
            number += group.size
        found = {}
        for name, parameter in self._model.named_parameters():
            dimensions = self._channels.classes.get(name)
            rows = [known.get(int(each), -1) for each in dimensions[0]] if dimensions else []
            if any(row >= 0 for row in rows):
                found[id(parameter)] = torch.tensor(rows, device=parameter.device)
        return found

    def _sums(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Of each filter the sum of products over all of its entries: [filters] float32."""
        tables = needed_moments(
            [first.detach().reshape(first.size(0), -1) for first, _ in pairs],
            [second.detach().reshape(second.size(0), -1) for _, second in pairs],
            moments=("gw",),
            backend=self._backend,
        )
        total = torch.zeros(self._filters + 1, device=pairs[0][0].device)  # the last is of no one
        for (parameter, _), moments in zip(pairs, tables, strict=True):
            total.index_put_((self._owners[id(parameter)],), moments[:, 0].float(), accumulate=True)
        return total[:-1]

    def _rows(self, parameter: Tensor, kept: Tensor) -> Tensor:
        """bool, of the parameter's dimensions, True for rows of kept filters or of none."""
        rows = torch.cat((kept, kept.new_ones(1)))[self._owners[id(parameter)]]
        return rows.view(-1, *[1] * (parameter.dim() - 1))

    def _masked(self, parameter: Any, kept: Tensor) -> Tensor:
        grad: Tensor = parameter.grad
        if id(parameter) not in self._owners:
            return grad
        return grad.masked_fill(~self._rows(parameter, kept), 0)

    def _check_finite(self, scores: Tensor) -> None:
        for group, part in zip(self._channels.groups, scores.split(self._sizes), strict=True):
            if not bool(part.isfinite().all()):
                raise FloatingPointError(
                    f"{group.name}: the sum over one of its filters is not finite; nothing was "
                    "changed"
                )
