"""What the pruner makes of a network: how much it can prune, and whether the result is right."""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

import taylor_kernels as tk
from taylor_kernels.tracing.run.returned import returned_tensors
from taylor_kernels.tracing.run.running import call


@dataclass(frozen=True)
class Verdict:
    """What came of pruning a network.

    Attributes:
        layers: convolution and linear layers, and weights that no layer holds.
        prunable: those of them that filters can be removed from.
        flops: fraction of the layers' multiply-adds that these take.
        reasons: why the rest cannot -> how many layers; numbers in names are dropped.
        left: fraction of the parameters that is left.
        reached: the target is met.
        error: of the removed network's outputs, relative to the greatest output of the masked one.
    """

    layers: int
    prunable: int
    flops: float
    reasons: dict[str, int]
    left: float
    reached: bool
    error: float

    @property
    def share(self) -> float:
        return self.prunable / self.layers


def layers(model: nn.Module) -> list[str]:
    """Names of all layers with filters; GPT-2 has its own class of linear layer."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear)) or type(module).__name__ == "Conv1D"
    ]


def reasons(model: nn.Module, pruner: tk.Pruner) -> dict[str, int]:
    """Why layers cannot be pruned -> how many, most frequent first."""
    found = Counter(
        re.sub(r"\d+", "#", pruner.skipped.get(name, "is not seen as a layer"))
        for name in dict.fromkeys((*layers(model), *pruner.skipped))
        if name not in pruner.widths
    )
    return dict(found.most_common())


def flops_share(pruner: tk.Pruner) -> float:
    """The part of the multiply-adds of all weights that the layers take that can be pruned."""
    macs = pruner._prunable.channels.macs
    can = sum(
        count
        for name, count in macs.items()
        if not {name, *_holders(name)}.isdisjoint(pruner.widths)
    )
    return can / sum(macs.values())


def _holders(name: str) -> tuple[str, str]:
    """The module that holds a parameter, and the layer whose weight it is if a parametrization
    (`weight_norm`, `orthogonal`) works that out."""
    return name.rpartition(".")[0], name.partition(".parametrizations.")[0]


#: Names of what a model returns that others read; None for all.
Read = tuple[str, ...] | None


def outputs(model: nn.Module, inputs: Any, read: Read = None) -> list[Tensor]:
    """The floating-point tensors that a model returns to its caller."""
    found = returned_tensors(model, inputs, call(model, inputs), read)
    return [t for t in found if t.is_floating_point()]


def loss(model: nn.Module, inputs: Any, read: Read = None) -> Tensor:
    """A loss with gradients of every sign at every output."""
    total = torch.zeros(())
    for out in outputs(model, inputs, read):
        target = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        total = total + (out - target).square().mean()
    return total


def batch(inputs: Any, size: int = 2) -> Any:
    """Other inputs of the same kind, `size` of them."""

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        many = torch.cat([value] * size)
        if many.is_floating_point():
            return torch.randn_like(many)
        return many[torch.randperm(len(many))].roll(1, -1) if many.dim() > 1 else many

    return tree_map(other, inputs)


def in_double(model: nn.Module, inputs: Any, read: Read = None) -> list[Tensor]:
    """What a float64 copy of the model returns in eval mode."""
    twin = copy.deepcopy(model).double().eval()

    def double(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating else value

    with torch.no_grad():
        return outputs(twin, tree_map(double, inputs), read)


def distance(before: list[Tensor], after: list[Tensor]) -> float:
    """Greatest difference, relative to the greatest output."""
    scale = max(float(one.abs().max()) for one in before)
    return max(
        float((one - other).abs().max()) for one, other in zip(before, after, strict=True)
    ) / max(scale, 1e-30)


def new_pruner(
    model: nn.Module,
    inputs: Any,
    params: float,
    criterion: str = "taylor_fo",
    read: Read = None,
) -> tuple[tk.Pruner, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    pruner = tk.Pruner(
        model,
        inputs,
        criterion,
        params=params,
        every=1,
        per_step=0.15,
        optimizer=optimizer,
        outputs=read,
    )
    return pruner, optimizer


def prune(
    model: nn.Module,
    inputs: Any,
    pruner: tk.Pruner,
    optimizer: torch.optim.Optimizer,
    read: Read = None,
) -> Verdict:
    """Train and prune to the target, remove what is masked, train one step more.

    Raises:
        AssertionError: training does not go on as it should.
    """
    before = reasons(model, pruner), len(pruner.widths), flops_share(pruner)
    known = {*layers(model), *pruner.widths, *pruner.skipped}
    model.train()
    for _ in range(40):
        if pruner.done:
            break
        _train(model, batch(inputs), optimizer, pruner, read)
    fresh = batch(inputs)
    with torch.no_grad():
        model.eval()
        call(model, fresh)  # whatever the optimizer has written into masked entries is undone
    masked = in_double(model, fresh, read)
    pruner.compact()
    error = distance(masked, in_double(model, fresh, read))

    _train(model.train(), fresh, optimizer, read=read)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}, "the optimizer holds other parameters"
    for parameter in model.parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        assert parameter.isfinite().all(), "a parameter is not finite after a step"
        assert momentum is None or momentum.shape == parameter.shape, "momentum was not cut"
    whole, cost = pruner.whole.params, pruner.cost.params
    return Verdict(
        layers=len(known),
        prunable=before[1],
        flops=before[2],
        reasons=before[0],
        left=cost / whole,
        reached=pruner.done,
        error=error,
    )


def check_all_but(left: list[str], model: nn.Module, inputs: Any) -> None:
    """All layers but these lose filters, to a target, and what is removed is what was masked."""
    pruner, optimizer = new_pruner(model, inputs, 0.6)
    assert list(pruner.skipped) == left
    verdict = prune(model, inputs, pruner, optimizer)
    assert verdict.reached
    assert verdict.error < 1e-12


def check_file(model: nn.Module, inputs: Tensor, path: Path) -> None:
    """A fresh model cut by the file of a pruned one returns what that one does."""
    fresh = copy.deepcopy(model)
    pruner = tk.Pruner(model, inputs, "magnitude_l2", params=0.6, every=1)
    while not pruner.done:
        pruner.step()
    pruner.compact()
    tk.save_pruned(path, pruner)
    loaded = tk.load_pruned(fresh, path)
    assert torch.equal(loaded.eval()(inputs), model.eval()(inputs))


def _train(
    model: nn.Module,
    inputs: Any,
    optimizer: torch.optim.Optimizer,
    pruner: Any = None,
    read: Read = None,
) -> None:
    optimizer.zero_grad()
    loss(model, inputs, read).backward()
    if pruner is not None:
        pruner.step()
    optimizer.step()
