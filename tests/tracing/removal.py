"""Masking and removal by the recipe of `Channels`, and their comparison in float64."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from taylor_kernels.tracing import Channels, follow_attention
from taylor_kernels.tracing.notes.across import Kept
from taylor_kernels.tracing.run.running import call, tensors_in


def lookup(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def on_kept(model: nn.Module, channels: Channels, dead: Sequence[Tensor]) -> None:
    """Run the norms across channels as they run once the dead units are removed, and add zeros."""
    assert not channels.kept_by_called_norms(dead), "test_called_norms.py has these"
    small = removed(model, channels, dead)
    for name, kept in channels.kept_by_norms(dead).items():

        def forward(norm: nn.Module, kept: Kept, x: Tensor) -> Tensor:
            found = norm(x.index_select(kept.dim, kept.places))
            if not kept.returned:
                return found
            return torch.zeros_like(x).index_copy(kept.dim, kept.places, found)

        model.get_submodule(name).forward = partial(forward, small.get_submodule(name), kept)


def masked(model: nn.Module, channels: Channels, dead: Sequence[Tensor]) -> nn.Module:
    """A copy with the entries of the dead units set to what masks them."""
    model = copy.deepcopy(model)
    on_kept(model, channels, dead)
    for name, dims in channels.entries(dead).items():
        module, leaf = lookup(model, name)
        fills = {dim: channels.fills.get(name, {}).get(dim, 0.0) for dim in dims}
        for dim in sorted(dims, key=lambda dim: -fills[dim]):
            getattr(module, leaf).data.index_fill_(dim, dims[dim], fills[dim])
    return model


def removed(model: nn.Module, channels: Channels, dead: Sequence[Tensor]) -> nn.Module:
    """A copy without the entries of the dead units."""
    model = copy.deepcopy(model)
    aliases: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                aliases.setdefault(id(tensor), []).append((module, leaf))
    for name, dims in channels.entries(dead).items():
        module, leaf = lookup(model, name)
        old = getattr(module, leaf)
        new = old.data
        for dim, index in dims.items():
            keep = torch.ones(new.size(dim), dtype=torch.bool)
            keep[index] = False
            new = new.index_select(dim, keep.nonzero().flatten())
        for owner, own in aliases[id(old)]:
            setattr(owner, own, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    modules = dict(model.named_modules())
    for name, values in channels.attributes(dead).items():
        follow_attention(modules, name)
        for attribute, value in values.items():
            setattr(model.get_submodule(name), attribute, value)
    return model


def noisy(model: nn.Module, inputs: Any, seed: int = 0) -> tuple[nn.Module, Any]:
    """A float64 copy in eval mode with noise on every value, and inputs to match."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).double().eval()

    def noise(like: Tensor) -> Tensor:
        return (torch.rand(like.shape, generator=generator) - 0.5).to(like.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.add_(noise(parameter), alpha=2 * max(fan_in, 1) ** -0.5)

    def double(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().double()
            return value + noise(value)
        return value

    return model, tree_map(double, inputs)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return list(tensors_in(call(model, tree_map(lambda v: v, inputs))))


def none_dead(channels: Channels) -> list[Tensor]:
    return [torch.zeros(group.size, dtype=torch.bool) for group in channels.groups]


def wrong(model: nn.Module, inputs: Any, channels: Channels, dead: Sequence[Tensor]) -> str:
    """What is wrong with removing the dead units of a float64 model; "" if nothing."""
    before = outputs(masked(model, channels, dead), inputs)
    try:
        after = outputs(removed(model, channels, dead), inputs)
    except Exception as error:
        return f"does not run: {type(error).__name__}: {error}"
    for one, other in zip(before, after, strict=True):
        if one.shape != other.shape:
            return f"shape {tuple(one.shape)} becomes {tuple(other.shape)}"
        if one.is_floating_point():
            scale = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
            if not torch.allclose(
                one, other, rtol=0, atol=1e-9 * max(scale, 1e-30), equal_nan=True
            ):
                gap = float((one - other).abs().max()) / max(scale, 1e-30)
                return f"differs by {gap:.2g}"
    return ""


def faults(
    model: nn.Module, inputs: Any, channels: Channels, *, draws: int = 3, every: bool = True
) -> list[str]:
    """Each group's faults: every unit alone (or the first, middle and last), and random sets."""
    found = list(channels._record.failures)  # a rule that fails is safe, and a fault all the same
    model, inputs = noisy(model, inputs)
    draw = random.Random(0)

    def check(dead: Sequence[Tensor], text: str) -> bool:
        if fault := wrong(model, inputs, channels, dead):
            found.append(f"{text}: {fault}")
        return bool(fault)

    for number, group in enumerate(channels.groups):
        units = range(group.size) if every else sorted({0, group.size // 2, group.size - 1})
        sets = [[unit] for unit in units]
        sets += [
            draw.sample(range(group.size), draw.randint(1, group.size - 1)) for _ in range(draws)
        ]
        for chosen in sets:
            dead = none_dead(channels)
            dead[number][chosen] = True
            if check(dead, f"group {group.name!r} of {group.size}, units {chosen[:8]}"):
                break
    for _ in range(draws):
        dead = none_dead(channels)
        for mask in dead:
            mask[draw.sample(range(mask.numel()), draw.randint(0, mask.numel() - 1))] = True
        check(dead, "all groups together")
    return found
