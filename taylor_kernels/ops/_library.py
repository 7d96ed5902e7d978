"""How an op is made known to PyTorch: for every device, for tracing, for autograd and for vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: The namespace of the ops: torch.ops.taylor_kernels.
library = torch.library.Library("taylor_kernels", "DEF")


def define(
    schema: str, run: Callable[..., Any], empty: Callable[..., Any], tags: Sequence[torch.Tag] = ()
) -> Any:
    """Register an op, and return it.

    `run` computes it on every device, since `backends.select` chooses the kernels; `empty` makes
    its outputs without their values, by which torch.compile and export trace it. Scores are not
    differentiable: the op is skipped by autograd, so that no result requires a gradient, however
    it is called. Under vmap it runs once for each slice.
    """

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    name = library.define(schema, tags=tuple(tags))
    qualified = f"taylor_kernels::{name}"
    library.impl(name, below_autograd, "CompositeExplicitAutograd")
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(qualified, empty, lib=library)
    op = getattr(torch.ops.taylor_kernels, name).default
    if hasattr(torch.library, "register_vmap"):  # from PyTorch 2.5 on
        torch.library.register_vmap(qualified, _each_slice(op), lib=library)
    return op


def _each_slice(op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for vmap: its results are stacked along their first dimension."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def of_slice(i: int) -> Any:
            return op(*(_slice(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))

        # Of no slices the result has a shape and no values: that of a slice of zeros, cut off.
        count = info.batch_size
        each = [of_slice(i) for i in range(count)] or [of_slice(0)]
        if isinstance(each[0], Tensor):
            return torch.stack(each)[:count], 0
        stacked = tuple(torch.stack(results)[:count] for results in zip(*each, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _slice(arg: Any, dim: Any, i: int) -> Any:
    """Slice i of a tensor, or of each in a list; what has no dimension to slice is the same."""
    if isinstance(arg, list) and isinstance(dim, (list, tuple)):
        return [_slice(part, of_part, i) for part, of_part in zip(arg, dim, strict=True)]
    if dim is None:
        return arg
    return arg.select(dim, i) if arg.size(dim) else arg.sum(dim)  # zeros
