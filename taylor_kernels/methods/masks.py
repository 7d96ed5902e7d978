"""Masks of single weights: made of scores by a threshold, and held while a network is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taylor_kernels.ops.global_threshold import global_threshold, greatest_masks


def ranked_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those of 2 and 4 dimensions: linear layers and 2-D convolutions.

    Raises:
        ValueError: there is none.
    """
    found = {name: p for name, p in model.named_parameters() if p.dim() in (2, 4)}
    if not found:
        raise ValueError("model: none of its parameters has 2 or 4 dimensions")
    return found


def kept_count(total: int, keep: float) -> int:
    """How many of `total` are kept at the fraction `keep`, one at least.

    Raises:
        ValueError: `keep` is not in (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: {keep} is not in (0, 1]; 0.05 keeps a twentieth")
    return max(math.floor(total * keep * (1 + 1e-12)), 1)  # 0.29 · 100 is 28.999… in floating point


def masks_of(
    scores: Mapping[str, Tensor],
    keep: float,
    *,
    scope: str = "global",
    granularity: str = "weight",
    among: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """bool masks of the greatest scores: exactly ⌊keep · number⌋, equal ones by position.

    Args:
        scores: of each weight by name; finite.
        keep: the fraction that is kept, in (0, 1].
        scope: "global" ranks all of them together, "local" those of each tensor.
        granularity: "weight", or "filter", whose score is the sum over its weights.
        among: earlier masks; all that they have cut ranks below all that they have left.

    Raises:
        ValueError: an argument out of its range; scores that are not finite.
    """
    if scope not in ("global", "local"):
        raise ValueError(f"scope: {scope!r} is not one of 'global' and 'local'")
    if granularity not in ("weight", "filter"):
        raise ValueError(f"granularity: {granularity!r} is not one of 'weight' and 'filter'")
    units = {
        name: each.float().flatten(1).sum(1) if granularity == "filter" else each.float()
        for name, each in scores.items()
    }
    for name, mask in (among or {}).items():
        left = mask.flatten(1).any(1) if granularity == "filter" else mask
        # Whatever the signs are. What is not finite stays so, and is named.
        units[name] = units[name].masked_fill(
            ~left & units[name].isfinite(), -torch.finfo(torch.float32).max
        )
    together = [list(units)] if scope == "global" else [[name] for name in units]
    masks: dict[str, Tensor] = {}
    for names in together:
        group = [units[name] for name in names]
        count = kept_count(sum(unit.numel() for unit in group), keep)
        table = global_threshold(group, count, signed=True)
        if broken := int(table[2]):
            raise ValueError(f"scores: those of {names[len(names) - broken]!r} are not finite")
        masks |= zip(names, greatest_masks(group, table, signed=True), strict=True)
    if granularity == "filter":
        for name, mask in masks.items():
            shape = (-1, *[1] * (scores[name].dim() - 1))
            masks[name] = mask.view(shape).expand_as(scores[name]).clone()
    return {name: masks[name] for name in scores}


def shuffled(masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The control that keeps as many weights of each layer, but others: drawn by `generator`."""
    found = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        found[name] = mask.flatten()[order].view(mask.shape)
    return found


class Held:
    """Weights that stay zero where a mask is false, whatever an optimizer does with gradients.

    Their gradients are masked as they arrive, so momentum and weight decay of a zero stay zero.
    Usable as a context; `close` lets them go.

    Raises:
        ValueError: a mask of no parameter of the model, of another shape, on another device, or
            that is not of torch.bool.

    Example:
        >>> import torch
        >>> from taylor_kernels.methods.masks import Held
        >>> model = torch.nn.Linear(2, 1)
        >>> held = Held(model, {"weight": torch.tensor([[True, False]])})
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model.weight.grad.tolist()
        [[1.0, 0.0]]
        >>> held.close()
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        for name, mask in masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                raise ValueError(f"masks: {name!r} of shape {tuple(mask.shape)} fits no parameter")
            if mask.dtype != torch.bool or mask.device != parameters[name].device:
                raise ValueError(
                    f"masks: {name!r} is {mask.dtype} on {mask.device}; it must be torch.bool on "
                    f"{parameters[name].device}"
                )
        self.masks = dict(masks)
        self._handles: list[RemovableHandle] = []
        for name, mask in self.masks.items():
            weight = parameters[name]
            with torch.no_grad():
                weight.masked_fill_(~mask, 0)
            if weight.requires_grad:
                keep = mask  # of this turn of the loop
                hook = weight.register_hook(lambda grad, keep=keep: grad.masked_fill(~keep, 0))
                self._handles.append(hook)

    def close(self) -> None:
        """Let the gradients through again; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
