"""Weights of which a value is stored: written as that projects, or rounded to their levels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from taylor_kernels.methods.mirror_values import Call, Quantized
from taylor_kernels.methods.packed import save_packed


class Rounding(Optimizer):
    """An optimizer that stores a value of some parameters, in their state, and rounds them.

    A group says whether its weights are `rounded` now, and with which `levels` and `beta`.
    """

    _backend: str | None

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Within it the weights are the nearest levels; after it they are what they were.

        That undoes a `quantize` within it, too. Groups that are added within it stay as they are.

        Example:
            >>> import torch
            >>> import taylor_kernels as tk
            >>> layer = torch.nn.Linear(3, 3)
            >>> optimizer = tk.methods.MirrorDescent(layer.parameters())
            >>> with optimizer.rounded():
            ...     print(layer.weight.abs().unique())
            tensor([1.], grad_fn=<Unique2Backward0>)
        """
        before = [(group, group["rounded"]) for group in self.param_groups]
        self._project(rounded=True)
        try:
            yield
        finally:
            for group, was in before:
                group["rounded"] = was
            self._project()

    def quantize(self, evaluate: Callable[[], Any] | None = None) -> Quantized:
        """Round the weights to their levels, and report what that does.

        Args:
            evaluate: gives the accuracy of the model as it is; called before and after.

        Returns:
            A `Quantized`: the accuracy of soft and of rounded weights, and how far apart they were.
            A later `step` goes on from x̃, with projected weights again.
        """
        soft = evaluate() if evaluate else None
        before = [(p, state["scale"], p.detach().clone()) for _, p, state in self._quantized()]
        for group in self.param_groups:
            group["rounded"] = True
        self._project()
        count = sum(old.numel() for _, _, old in before)
        distance, zeros = 0.0, 0
        for param, scale, old in before:
            distance += float((param.detach() - old).abs().sum(dtype=torch.float64)) / scale
            zeros += int((param.detach() == 0).sum())
        hard = evaluate() if evaluate else None
        return Quantized(soft, hard, distance / max(count, 1), count, zeros)

    def export(self, model: nn.Module, path: str | os.PathLike[str]) -> int:
        """Write a model to a safetensors file, its rounded weights in 1 or 2 bits each.

        `load_packed` reads it. The model is left as it is.

        Returns:
            The bytes of the file.

        Raises:
            ValueError: a parameter that is quantized here is none of the model's.
        """
        binary = {param: group["levels"] == "binary" for group, param, _ in self._quantized()}
        with self.rounded():
            return save_packed(model, binary, path)

    @torch.no_grad()
    def _project(self, *, rounded: bool = False) -> None:
        """Write all quantized weights: rounded, or as each group is."""
        call = Call()
        for group, param, state in self._quantized():
            call.project(group, param, state, group["beta"], rounded or group["rounded"])
        call.run(self._backend)

    def _quantized(self) -> Iterator[tuple[dict[str, Any], Tensor, Any]]:
        """(group, parameter, state) of the parameters that a value is stored of."""
        for group in self.param_groups:
            for param in group["params"]:
                if "value" in self.state[param]:
                    yield group, param, self.state[param]
