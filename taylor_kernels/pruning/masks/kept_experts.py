"""Routers of mixtures of experts while some experts are masked: they choose among those kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from taylor_kernels.tracing.notes.experts import Result


class KeptExperts:
    """A forward hook that runs its router again on the rows of the experts that are kept.

    Of what it returns, the numbers of experts are put back to those among all experts, and what has
    a column for each expert holds minus infinity for the others, or zero if it is probabilities.

    It is saved with a model that is saved whole, and so holds nothing but tensors and plain Python.

    Args:
        kept: the numbers of the experts that stay, [n] int64.
        results: of each leaf of what the router returns, as the trace has found it.
    """

    def __init__(self, kept: Tensor, results: Sequence[Result]) -> None:
        self._kept, self._results = kept, [result.name for result in results]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        self._kept = self._kept.to(next(module.parameters()).device)
        smaller = copy.copy(module)  # the router that is there may run in other threads
        vars(smaller)["num_experts"] = self._kept.numel()
        vars(smaller)["_parameters"] = self._cut(module._parameters)
        vars(smaller)["_buffers"] = self._cut(module._buffers)
        found, form = tree_flatten(smaller.forward(*args, **kwargs))
        whole, _ = tree_flatten(output)
        if not len(found) == len(whole) == len(self._results):
            raise self._another(module)
        leaves = map(self._among_all, [module] * len(found), found, whole, self._results)
        return tree_unflatten(list(leaves), form)

    def _among_all(self, module: nn.Module, leaf: Any, whole: Any, result: str) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if result == Result.NUMBERS.name:
            leaf = self._kept[leaf]
        elif result in (Result.LOGITS.name, Result.PROBABILITIES.name):
            fill = 0.0 if result == Result.PROBABILITIES.name else -torch.inf
            leaf = torch.full_like(whole, fill).index_copy(-1, self._kept, leaf)
        if leaf.shape != whole.shape:
            raise self._another(module)
        return leaf

    def _another(self, module: nn.Module) -> RuntimeError:
        return RuntimeError(
            f"model: a {type(module).__name__} some of whose experts are masked returns something "
            "of another form than on the example inputs; compact() first"
        )

    def _cut(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {
            name: None if tensor is None else tensor.index_select(0, self._kept)
            for name, tensor in tensors.items()
        }
