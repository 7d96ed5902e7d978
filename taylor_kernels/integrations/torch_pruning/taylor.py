"""Torch-Pruning's first-order Taylor importance, from one sweep over all gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner import function, importance

from taylor_kernels.integrations.torch_pruning.parts import Part
from taylor_kernels.integrations.torch_pruning.scoring import SweptGroups
from taylor_kernels.integrations.torch_pruning.sweep import Sweep

#: What Torch-Pruning's Taylor and Hessian importances look at unless they are told.
TARGET_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
)


class GroupTaylorImportance(SweptGroups, importance.GroupTaylorImportance):
    """`torch_pruning.importance.GroupTaylorImportance`: Σ|g·w| of all that goes with a channel.

    Call it, or hand it to a pruner, after loss.backward(). All parameters of the model are read in
    one launch when the first group is scored; the scores of other groups come from the same
    tables, for as long as parameters and gradients stay as they are. Tables are on the host, and so
    are the scores, which is where pruners rank them. A change through `.data`, which PyTorch does
    not count, is seen only if it replaces the memory.

    Beyond Torch-Pruning 1.6.1:
        BatchNorm and depthwise convolutions count; there they are passed over.
        grouped convolutions: an input channel has the score of its own weights, not of those of
            all groups. Transposed ones with groups are counted, too.
        parameters without a gradient (frozen layers) are left out, with a warning; there it is an
            AttributeError. Without any gradient in the group there is no score (None), as there
            for groups without parameters.
        a weight shared by several layers of a group counts once.
        channels and channels of the root stay together where a group permutes them.
        groups of some of a root's channels are scored, as its documentation has it.

    Args:
        group_reduction, normalizer, multivariable, target_types: as Torch-Pruning's.
        bias: whether biases count; None: yes, but with strict_compat not unless asked for.
        strict_compat: Torch-Pruning's own numbers, with all that is said above undone.

    Example:
        >>> import torch, torch_pruning as tp
        >>> from torch import nn
        >>> from taylor_kernels.integrations.torch_pruning import GroupTaylorImportance
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
        >>> x = torch.randn(4, 3, 9, 9)
        >>> importance = GroupTaylorImportance()
        >>> pruner = tp.pruner.BasePruner(
        ...     model, x, importance, pruning_ratio=0.5, ignored_layers=[model[2]]
        ... )
        >>> model(x).square().mean().backward()
        >>> pruner.step()
        >>> model[0].out_channels
        4
        >>> isinstance(importance, tp.importance.GroupTaylorImportance)
        True
    """

    _strict_norms = (function.prune_groupnorm_out_channels, function.prune_layernorm_out_channels)

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Any = "mean",
        multivariable: bool = False,
        bias: bool | None = None,
        target_types: Sequence[type[nn.Module]] = TARGET_TYPES,
        *,
        strict_compat: bool = False,
    ) -> None:
        counted = not strict_compat if bias is None else bias
        super().__init__(group_reduction, normalizer, multivariable, counted, list(target_types))
        self.strict_compat = strict_compat
        self._sweep = Sweep(_gradient, "gw" if multivariable else "abs_gw")

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """[channels] float32 on the host: the score of each channel of the group's root.

        Raises:
            RuntimeError: no parameter of the model has a gradient.
        """
        if not self.strict_compat:
            return self._score(group)
        score = self._strict_score(group)
        return super().__call__(group) if score is NotImplemented else score

    def _value(self, table: Tensor) -> Tensor:
        return table.abs()

    def _tables(self, group: Any, parts: Sequence[Part]) -> list[Tensor | None]:
        tables = super()._tables(group, parts)
        if not self.strict_compat and any(table is None for table in tables):
            self._say_missing(group, parts, tables)
        return tables

    def _say_missing(
        self, group: Any, parts: Sequence[Part], tables: Sequence[Tensor | None]
    ) -> None:
        if not self._sweep.found_any:
            raise RuntimeError(
                "no parameter has a gradient; score after loss.backward() and before zero_grad()"
            )
        frozen = [part for part, table in zip(parts, tables, strict=True) if table is None]
        names = {} if group._DG is None else group._DG._module2name
        which = sorted({str(names.get(part.module, part.module)) for part in frozen})
        warnings.warn(
            f"{', '.join(which)}: parameters without a gradient count nothing in the scores of "
            "the groups that they are in",
            stacklevel=5,
        )


class TaylorImportance(GroupTaylorImportance, importance.TaylorImportance):
    """`torch_pruning.importance.TaylorImportance`, another name of GroupTaylorImportance."""


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad
