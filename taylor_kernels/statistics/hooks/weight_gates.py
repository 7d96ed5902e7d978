"""Slopes of gates over a minibatch, from the gradients of weights that read their channels.

A product is linear in its weight, so that Σ x·dx over all that is given of a channel is Σ g·w over
the weight's entries for that channel, however the product is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from taylor_kernels.hooks import Hook, remove_all
from taylor_kernels.ops.filter_moments import needed_moments
from taylor_kernels.statistics.hooks.sites import Site


class WeightGates:
    """Hooks on the weights at gate sites, and on the modules that multiply by them.

    Args:
        wanted: a method, called with (key, parameter) when a module is about to run; whether the
            parameter's gradient is to be read.
        take: a method, called in backward() with (key, slopes [C]).
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        wanted: Callable[[str, nn.Parameter], bool],
        take: Callable[[str, Tensor], None],
        backend: str | None,
    ) -> None:
        self._model, self._backend = model, backend
        self._wanted, self._take = weakref.WeakMethod(wanted), weakref.WeakMethod(take)
        self._known: set[tuple[str, nn.Parameter]] = set()
        self._handles = [
            model.get_submodule(site.module).register_forward_pre_hook(Hook(self._before, site))
            for site in sites
        ]
        self.close = weakref.finalize(self, remove_all, self._handles)

    def _before(self, site: Site, *_: object) -> None:
        owner, _dot, leaf = site.weight.rpartition(".")
        parameter = getattr(self._model.get_submodule(owner), leaf)
        wanted = self._wanted()
        # torch.func.functional_call puts other tensors there, whose gradients are not the model's.
        if wanted is None or not isinstance(parameter, nn.Parameter):
            return
        if not wanted(site.key, parameter) or (site.key, parameter) in self._known:
            return
        self._known.add((site.key, parameter))
        hook = Hook(self._on_gradient, site, weakref.ref(parameter))
        self._handles.append(parameter.register_hook(hook))

    def _on_gradient(self, site: Site, of: weakref.ref[nn.Parameter], grad: Tensor) -> None:
        take, parameter = self._take(), of()
        if take is None or parameter is None:
            return
        weight, grad = parameter.detach(), grad.detach()
        axis = weight.dim() + site.dim
        if axis:
            weight, grad = weight.flatten(0, axis - 1), grad.flatten(0, axis - 1)
        (moments,) = needed_moments(
            [weight], [grad], dim=min(axis, 1), moments=("gw",), backend=self._backend
        )
        take(site.key, moments[:, 0])
