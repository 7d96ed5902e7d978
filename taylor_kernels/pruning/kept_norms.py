"""Norms across channels while some of these are masked: run on those that are kept.

A LayerNorm or RMSNorm takes its statistics of all channels, so zeros count in them. While channels
are masked, the module is run on the kept ones with its parameters cut to them, as it will run once
the others are removed, and the masked channels of its output are zeros:

    y[kept] = norm(x[kept], γ[kept], β[kept]),    y[others] = 0

That is what masking and removing a channel of such a norm mean in this package. A module whose
parameters do not lie along the channels (CBAM's spatial attention, with a convolution in it) is run
once, on the kept ones. A router of a mixture of experts is treated alike: it chooses among those
that are kept. A copy of the model does the same, and so does a saved one, since its outputs are
made of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from taylor_kernels.tracing import Channels
from taylor_kernels.tracing.across import Kept
from taylor_kernels.tracing.experts import Result


class KeptOnly:
    """A forward hook that runs its module again on the channels that are kept.

    Args:
        kept: which those are, and where.
        attributes: what the module's attributes are once the others are gone.
    """

    def __init__(self, kept: Kept, attributes: Mapping[str, Any]) -> None:
        self._on, self._kept, self._attributes = kept, kept.places, dict(attributes)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        args, kwargs = self._of_kept(module, args, kwargs)
        return self._among_zeros(self._smaller(module).forward(*args, **kwargs))

    def _of_kept(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with what is kept of the one tensor among them."""
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(inputs) != 1:
            raise RuntimeError(
                f"model: a {type(module).__name__} some of whose channels are masked was given "
                f"{len(inputs)} tensors, where the example inputs gave it one; compact() first"
            )
        self._kept = self._kept.to(inputs[0].device)
        kept = inputs[0].index_select(self._on.dim, self._kept)
        return (
            tuple(kept if value is inputs[0] else value for value in args),
            {name: kept if value is inputs[0] else value for name, value in kwargs.items()},
        )

    def _among_zeros(self, found: Tensor) -> Tensor:
        """What the module returns for the kept channels, with zeros for the others."""
        if not self._on.returned:
            return found
        shape = list(found.shape)
        shape[self._on.dim] = self._on.width
        return found.new_zeros(shape).index_copy(self._on.dim, self._kept, found)

    def _smaller(self, module: nn.Module) -> nn.Module:
        """A module of the cut tensors; the one there is may run in other threads."""
        new = copy.copy(module)
        vars(new).update(self._attributes)
        if self._on.cut:
            vars(new)["_parameters"] = self._cut(module._parameters)
            vars(new)["_buffers"] = self._cut(module._buffers)
        return new

    def _cut(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The cut ones are no leaves: their gradients go on to the whole ones."""
        return {
            name: None
            if tensor is None
            else tensor.index_select(max(range(tensor.dim()), key=tensor.size), self._kept)
            for name, tensor in tensors.items()
        }


class KeptInput(KeptOnly):
    """A forward pre-hook: a module without parameters along its channels gets those that are kept.

    `KeptOutput`, a forward hook, gives the others back as zeros. The module runs once, since there
    may be modules in it that count what they see, as BatchNorm does.
    """

    def __init__(self, kept: Kept) -> None:
        super().__init__(kept, {})

    def __call__(  # type: ignore[override]
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._of_kept(module, args, kwargs)


class KeptOutput(KeptOnly):
    """The forward hook that goes with `KeptInput`."""

    def __init__(self, kept: Kept) -> None:
        super().__init__(kept, {})

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        self._kept = self._kept.to(output.device)
        return self._among_zeros(output)


class KeptExperts(KeptOnly):
    """A forward hook that runs its router again on the rows of the experts that are kept.

    Of what it returns, the numbers of experts are put back to those among all experts, and what has
    a column for each expert holds minus infinity for the others, or zero if it is probabilities.

    Args:
        kept: the numbers of the experts that stay, [n] int64.
        results: of each leaf of what the router returns, as the trace has found it.
    """

    def __init__(self, kept: Tensor, results: Sequence[Result]) -> None:
        on = Kept(0, kept, 0, returned=False, cut=True)
        super().__init__(on, {"num_experts": kept.numel()})
        self._results = tuple(results)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        self._kept = self._kept.to(next(module.parameters()).device)
        found, form = tree_flatten(self._smaller(module).forward(*args, **kwargs))
        whole, _ = tree_flatten(output)
        if not len(found) == len(whole) == len(self._results):
            raise self._another(module)
        leaves = map(self._among_all, [module] * len(found), found, whole, self._results)
        return tree_unflatten(list(leaves), form)

    def _among_all(self, module: nn.Module, leaf: Any, whole: Any, result: Result) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if result is Result.NUMBERS:
            leaf = self._kept[leaf]
        elif result in (Result.LOGITS, Result.PROBABILITIES):
            fill = 0.0 if result is Result.PROBABILITIES else -torch.inf
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


def keep_only(
    modules: Mapping[str, nn.Module],
    channels: Channels,
    dead: Sequence[Tensor],
    attributes: Mapping[str, Mapping[str, Any]],
    before: Sequence[Tensor] | None = None,
) -> list[RemovableHandle]:
    """Have the norms across channels, and routers, run on what the dead units leave.

    Args:
        attributes: what those of modules will be once all units are removed.
        before: for each group [U] bool, True for units that have been removed.

    Returns:
        The hooks.
    """
    hooks = [
        modules[name].register_forward_hook(
            KeptExperts(kept.to(_device(modules[name])), results),
            prepend=True,
            with_kwargs=True,
        )
        for name, (kept, results) in channels.kept_by_routers(dead, before).items()
    ]
    for name, kept in channels.kept_by_norms(dead, before).items():
        hooks += _run_on(modules[name], kept, attributes.get(name, {}))
    return hooks


def _run_on(
    norm: nn.Module, kept: Kept, attributes: Mapping[str, Any]
) -> Iterator[RemovableHandle]:
    """Have a norm across channels run on the kept ones."""
    kept = kept._replace(places=kept.places.to(_device(norm)))
    again = kept.cut or bool(attributes)
    if not again:
        yield norm.register_forward_pre_hook(KeptInput(kept), with_kwargs=True)
    after = KeptOnly(kept, attributes) if again else KeptOutput(kept)
    # Before the hooks of others, which see the output as it is.
    yield norm.register_forward_hook(after, prepend=True, with_kwargs=True)


def _device(module: nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
