"""Gates of residual blocks: a number for each, by which its branch is multiplied and that is
trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taylor_kernels.hooks import remove_all
from taylor_kernels.pruning.blocks import branch_output, with_branch_output
from taylor_kernels.tracing import Block
from taylor_kernels.tracing.values import Path

_MOMENTUM = 0.9


class _Scaling:
    """A hook that multiplies a branch by its gate; it belongs to the model, and is copied with
    it."""

    def __init__(self, path: Path, gate: Tensor) -> None:
        self._path, self._gate = path, gate

    def __call__(self, module: nn.Module, args: object, output: Any) -> Any:
        tensor = branch_output(output, self._path)
        return with_branch_output(output, self._path, tensor * self._gate.to(tensor.dtype))


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
        self._gates = [torch.ones((), device=device, requires_grad=True) for _ in blocks]
        self._momenta = torch.zeros(len(self._blocks), dtype=torch.float64)
        self._handles: dict[int, torch.utils.hooks.RemovableHandle] = {}
        for number, block in enumerate(blocks):
            if block.scale:
                module = model.get_submodule(block.output.module)
                hook = _Scaling(block.output.returned, self._gates[number])
                # First of all, so that masks of blocks come behind it.
                self._handles[number] = module.register_forward_hook(hook, prepend=True)

    def step(self, rate: float, strengths: Mapping[int, float]) -> None:
        """Follow the gradients that backward() has left, and shrink by rate·strength.

        Args:
            strengths: of the penalty on each block's gate; none where it is missing.
        """
        for number in self._handles:
            gate = self._gates[number]
            slope = 0.0 if gate.grad is None else float(gate.grad)
            momentum = _MOMENTUM * float(self._momenta[number]) + slope
            self._momenta[number] = momentum
            value = float(gate.detach()) - rate * momentum
            shrunk = max(abs(value) - rate * strengths.get(number, 0.0), 0.0)
            gate.data.fill_(shrunk if value > 0 else -shrunk)
        self.discard()

    def discard(self) -> None:
        """Forget the gradients."""
        for gate in self._gates:
            gate.grad = None

    def values(self, left: Sequence[int]) -> dict[str, float]:
        return {
            self._blocks[number].name: float(self._gates[number].detach())
            for number in left
            if number in self._handles
        }

    def energies(self, left: Sequence[int]) -> Tensor:
        """[n] float64: the squares of these gates; nan for a block without one."""
        held = [
            float(self._gates[n].detach()) ** 2 if n in self._handles else float("nan")
            for n in left
        ]
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
                    parameter.mul_(self._gates[number].to(parameter))
        remove_all(list(self._handles.values()))
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        gates = torch.tensor([float(gate.detach()) for gate in self._gates])
        return {"gates": gates, "momenta": self._momenta.clone(), "held": sorted(self._handles)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for gate, value in zip(self._gates, state["gates"].tolist(), strict=True):
            gate.data.fill_(value)
        self._momenta = state["momenta"].clone()
        self.keep(state["held"])
