"""Residual blocks of a pruner: which may go, how one is held at zero, and how it is removed."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.hooks import forget_compiled, remove_all
from taylor_kernels.pruning.removing.optimizer_state import optimizers_in
from taylor_kernels.tracing import Block, Channels
from taylor_kernels.tracing.blocks import replace_modules
from taylor_kernels.tracing.notes.values import Path


def choose_blocks(
    channels: Channels, model: nn.Module, ignored: Collection[str]
) -> tuple[list[Block], dict[str, str]]:
    """The blocks of a traced model that may go, and module -> reason for the others.

    Args:
        ignored: modules that stay, and so the blocks that they are in.
    """
    blocks, others = channels.find_blocks(model)
    chosen = []
    for block in blocks:
        kept = sorted(block.modules & set(ignored))
        if kept:
            others[block.name] = f"{kept[0]!r} is ignored"
        else:
            chosen.append(block)
    return chosen, others


class BlockMasks:
    """Blocks whose branches add zeros: the module that gives a branch's output returns zeros.

    The branch is still computed, and nothing of it is passed on, in neither direction: where it
    overflows, zero times its infinities would be nan. Its parameters have gradients of zero, so
    that those who wait for all gradients go on. Copies of the model add zeros too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._masked: list[Block] = []

    def set(self, blocks: Sequence[Block]) -> None:
        """Mask exactly these."""
        if list(blocks) == self._masked:
            return
        self.close()
        self._masked = list(blocks)
        self._handles += [mask_block(self._model, block) for block in blocks]
        forget_compiled()

    def close(self) -> None:
        remove_all(self._handles)
        self._handles.clear()
        self._masked = []


def mask_block(model: nn.Module, block: Block) -> torch.utils.hooks.RemovableHandle:
    """Let the branch of a block add zeros, until the hook is taken off."""
    module = model.get_submodule(block.output.module)
    held = [part for name, part in model.named_modules() if name in block.modules]
    return module.register_forward_hook(Zeroing(block.output.returned, held))


class Zeroing:
    """A hook that makes a branch add zeros; it belongs to the model, and is copied with it.

    Args:
        path: where in its module's output the branch's tensor is.
        held: the modules of the block.
    """

    def __init__(self, path: Path, held: Sequence[nn.Module]) -> None:
        self._path, self._held = path, tuple(held)

    def __call__(self, module: nn.Module, args: object, output: Any) -> Any:
        own = [p for part in self._held for p in part._parameters.values()]
        trained = dict.fromkeys(p for p in own if p is not None and p.requires_grad)
        zeros = _Nothing.apply(branch_output(output, self._path).detach(), *trained)
        return with_branch_output(output, self._path, zeros)


class _Nothing(torch.autograd.Function):
    """Zeros like a tensor, whatever is in it, and gradients of zeros for parameters."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return torch.zeros_like(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *map(torch.zeros_like, ctx.parameters)


def branch_output(output: Any, path: Path) -> Tensor:
    """The branch's tensor in what a module has returned."""
    return output[path[0]] if path else output


def with_branch_output(output: Any, path: Path, tensor: Tensor) -> Any:
    """What a module has returned, with another tensor in the place of the branch's."""
    if not path:
        return tensor
    return type(output)([tensor if n == path[0] else part for n, part in enumerate(output)])


def remove_blocks(model: nn.Module, blocks: Sequence[Block], optimizer: object = None) -> None:
    """Remove blocks from a model, in place; their parameters leave the optimizers with their state.

    Args:
        optimizer: one, or a sequence of them.
    """
    before = set(model.parameters())
    for block in blocks:
        replace_modules(model, block.places)
    gone = before - set(model.parameters())
    for one in optimizers_in(optimizer):
        for group in one.param_groups:
            stays = [p not in gone for p in group["params"]]
            for key in ("params", "param_names"):
                if group.get(key):
                    group[key] = list(itertools.compress(group[key], stays))
        for parameter in gone:
            one.state.pop(parameter, None)
