"""The layers whose filters are scored, and where in their tensors the filters lie."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from taylor_kernels.checks import check_names
from taylor_kernels.statistics.parts import BareLayer, bare_layer

#: A layer whose filters can be scored; a class of `_LINEAR_TOO` counts as a linear layer.
Layer = _ConvNd | nn.Linear | BareLayer
Layers = dict[str, Layer]
#: Linear layers with a class of their own, which hold their weight as [inputs, outputs].
_LINEAR_TOO = frozenset({"transformers.pytorch_utils.Conv1D"})


def is_layer(module: nn.Module | None) -> TypeGuard[_ConvNd | nn.Linear]:
    """Whether a module is a convolution or a linear layer."""
    if isinstance(module, (_ConvNd, nn.Linear)):
        return True
    return any(f"{c.__module__}.{c.__qualname__}" in _LINEAR_TOO for c in type(module).__mro__)


def find_layers(
    model: nn.Module,
    names: Sequence[str] | None,
    *,
    trainable_only: bool,
    beside: Callable[[], Mapping[str, Sequence[tuple[str, int]]]] | None = None,
) -> Layers:
    """The convolution and linear layers of a model by name: all, or those that `names` match.

    Args:
        names: module names; * and ? match as in file names.
        trainable_only: leave layers with a frozen weight out (with a warning).
        beside: gives what `parts_beside_layers` finds, where names that match no layer are looked
            for. It is called once, since it may run the model.

    Raises:
        ValueError: a name matches no such layer; a named layer is frozen though
            `trainable_only`; nothing is left.
        TypeError: `names` are no names.
    """
    candidates: Layers = {
        name: module for name, module in model.named_modules() if is_layer(module)
    }
    if names is None:
        chosen = candidates
    else:
        names = check_names("layers", names)
        chosen = {}
        others: Mapping[str, Sequence[tuple[str, int]]] | None = None  # not asked for yet
        for pattern in names:
            matches = {n: m for n, m in candidates.items() if fnmatchcase(n, pattern)}
            if not matches:
                if others is None:
                    others = {} if beside is None else beside()
                matches = {
                    name: bare_layer(model, parts)
                    for name, parts in others.items()
                    if fnmatchcase(name, pattern)
                }
                if not matches:
                    raise ValueError(
                        f"layers: {pattern!r} matches no convolution or linear layer"
                        + ("" if beside is None else ", norm, embedding or other parameter")
                        + f"; there are {', '.join((*candidates, *others)) or 'none'}"
                    )
            chosen |= matches
    frozen: list[str] = []
    if trainable_only:
        frozen = [n for n, m in chosen.items() if is_frozen(m)]
    if frozen and names is not None:
        raise ValueError(
            f"layers: {', '.join(frozen)} have frozen weights, so this criterion has nothing to "
            "read; unfreeze them or use taylor_fo_gate, which needs no weight gradient"
        )
    if frozen:
        warnings.warn(
            f"{len(frozen)} layers with frozen weights are left out: {', '.join(frozen)}; "
            "taylor_fo_gate can score them",
            stacklevel=3,
        )
    if names is not None and not chosen:
        raise ValueError("layers: is empty; name a layer, or pass None for all")
    for name, layer in chosen.items():
        held = held_weight(layer)
        if isinstance(held, UninitializedParameter) or held.is_meta:
            raise ValueError(
                f"model: {name} has no values yet (a lazy module, or the meta device); run the "
                "model once, or move it to a real device first"
            )
    chosen = {n: m for n, m in chosen.items() if n not in frozen}
    if not chosen:
        raise ValueError(
            "model: has no convolution or linear layer"
            + (" with a trainable weight" if frozen else "")
            + ", so there is nothing to score"
        )
    return chosen


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; then each in its own again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def held_weight(layer: Layer) -> Tensor:
    """The weight, or where a parametrization computes it what that holds for it.

    For questions that need no values: reading the weight of a spectral norm in train mode moves it.
    """
    if isinstance(layer, BareLayer) or not parametrize.is_parametrized(layer, "weight"):
        return layer.weight
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    return next(layer.parametrizations["weight"].parameters())


def used_weight(layer: Layer) -> Tensor:
    """The values of the weight that the layer used last, without a graph."""
    if isinstance(layer, BareLayer) or not parametrize.is_parametrized(layer, "weight"):
        return layer.weight.detach()
    assert isinstance(layer.parametrizations, nn.Module)
    with eval_mode(layer.parametrizations):
        return layer.weight.detach()


def filter_axis(layer: Layer) -> int:
    """The dimension of the weight that counts output filters: 1 for transposed convolutions."""
    if isinstance(layer, BareLayer):
        return layer.parts[0].axis
    plain = isinstance(layer, (_ConvNd, nn.Linear)) and not isinstance(layer, _ConvTransposeNd)
    return 0 if plain else 1


def channel_dim(layer: Layer) -> int:
    """The dimension of the layer's output that counts filters, from the end: batch or no batch."""
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


def filter_count(layer: Layer) -> int:
    """How many output filters, or neurons, a layer has."""
    if isinstance(layer, _ConvNd):
        return layer.out_channels
    if isinstance(layer, (nn.Linear, BareLayer)):
        return layer.out_features
    return layer.weight.size(filter_axis(layer))


def check_output(name: str, output: object) -> Tensor:
    """What a layer returned is a tensor.

    Raises:
        TypeError: it is not, as in a subclass that returns more.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name} returned {type(output).__name__}, not a tensor, so its output cannot be "
            "scored; leave it out with layers="
        )
    return output


def is_computed(layer: Layer) -> bool:
    """Whether a layer's weight is made of other parameters."""
    if isinstance(layer, BareLayer):
        return not all(isinstance(part.parameter, nn.Parameter) for part in layer.parts)
    return parametrize.is_parametrized(layer, "weight") or not (
        layer.weight.is_leaf and isinstance(layer.weight, nn.Parameter)
    )


def check_leaf(name: str, layer: Layer) -> None:
    """A layer's weight is a parameter of its own.

    Raises:
        RuntimeError: it is not.
    """
    if is_computed(layer):
        raise RuntimeError(
            f"{name}.weight is computed from other parameters (a parametrization or a pruning "
            "mask), so it holds no gradient; use taylor_fo_gate, or make the parametrization "
            "permanent first"
        )


def filter_groups(layer: Layer) -> int:
    """The groups of a convolution; a linear layer is one."""
    return layer.groups if isinstance(layer, _ConvNd) else 1


class Rows(NamedTuple):
    """A parameter, and where in it the filters of a layer lie.

    Attributes:
        axis: 0 or 1, of the parameter whose leading dimensions are `merged`.
        groups: of a convolution whose weight has its filters in dimension 1.
        merged: so many dimensions are taken for one.
    """

    parameter: Tensor
    axis: int
    groups: int
    merged: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape, its elements in their order, to be read by `axis`."""
        return tensor if self.merged == 1 else tensor.flatten(0, self.merged - 1)


def rows_of(layer: Layer) -> list[Rows]:
    """All parameters that a layer is scored by: its weight, or the parts of a bare one."""
    if not isinstance(layer, BareLayer):
        return [Rows(layer.weight, filter_axis(layer), filter_groups(layer))]
    return [Rows(part.parameter, min(part.axis, 1), 1, max(part.axis, 1)) for part in layer.parts]


def is_frozen(layer: Layer) -> bool:
    """Whether not all of a layer's parameters are trained."""
    if isinstance(layer, BareLayer):
        return not all(part.parameter.requires_grad for part in layer.parts)
    return not held_weight(layer).requires_grad
