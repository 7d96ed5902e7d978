"""Passes: what statistics share that look at activations and at the gradients that come back."""

from __future__ import annotations

import threading
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taylor_kernels.hooks import Hook, remove_all
from taylor_kernels.shards import local_part
from taylor_kernels.statistics.base import Closure, Statistic
from taylor_kernels.statistics.hooks.cleared import Cleared
from taylor_kernels.statistics.hooks.products import leave_interrupted
from taylor_kernels.statistics.hooks.sites import AT_GRADIENT, AT_PRODUCT, ELSEWHERE
from taylor_kernels.statistics.layers import held_weight


class WatchesPasses(Statistic):
    """Counts the model's passes, and knows the layers that were called and that gradients reach.

    A call of the model begins a pass, and so does the first call of a part of it after a backward
    pass.
    """

    #: Raising the loss by a factor raises the tables by this power of it.
    power = 1
    #: Threads that run a closure; its passes are those of the meter that runs it, alone.
    in_closure: ClassVar[list[int]] = []

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        # What is looked at, by name: the layers, or the modules at the sites of their gates.
        self._watched: dict[str, nn.Module] = {**self.layers}
        if self.sites is not None:
            self._watched = {
                s.key: self.model.get_submodule(
                    s.weight.rpartition(".")[0] if s.weight else s.module
                )
                for s in self.sites.sites
            }
        of_sites = () if self.sites is None else self.sites.sites
        self._at_gradients = {s.key for s in of_sites if s.how == AT_GRADIENT}
        self._at_products = {s.key: s.weight for s in of_sites if s.how == AT_PRODUCT}
        self._handles = [self.model.register_forward_pre_hook(Hook(self._on_model))]
        self._close = weakref.finalize(self, remove_all, self._handles)
        self._pass = 0
        self._in_backward = False
        self._forgotten = True  # what the last backward pass has left, if there was one
        self._cleared = Cleared(self.model)
        self._unreached: set[str] = set()
        self._called: set[str] = set()
        self._warned = False
        self._told: set[str] = set()  # layers that were said to be out of reach

    def collect(self, *, loss_scale: float = 1.0, closure: Closure | None = None) -> list[Tensor]:
        try:
            tables = self._tables(closure)
            self.unread = self._unread_layers()
            self._cleared.check()
        finally:
            self.discard()
        self.updates += 1
        if self.unread:
            tables = [
                torch.zeros_like(table) if name in self.unread else table
                for name, table in zip(self.layers, tables, strict=True)
            ]
        scale = loss_scale**self.power
        return [table / scale for table in tables] if scale != 1.0 else tables

    @abstractmethod
    def _tables(self, closure: Closure | None) -> list[Tensor]:
        """What collect() hands over, before the loss scale is divided out; _check() comes first."""

    def _layers_at(self, keys: Collection[str]) -> list[str]:
        """The layers whose gates stand, or would stand, at these places."""
        if self.sites is None:
            return sorted(keys)
        behind = {s.key: s.behind or (s.module,) for s in self.sites.sites}
        return sorted({name for key in keys for name in behind[key]})

    def _unread_layers(self) -> frozenset[str]:
        """Layers that no gradient has reached, at any of their sites."""
        if self.sites is None or not self._unreached:
            return frozenset(self._unreached)
        reached = [s.classes for s in self.sites.sites if s.key not in self._unreached]
        read = torch.cat([torch.tensor([ELSEWHERE]), *reached])
        of_layers = self.sites.layers
        return frozenset(n for n in self.layers if not torch.isin(of_layers[n], read).any())

    def discard(self) -> None:
        self._unreached.clear()
        self._forgotten = True
        self._cleared.forget()

    def close(self) -> None:
        self._close()
        self.discard()

    def _check(self) -> None:
        """That no layer is about to be scored 0 for want of a look at it."""
        of_weights = self._unreached & self._at_gradients
        self._leave_out(
            of_weights,
            "{layers}: gates of what is made there are read off the gradients of weights that "
            "require none (frozen, or inside tk.scoring), so {so}; train them to score it",
        )
        self._leave_out(
            self._unreached - of_weights,
            "no gradient reaches the output of {layers}, because everything before is frozen, so "
            "{so}; run the pass inside tk.scoring(model), or use taylor_fo, which scores the "
            "layers that are trained",
        )
        missing = self._watched.keys() - self._called
        unseen = {name for name in missing if self._was_used(name)}
        self._unreached |= unseen
        self._leave_out(
            unseen,
            "{layers}: never called, though the weight has a gradient: other code multiplies by "
            "it, as nn.MultiheadAttention does, or the model was compiled before this meter was "
            "made, which must come first. The output cannot be seen, so {so}; gate criteria find "
            "it by example_inputs=, weight criteria need none",
        )
        missing -= unseen
        if missing and len(missing) < len(self._watched) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{', '.join(sorted(missing))}: not called in any pass with gradients so far, and "
                "scored 0 (not used, or inside a checkpoint with use_reentrant=True?)",
                stacklevel=5,
            )

    def _leave_out(self, keys: set[str], why: str) -> None:
        """Say once that there is no score of what is watched by these names; it is an error if
        that is all there is.

        Args:
            why: with places for the `layers` and for what comes of it (`so`).
        """
        if not keys:
            return
        nothing = keys >= self._called
        if not nothing and keys <= self._told:
            return
        so = "there is nothing to score" if nothing else "these layers have no score"
        message = why.format(layers=", ".join(self._layers_at(keys)), so=so)
        if nothing:
            raise RuntimeError(message)
        self._told |= keys
        warnings.warn(message, stacklevel=6)

    def _was_used(self, name: str) -> bool:
        """Whether the weight of what is watched has a gradient."""
        weight = self._weight_at(name)
        grad = None if weight is None else weight.grad
        return grad is not None and bool(local_part(grad).any())

    def _weight_at(self, name: str) -> Tensor | None:
        """The weight of a layer, or that of the product that a gate stands at."""
        if name in self.layers:
            return held_weight(self.layers[name])
        leaf = self._at_products.get(name, "").rpartition(".")[2]
        return getattr(self._watched[name], leaf, None) if leaf else None

    def _watches(self) -> bool:
        """Whether a pass that is running is one to be scored."""
        # A closure's passes belong to the meter that runs it. A checkpoint inside backward() may
        # run in a thread of autograd, which says nothing of whose pass it is.
        threads = WatchesPasses.in_closure
        elsewhere = threading.get_ident() not in threads and not (threads and inside_backward())
        return torch.is_grad_enabled() and elsewhere

    def _takes_gradients(self) -> bool:
        """Whether what flows back just now is to be scored."""
        return True

    def _on_model(self, *_: object) -> None:
        leave_interrupted(self.model)
        self._begin_pass()

    def _begin_pass(self) -> None:
        if self._in_backward and not self._forgotten and self.reads != "closure":
            self._cleared.note()
        self._pass += 1
        self._in_backward = self._forgotten = False

    def _on_call(self) -> None:
        """To be called first when a layer has run."""
        # A call after a backward pass begins a new pass, also where only a part of the model is
        # called. Inside backward() a checkpoint runs the old pass again.
        if self._in_backward and not inside_backward():
            self._begin_pass()

    def _awaits_gradient(self, name: str, output: Tensor) -> bool:
        """Whether a backward pass is to be expected at an output of this layer, or of its norm."""
        if not self._watches():
            return False
        self._called.add(name)
        if not output.requires_grad:
            self._unreached.add(name)
        return output.requires_grad


def inside_backward() -> bool:
    """Whether autograd is running, so that a forward pass is one of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def graph_is_kept() -> bool:
    """Whether the backward pass that is running leaves its graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


NOTHING_SEEN = (
    "no forward and backward pass has been seen since the last update; call it once after each "
    "loss.backward(), on the model that was handed over (not a copy, and compiled, if at all, only "
    "after the meter was made)"
)
