"""Gates of residual blocks: a number for each, by which its branch is multiplied and that is
trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.hooks import remove_all
from taylor_kernels.pruning.blocks import branch_output, with_branch_output
from taylor_kernels.tracing import Block
from taylor_kernels.tracing.notes.values import Path

_MOMENTUM = 0.9


class _Scaling:
    """A hook that multiplies a branch by its gate; it belongs to the model, and is copied with
    it."""

    def __init__(self, path: Path, gates: Tensor, number: int) -> None:
        self._path, self._gates, self._number = path, gates, number

    def __call__(self, module: nn.Module, args: object, output: Any) -> Any:
        tensor = branch_output(output, self._path)
        scaled = tensor * self._gates[self._number].to(tensor.dtype)
        return with_branch_output(output, self._path, scaled)


class BlockGates:
    """One gate for each block whose branch ends in a layer or norm that can take it in.

    They begin at 1 and follow plain gradient descent with momentum, and a soft threshold. They are
    no parameters of the model, which a copy of it would share; a copy has gates of its own.

    Args:
        blocks: those of the model, as it was at first.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._model, self._blocks = model, list(blocks)
        device = next(model.parameters()).device
        self.gates = torch.ones(len(self._blocks), device=device, requires_grad=True)
        self._momenta = torch.zeros(len(self._blocks), device=device)
        self._handles: dict[int, torch.utils.hooks.RemovableHandle] = {}
        for number, block in enumerate(blocks):
            if block.scale:
                module = model.get_submodule(block.output.module)
                hook = _Scaling(block.output.returned, self.gates, number)
                # First of all, so that masks of blocks come behind it.
                self._handles[number] = module.register_forward_hook(hook, prepend=True)

    @torch.no_grad()
    def step(self, rate: float, strengths: Sequence[float], loss_scale: float) -> None:
        """Follow the gradients that backward() has left, and shrink by rate·strength.

        Args:
            strengths: of the penalty on each block's gate.
            loss_scale: what the loss was multiplied by.
        """
        if not self._handles:
            return
        self._momenta.mul_(_MOMENTUM)
        if self.gates.grad is not None:
            self._momenta.add_(self.gates.grad, alpha=1 / loss_scale)
        moved = self.gates - rate * self._momenta
        shrunk = moved.abs() - rate * torch.tensor(strengths).to(moved)
        self.gates.copy_(moved.sign() * shrunk.clamp_min(0))
        self.discard()

    def discard(self) -> None:
        """Forget the gradients."""
        self.gates.grad = None

    def values(self, left: Sequence[int]) -> dict[str, float]:
        now = self.gates.tolist()
        return {self._blocks[n].name: now[n] for n in left if n in self._handles}

    def energies(self, left: Sequence[int]) -> Tensor:
        """[n] float64: the squares of these gates; nan for a block without one.

        Raises:
            RuntimeError: one is not finite.
        """
        now = self.gates.tolist()
        for name, gate in self.values(left).items():
            if not math.isfinite(gate):
                raise RuntimeError(f"{name}: its gate is {gate}, so nothing was pruned")
        held = [now[n] ** 2 if n in self._handles else float("nan") for n in left]
        return torch.tensor(held, dtype=torch.float64)

    def keep(self, left: Sequence[int]) -> None:
        """Take the gates of all others off the model."""
        for number in self._handles.keys() - set(left):
            self._handles.pop(number).remove()

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the layers that the branches end in by their gates, and take these off."""
        for number in list(self._handles):
            module = self._model.get_submodule(self._blocks[number].scale)
            for leaf in ("weight", "bias"):
                parameter = getattr(module, leaf, None)
                if parameter is not None:
                    parameter.mul_(self.gates[number].to(parameter))
        remove_all(list(self._handles.values()))
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        gates, momenta = (part.detach().cpu().clone() for part in (self.gates, self._momenta))
        return {"gates": gates, "momenta": momenta, "held": sorted(self._handles)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gates.data.copy_(state["gates"])
        self._momenta.copy_(state["momenta"])
        self.keep(state["held"])
