"""Mixed precision: what a GradScaler has done to the gradients that a score is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from taylor_kernels.checks import check_module
from taylor_kernels.statistics import Statistic, find_layers, held_weight
from taylor_kernels.statistics.hooks.streaming import GradientStream
from taylor_kernels.statistics.layers import filter_axis


class Scaling:
    """The scale of the gradients of a minibatch, and whether its step is one that is skipped.

    Args:
        scaler: the GradScaler of the training loop; one that is not enabled scales nothing.
        optimizers: those that it steps; empty where they are not known.

    Attributes:
        overflowed: minibatches that did not count, since the scaler skips the steps of them.

    Raises:
        TypeError: it is no GradScaler.
    """

    def __init__(
        self, scaler: GradScaler, model: nn.Module, optimizers: Sequence[Optimizer] = ()
    ) -> None:
        _check_scaler(scaler)
        self._scaler, self._model, self._optimizers = scaler, model, list(optimizers)
        self.overflowed = 0

    def use(self, optimizers: Sequence[Optimizer], scaler: GradScaler | None) -> None:
        """Go on with other optimizers, and another scaler if one is given."""
        if scaler is not None:
            _check_scaler(scaler)
            self._scaler = scaler
        self._optimizers = list(optimizers)

    def skips(self, stream: GradientStream | None = None) -> bool:
        """Whether a gradient is not finite, so that the scaler skips the step; counted.

        Args:
            stream: has freed the gradients, and noted whether they were finite.
        """
        if not self._scaler.is_enabled():
            return False
        # Once they are unscaled the scaler knows; clipping may have changed what there is since.
        found = [v for state in self._states() for v in state["found_inf_per_device"].values()]
        bad = any(bool(v) for v in found) or self._any_not_finite()
        bad = bad or (stream is not None and not stream.finite)
        self.overflowed += bad
        return bad

    def check_finite(self, statistic: Statistic, tables: Sequence[Tensor]) -> bool:
        """Whether tables are finite where no gradient of a parameter told; counted if not."""
        if not self._scaler.is_enabled() or self._gradients():
            return True
        finite = all(bool(statistic.is_finite(table)) for table in tables)
        self.overflowed += not finite
        return finite

    def of(self, statistic: Statistic, loss_scale: float) -> float:
        """What the gradients that a statistic reads were multiplied by.

        Raises:
            ValueError: a loss_scale was given too.
            RuntimeError: the optimizers have made their step, or the gradients of some of them are
                unscaled and those of others are not.
        """
        if loss_scale != 1.0:
            raise ValueError("loss_scale: the scaler gives it; leave it out")
        if not self._scaler.is_enabled():
            return 1.0
        stages = {state["stage"] for state in self._states()}
        if OptState.STEPPED in stages:
            raise RuntimeError(
                "scaler: it has made the step of this minibatch; score between backward() and "
                "scaler.step()"
            )
        reads_them_now = statistic.reads == "weight gradients" and statistic.stream is None
        if reads_them_now and OptState.UNSCALED in stages:
            if any(_gradients([one]) for one in self._unexamined()):
                raise RuntimeError(
                    "scaler: it has unscaled the gradients of one optimizer and not of another, so "
                    "they have no scale in common; call scaler.unscale_() for all optimizers, or "
                    "for none, before scoring"
                )
            return 1.0
        return float(self._scaler.get_scale())

    def _states(self) -> list[dict[str, Any]]:
        """What the scaler knows of each optimizer since its last update()."""
        states = self._scaler._per_optimizer_states
        known = [id(one) for one in self._optimizers] or list(states)
        return [states[key] for key in known if key in states]

    def _unexamined(self) -> list[Optimizer]:
        """Those, of the optimizers that are known, whose gradients the scaler has not unscaled."""
        states = self._scaler._per_optimizer_states
        return [
            one
            for one in self._optimizers
            if id(one) not in states or not states[id(one)]["found_inf_per_device"]
        ]

    def _gradients(self) -> list[Tensor]:
        if _parameters(self._optimizers):
            return _gradients(self._optimizers)
        return [p.grad for p in self._model.parameters() if p.grad is not None]

    def _any_not_finite(self) -> bool:
        """Whether a gradient is not, of those that the scaler has not looked at.

        Where the optimizers are not known it may have looked at any, and all are read.
        """
        known = bool(_parameters(self._optimizers))
        gradients = _gradients(self._unexamined()) if known else self._gradients()
        grads = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        grads = [g for g in grads if g.numel()]  # what is empty has no greatest
        if not grads:
            return False
        greatest = torch._foreach_norm(grads, float("inf"))
        device = greatest[0].device
        return not bool(torch.stack([g.to(device) for g in greatest]).isfinite().all())


def _check_scaler(scaler: object) -> None:
    if not isinstance(scaler, GradScaler):
        raise TypeError(
            f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}; without "
            "one pass loss_scale= at each minibatch"
        )


def _parameters(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p for one in optimizers for group in one.param_groups for p in group["params"]]


def _gradients(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p.grad for p in _parameters(optimizers) if p.grad is not None]


def gradient_underflow(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, float]:
    """The share of the gradients of each layer's weight that are zero though they need not be.

    Half precision loses what is below 6e-8 (float16) in backward(); a larger scale of the loss
    brings it back. Filters that are off and inputs that are zero have gradients of zero in any
    precision: whole rows and columns of zeros are left out, unless the whole weight is zeros,
    which counts as 1.

    Args:
        model: after backward().
        layers: names of layers, as those of `tk.Importance`.

    Returns:
        Layer -> a share in [0, 1]; layers without a gradient are left out.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> layer.weight.grad = torch.tensor([[1e-9, 2.0, 3.0], [1.0, 1e-9, 1.0]]).half().float()
        >>> {name: round(share, 3) for name, share in tk.gradient_underflow(layer).items()}
        {'': 0.333}
    """
    check_module(model)
    found = {}
    for name, layer in find_layers(model, layers, trainable_only=False).items():
        weight = held_weight(layer)
        if weight.grad is None or not weight.grad.numel():
            continue
        zero = (weight.grad == 0).movedim(filter_axis(layer), 0).flatten(1)
        alive = zero[~zero.all(1)]
        alive = alive[:, ~alive.all(0)] if len(alive) else alive
        found[name] = float(alive.float().mean()) if alive.numel() else 1.0
    return found
