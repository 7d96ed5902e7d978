"""Groups of weights that are scaled for a while, or zero for good whatever an optimizer does."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from taylor_kernels.hooks import Hook, remove_all
from taylor_kernels.methods.spp_groups import Switched


class Switches:
    """Switches of groups; those that are gone are zeroed after every step of any optimizer."""

    def __init__(self, groups: Sequence[Switched]) -> None:
        self._groups = groups
        self._gone: list[tuple[Switched, Tensor]] = []
        self._inside = False
        self._hooks = [register_optimizer_step_post_hook(Hook(self._on_step))]
        # The hook is on all optimizers, and would outlive this.
        weakref.finalize(self, remove_all, self._hooks)

    @contextmanager
    def scaled(self, factors: Sequence[Tensor]) -> Iterator[None]:
        """Weights times the [n] factors of their groups, inside; bit for bit back behind it.

        Raises:
            RuntimeError: they are scaled already.
        """
        if self._inside:
            raise RuntimeError("masked() and evaluated() cannot be inside one another")
        parameters = list(self._parameters().values())
        backup = [p.detach().clone(memory_format=torch.preserve_format) for p in parameters]
        self._inside = True
        try:
            for each, factor in zip(self._groups, factors, strict=True):
                each.scale(factor)
            yield
        finally:
            for parameter, before in zip(parameters, backup, strict=True):
                parameter.data.copy_(before)
            self._inside = False

    def hold(self, gone: Sequence[Tensor]) -> list[int]:
        """Take [n] bool of each for the groups that are gone; how many these are of each.

        Counted once for each change: an optimizer's step neither searches nor waits for a GPU.
        """
        counts = [int(mask.sum()) for mask in gone]
        self._gone = [
            (each, mask) for each, mask, n in zip(self._groups, gone, counts, strict=True) if n
        ]
        return counts

    def zero(self) -> None:
        """Zero the weights of groups that are gone."""
        for each, gone in self._gone:
            each.erase(gone)

    def close(self) -> None:
        """Let optimizers do what they do."""
        remove_all(self._hooks)
        self._hooks.clear()

    def _parameters(self) -> dict[int, Tensor]:
        return {id(p): p for each in self._groups for p in each.parameters}

    def _on_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not self._inside:
            self.zero()
            return
        mine = self._parameters()
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                "optimizer.step() inside masked(), which undoes its changes; call it behind the "
                "with block"
            )
