"""What can be pruned in a model and what it costs, worked out on a copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from taylor_kernels.pruning.arguments import ignored_modules
from taylor_kernels.pruning.blocks import choose_blocks
from taylor_kernels.pruning.choosing.flops import FlopCount, Meter
from taylor_kernels.pruning.choosing.groups import Group, choose_groups
from taylor_kernels.pruning.copies import copied
from taylor_kernels.pruning.proof.check import sound_blocks
from taylor_kernels.pruning.proof.proof import Proof
from taylor_kernels.pruning.proof.second_choice import best_choice, best_in_stages, offer_in_stages
from taylor_kernels.pruning.proof.trial import Trial
from taylor_kernels.pruning.unscored import unscored_layers
from taylor_kernels.statistics import Layers, Statistic, bare_layer, filter_count, is_layer
from taylor_kernels.tracing import Block, Channels
from taylor_kernels.tracing.model.caches import held_tensors, modules_by_name
from taylor_kernels.tracing.run.returned import Read
from taylor_kernels.tracing.run.running import one_at_a_time
from taylor_kernels.tracing.run.shared_memory import find_shared
from taylor_kernels.tracing.tracing import traced


@dataclass(frozen=True)
class Prunable:
    """A model's groups and costs before anything is pruned.

    Attributes:
        channels: with the groups that can be pruned, and no others.
        scored: the layers whose statistics make up the scores, in the model's order.
        widths: layers that can be pruned -> filters.
        skipped: layers that cannot -> why.
        spare: all layers that the criterion can score, to be looked at where only blocks are left.
        structure: the groups in plain Python, to recognise the model by.
        blocks: residual blocks that may go; empty where none are to.
    """

    channels: Channels
    groups: list[Group]
    meter: Meter
    scored: list[str]
    widths: dict[str, int]
    skipped: dict[str, str]
    spare: list[str]
    structure: list[list[list[Any]]]
    blocks: tuple[Block, ...] = ()

    def scored_at(
        self, groups: Sequence[Group], gone: Sequence[Block], *, gates: bool
    ) -> list[str]:
        """The layers that are looked at: at gate sites one of a group stands for all.

        Args:
            gone: blocks whose layers are looked at no more.
        """
        scored, spare = (
            [n for n in names if not any(block.holds(n) for block in gone)]
            for names in (self.scored, self.spare)
        )
        if not gates or not scored:
            return scored or spare[:1]
        members = [[s.owner for s in g.producers if s.owner in scored] for g in groups]
        firsts = [names[0] for names in members if names]
        return [name for name in scored if name in firsts] or spare[:1]


def find_prunable(
    model: nn.Module,
    example_inputs: Any,
    ignore: Sequence[str | nn.Module],
    *,
    round_to: int,
    min_filters: int,
    statistic: type[Statistic] | None,
    verify: bool,
    blocks: bool = False,
    outputs: Read = None,
) -> Prunable:
    """Find, check and cost the groups. The model itself is not run.

    Args:
        statistic: what the criterion is computed from; None where no layer is scored, and weights
            that no layer holds stay.
        blocks: residual blocks may go too.
        outputs: as of `tk.trace`.

    Raises:
        ValueError: the model cannot be copied, does not run on the example inputs, an ignore entry
            matches nothing, or nothing can be pruned.
        TimeoutError, MemoryError: tracing the model takes too long, or too much.
    """
    ignored = ignored_modules(model, ignore)
    modules = modules_by_name(model)
    layers: Layers = {n: m for n, m in modules.items() if is_layer(m)}
    nothing = (
        "model: has nothing to prune (no convolution or linear layer, and no product with a "
        "parameter of its own)"
    )
    if next(model.parameters(), None) is None:
        raise ValueError(nothing)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model: TorchScript has compiled it, and its parameters take no others in their place; "
            "prune the model that it was made of, and compile what compact() returns"
        )
    plain = _copied(model)
    count = FlopCount()
    channels = traced(
        plain,
        example_inputs,
        count=count,
        blocks=blocks,
        outputs=outputs,
        shared=find_shared(modules),
    )
    for name, parts in channels.bare.items():
        layers.setdefault(name, bare_layer(model, parts))
    if not layers:
        raise ValueError(nothing)
    unscored = unscored_layers(layers, channels, plain, statistic)

    def choose(channels: Channels) -> tuple[list[Group], dict[str, str]]:
        return choose_groups(channels, layers, ignored, unscored, round_to, min_filters)

    groups, skipped = choose(channels)
    whole, offer = channels, (channels.offering(groups), groups, skipped)
    staged = offer_in_stages(channels, offer, plain, choose)
    channels, groups, skipped = staged or offer
    chosen, others = choose_blocks(channels, plain, ignored) if blocks else ([], {})
    if verify and (groups or chosen):
        # Of all runs together, so that the seconds of a proof begin when it may run.
        with one_at_a_time():
            unreached = layers.keys() - channels.layers.keys()
            train_too = bool(unreached or channels.unread or channels.trained)
            trial = Trial(plain, model, example_inputs, channels, train_too, outputs)
            chosen, found_blocks = sound_blocks(trial, chosen)
            others |= found_blocks
            found: dict[int, str] = {}
            proof = Proof(trial, plain, chosen, choose)
            if staged is None or not proof.holds(channels):
                proven = best_choice(proof.prove, whole, offer, plain, choose)
                if staged is not None:
                    proven = best_in_stages(staged, proven, proof.holds)
                (channels, groups, skipped), found = proven
            for number, reason in found.items():
                skipped |= {slot.owner: reason for slot in groups[number].producers}
            groups = [group for number, group in enumerate(groups) if number not in found]
    if blocks and not chosen:
        reasons = "; ".join(f"{name or 'model'}: {why}" for name, why in others.items())
        raise ValueError(
            "blocks: the model has no residual block that could go: no addition of a tensor and of "
            f"what a branch of layers makes of it ({reasons or 'none is there'}); leave blocks out"
        )
    if not groups and not chosen:
        reasons = "; ".join(f"{name}: {skipped[name]}" for name in layers)
        raise ValueError(f"model: has nothing to prune ({reasons})")

    owners = {slot.owner for group in groups for slot in group.producers}
    return Prunable(
        channels=channels.offering(groups),
        groups=groups,
        meter=Meter(
            plain,
            channels.macs,
            count.total,
            groups,
            {block: sum(count.of_steps[step] for step in block.steps) for block in chosen},
            channels.routed,
        ),
        scored=[
            name
            for name in layers
            if name not in unscored
            and (name in owners or any(block.holds(name) for block in chosen))
        ],
        widths={name: filter_count(layers[name]) for name in layers if name in owners},
        skipped={name: skipped[name] for name in layers if name not in owners},
        spare=[name for name in layers if name in channels.layers and name not in unscored],
        structure=[
            [[slot.owner, slot.side, *slot.index.shape] for slot in group.slots] for group in groups
        ],
        blocks=tuple(chosen),
    )


def _copied(model: nn.Module) -> nn.Module:
    # What the old weight_norm computes has a graph, which cannot be copied; it is made anew anyway.
    computed = [tensor for tensor in held_tensors(model.modules()) if not tensor.is_leaf]
    detached = {id(value): value.detach().clone() for value in computed}
    try:
        return copied(model, detached).eval()
    except Exception as error:
        raise ValueError(
            f"model: it cannot be copied to trace it ({type(error).__name__}: {error}); drop "
            "tensors that hold a graph from its attributes"
        ) from error
