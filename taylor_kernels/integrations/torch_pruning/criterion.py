"""Any criterion of this package as an importance of Torch-Pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner import importance

from taylor_kernels.criteria import Criterion
from taylor_kernels.importance import Importance
from taylor_kernels.integrations.torch_pruning.parts import is_into, places
from taylor_kernels.integrations.torch_pruning.scoring import SweptGroups
from taylor_kernels.statistics.layers import filter_count


class CriterionImportance(SweptGroups, importance.GroupMagnitudeImportance):
    """What `tk_importance` returns: a meter on a model that scores groups of Torch-Pruning."""

    strict_compat = False
    bias = False

    def __init__(
        self,
        model: nn.Module,
        criterion: str | Criterion,
        *,
        group_reduction: str | None,
        normalizer: Any,
        **options: Any,
    ) -> None:
        super().__init__(group_reduction=group_reduction, normalizer=normalizer)
        self._options = options
        self._scores: dict[nn.Module, Tensor] | None = None
        self._meter = Importance(model, criterion, **options)
        self._weights = {m: m.weight for m in self._meter._layers.values()}

    def update(
        self, *, loss_scale: float = 1.0, closure: Callable[[], Tensor] | None = None
    ) -> None:
        """As `tk.Importance.update`: once for each minibatch.

        The first update after a pruning starts anew, since the filters are others.
        """
        if self._is_outdated():
            self._start_anew()
        self._meter.update(loss_scale=loss_scale, closure=closure)
        self._scores = None

    def _start_anew(self) -> None:
        """The layers have other filters; hooks stay, since they have seen the pass that counts."""
        meter = self._meter
        if self._options.get("example_inputs") is not None:
            raise RuntimeError(
                "example_inputs: the model was traced before it was pruned; close() this "
                "importance and make a new one by tk_importance() after each step of pruning"
            )
        if self._options.get("stream"):
            raise RuntimeError(
                "stream: the gradients of parameters from before the pruning were streamed; "
                "close() this importance and make a new one by tk_importance() after each step"
            )
        meter._sizes = {name: filter_count(layer) for name, layer in meter._layers.items()}
        meter._zero()
        self._weights = {m: m.weight for m in meter._layers.values()}

    def reset(self) -> None:
        """Forget all updates."""
        self._meter.reset()
        self._scores = None

    def close(self) -> None:
        """Take all hooks off the model."""
        self._meter.close()

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """[channels] float32 on the host: by `group_reduction`, of the layers that make them.

        None for a group that none of the scored layers makes.

        Raises:
            RuntimeError: there was no update, or none since the model was pruned.
        """
        if self._scores is None or self._is_outdated():
            self._scores = self._read()
        found = []
        for item in group:
            scores = self._scores.get(item.dep.target.module)
            if scores is None or not item.idxs or is_into(item.dep.handler):
                continue
            found.append((scores[places(item.idxs)], item.root_idxs))
        if not found:
            return None
        return self._normalize(self._reduced(group, found), self.normalizer)

    def _is_outdated(self) -> bool:
        return any(module.weight is not weight for module, weight in self._weights.items())

    def _read(self) -> dict[nn.Module, Tensor]:
        if self._is_outdated():
            raise RuntimeError("the model was pruned since the last update(): call it again first")
        found = self._meter.compute()
        packed = torch.cat(list(found.values())).cpu().split([len(s) for s in found.values()])
        return {
            self._meter._layers[name]: scores for name, scores in zip(found, packed, strict=True)
        }


def tk_importance(
    criterion: str | Criterion,
    model: nn.Module,
    *,
    group_reduction: str | None = "mean",
    normalizer: Any = "mean",
    **options: Any,
) -> CriterionImportance:
    """An importance for Torch-Pruning's pruners from any criterion of this package.

    Call update() as one of `tk.Importance`, then let the pruner step. The score of a channel is,
    by `group_reduction`, that of the filters that make it, one in each layer of its group.

    Args:
        criterion: a name from `tk.criterion_names()`, or a `tk.Criterion`.
        model: the model to be pruned.
        group_reduction, normalizer: as those of Torch-Pruning's importances.
        options: further ones of `tk.Importance`: `layers`, `backend`, `example_inputs`.

    Raises:
        ValueError, TypeError: as `tk.Importance`.

    Example:
        >>> import torch, torch_pruning as tp
        >>> from torch import nn
        >>> from taylor_kernels.integrations.torch_pruning import tk_importance
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
        >>> x = torch.randn(4, 3, 9, 9)
        >>> importance = tk_importance("taylor_so_diag", model)
        >>> pruner = tp.pruner.BasePruner(
        ...     model, x, importance, pruning_ratio=0.5, ignored_layers=[model[2]]
        ... )
        >>> importance.update(closure=lambda: model(x).square().mean())
        >>> pruner.step()
        >>> model[0].out_channels
        4
    """
    return CriterionImportance(
        model, criterion, group_reduction=group_reduction, normalizer=normalizer, **options
    )
