"""Per-example gradients of parameters of any other kind: a module is run again, an example a time.

Its inputs and the gradients of its outputs are cut at the dimension that counts examples, and an
ordinary backward pass through the module alone gives what it owes to each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves, tree_map

#: How far an example's outputs may be from those that it had among the others.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_HALF_TOLERANCE = 1e-1


class Rerun:
    """One call of a module, to be run again.

    Args:
        name: what errors call the module.
        module: looked at in the mode that it had in this call.
        inputs: (args, kwargs) of the call.
        output: what it returned: gradients are awaited at its floating-point tensors.
        examples: of the call.
    """

    def __init__(
        self, name: str, module: nn.Module, inputs: tuple[Any, Any], output: Any, examples: int
    ) -> None:
        self.name = name
        self.examples = examples
        self._module = module
        self._dim = 1 if getattr(module, "batch_first", True) is False else 0
        self._inputs = _mapped(lambda x: x.detach() if isinstance(x, Tensor) else x, inputs)
        self._autocast = _autocast_of(inputs)
        self.outputs = differentiable(output)
        self._values = [tensor.detach() for tensor in self.outputs]
        self._gradients: list[Tensor | None] = [None] * len(self.outputs)

    def add(self, place: int, dy: Tensor) -> None:
        """A gradient has come at one of `outputs`; those of several backward passes add up."""
        self.add_passes(place, dy[None])

    def add_passes(self, place: int, dy: Tensor) -> None:
        """The same of several passes that were made at once, [passes, ...]."""
        known = self._gradients[place]
        self._gradients[place] = dy.detach() if known is None else known + dy.detach()

    def arm(self) -> None:
        """Outputs are not held any longer than it takes to put hooks on them."""
        self.outputs = []

    @property
    def reached(self) -> bool:
        """Whether a gradient has come since clear()."""
        return any(dy is not None for dy in self._gradients)

    def clear(self) -> None:
        """Forget the gradients, as before another backward pass over the same graph."""
        self._gradients = [None] * len(self._gradients)

    def gradients(self, parameters: Mapping[str, nn.Parameter], n: int) -> dict[str, Tensor]:
        """{name: [passes, *shape], the gradients of example n, of those that have one}.

        Args:
            parameters: by their names in the module.

        Raises:
            RuntimeError: an example alone gives other outputs than it gave among the others.
        """
        leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        buffers = {name: b.clone() for name, b in self._module.named_buffers()}
        with torch.enable_grad(), self._autocast:
            args, kwargs = _mapped(lambda x: self._cut(x, n), self._inputs)
            output = torch.func.functional_call(self._module, {**leaves, **buffers}, args, kwargs)
        found = differentiable(output)
        for i in range(len(self._gradients)):
            self._check(found, i, n)
        reached = [i for i, dy in enumerate(self._gradients) if dy is not None]
        passes: list[tuple[Tensor | None, ...]] = []
        for given in zip(*(self._gradients[i] for i in reached), strict=True):
            dys = [self._cut(dy, n) for dy in given]
            roots, to = [found[i] for i in reached], [*leaves.values()]
            passes.append(torch.autograd.grad(roots, to, dys, retain_graph=True, allow_unused=True))
        every = zip(leaves, zip(*passes, strict=True), strict=True) if passes else ()
        return {name: torch.stack(own) for name, own in every if own[0] is not None}

    def _cut(self, part: Any, n: int) -> Any:
        """One example of what holds them all; of anything else, itself."""
        if not isinstance(part, Tensor):
            return part
        for dim in dict.fromkeys((self._dim, 0, 1)):
            if part.dim() > dim and part.size(dim) == self.examples:
                return part.narrow(dim, n, 1)
        return part

    def _check(self, found: list[Tensor], i: int, n: int) -> None:
        here = self._cut(self._values[i], n)
        close = len(found) == len(self._values) and found[i].shape == here.shape
        if close:
            rtol = _TOLERANCE.get(here.dtype, _HALF_TOLERANCE)
            scale = here.abs().max() if here.numel() else here.sum()
            close = bool(((found[i].detach() - here).abs() <= rtol * scale).all())
        if not close and here.isfinite().all():
            raise RuntimeError(
                f"{self.name}: its outputs for one example alone are not those it gave among the "
                "others, so that the gradient of an example is not defined or cannot be found: "
                "put dropout and norms of the batch in eval mode, and let dim 0 of what is passed "
                "to it count examples (dim 1 where batch_first=False); or name the parameters "
                "that you need (parameters=)"
            )


def differentiable(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a module returned."""
    leaves = [
        leaf
        for part in tree_leaves(output)
        for leaf in tree_leaves(vars(part) if hasattr(part, "__dataclass_fields__") else part)
    ]
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def first_size(inputs: tuple[Any, Any], dim: int = 0) -> int | None:
    """How many examples the first tensor of some arguments holds."""
    found = (x.size(dim) for x in _leaves(inputs) if isinstance(x, Tensor) and x.dim() > dim)
    return next(found, None)


def _mapped(function: Callable[[Any], Any], inputs: Any) -> Any:
    """tree_map, also inside of mappings that PyTorch does not know (a BatchEncoding)."""

    def own(part: Any) -> Any:
        if not _is_unknown_mapping(part):
            return function(part)
        found = copy.copy(part)
        found.update({key: _mapped(function, value) for key, value in part.items()})
        return found

    return tree_map(own, inputs, is_leaf=_is_unknown_mapping)


def _leaves(inputs: Any) -> list[Any]:
    leaves: list[Any] = []
    _mapped(leaves.append, inputs)
    return leaves


def _is_unknown_mapping(part: Any) -> bool:
    return isinstance(part, MutableMapping) and type(part) not in SUPPORTED_NODES


def _autocast_of(inputs: Any) -> torch.autocast:
    """What autocast is set to now, to be set again."""
    tensors = [x for x in _leaves(inputs) if isinstance(x, Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    return torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    )
