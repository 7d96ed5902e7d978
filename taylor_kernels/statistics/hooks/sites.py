"""Gate sites: where in a model the gates of its channels stand, and the hooks on them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from taylor_kernels.hooks import Hook, ShortHook, remove_all
from taylor_kernels.statistics.hooks.products import Products

IN, OUT = "in", "out"
#: How a site is met: as what a module is given or returns; as what functional.linear is given or
#: returns where it multiplies by a parameter; as a sum over the minibatch, from that's gradient.
AT_MODULE, AT_PRODUCT, AT_GRADIENT = "module", "product", "gradient"
#: The class of a channel at a site where its gate does not stand.
ELSEWHERE = -1


@dataclass(frozen=True)
class Site:
    """A place of gates: what a module, or a product with a parameter in it, returns or is given.

    Attributes:
        module: its name.
        side: OUT or IN.
        dim: the channels' dimension, from the end; where it is met AT_GRADIENT, the parameter's.
        classes: [C] int64, the class of each channel, or ELSEWHERE. Channels of one class share a
            gate, here and at other sites.
        behind: the layers whose channels come here, with no other layer between; for messages.
        weight: the name of the parameter; "" where it is the module's own input or output.
        how: AT_MODULE, AT_PRODUCT or AT_GRADIENT.
    """

    module: str
    side: str
    dim: int
    classes: Tensor
    behind: tuple[str, ...] = ()
    weight: str = ""
    how: str = AT_MODULE

    @property
    def key(self) -> str:
        """What its table and messages name it by."""
        name = self.weight or self.module
        return name if self.side == OUT else f"{name} (input)"


@dataclass(frozen=True)
class GateSites:
    """All gate sites of some layers, in the order in which their rows add up.

    Attributes:
        sites: no two have the same key.
        layers: layer -> [F] int64, the class of each filter.
    """

    sites: tuple[Site, ...]
    layers: Mapping[str, Tensor]

    @property
    def hidden(self) -> list[str]:
        """Layers with filters whose gates stand nowhere."""
        placed = self._placed()
        return [name for name, classes in self.layers.items() if not placed[classes].all()]

    @property
    def unplaced(self) -> list[str]:
        """Of these the layers none of whose filters has a gate anywhere."""
        placed = self._placed()
        return [name for name, classes in self.layers.items() if not placed[classes].any()]

    def sites_of_layers(self) -> dict[str, list[str]]:
        """Layer -> the keys of the sites at which gates of it stand."""
        own = self._no_classes()
        found = {}
        for name, classes in self.layers.items():
            own[classes] = True
            found[name] = [site.key for site in self.sites if own[site.classes].any()]
            own[classes] = False
        return found

    def _placed(self) -> Tensor:
        """[classes] bool: those of which a gate stands anywhere."""
        placed = self._no_classes()
        for site in self.sites:
            placed[site.classes] = True
        placed[ELSEWHERE] = False
        return placed

    def _no_classes(self) -> Tensor:
        """[classes] bool, all False; the last place stands for ELSEWHERE."""
        every = [*(site.classes for site in self.sites), *self.layers.values()]
        most = max((int(classes.max()) for classes in every if classes.numel()), default=0)
        return torch.zeros(most + 2, dtype=torch.bool)


def change_at(
    model: nn.Module, site: Site, change: Callable[[Tensor], Tensor | None]
) -> list[RemovableHandle]:
    """Hooks that put change(tensor) in place of the tensor at a site, if it is not None."""
    module = model.get_submodule(site.module)
    if site.how == AT_PRODUCT:
        place = site.weight, site.side == IN
        return Products(model, {place: change}).put_on(module, scored=False)
    if site.side == IN:
        return [
            module.register_forward_pre_hook(
                lambda _, args, kwargs: _with_first(change, args, kwargs), with_kwargs=True
            )
        ]
    return [module.register_forward_hook(lambda _, __, output: change(output))]


def _with_first(
    change: Callable[[Tensor], Tensor | None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module with another first one."""
    name = "" if args else next(iter(kwargs))
    new = change(args[0] if args else kwargs[name])
    if new is None:
        return args, kwargs
    return ((new, *args[1:]), kwargs) if args else (args, kwargs | {name: new})


OnOutput = Callable[[str, Tensor], None]
OnNorm = Callable[[str, _NormBase, Tensor, Tensor], None]


class SiteHooks:
    """Hooks on all gate sites of a model that can be met while it runs.

    Args:
        on_output: called with (key, tensor) for what stands at a site.
        on_norm: called with (key, norm, its input, its output) where that is a norm's output.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], on_output: OnOutput, on_norm: OnNorm
    ) -> None:
        self._on_output = weakref.WeakMethod(on_output)
        self._on_norm = weakref.WeakMethod(on_norm)
        handles: list[RemovableHandle] = []
        self._handles = handles
        #: Behind modules: the module, the hook, and the place of its handle.
        self._behind: dict[str, tuple[nn.Module, ShortHook, int]] = {}
        at_products: dict[str, dict[tuple[str, bool], Callable[[Tensor], Tensor]]] = {}
        for site in sites:
            module = model.get_submodule(site.module)
            if site.how == AT_PRODUCT:
                change = partial(_seen, self._on_output, site.key)
                at_products.setdefault(site.module, {})[site.weight, site.side == IN] = change
            elif site.how == AT_MODULE and site.side == IN:
                hook = Hook(self._before, site.key)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            elif site.how == AT_MODULE:
                behind = ShortHook(self._after, site.key)
                self._behind[site.key] = module, behind, len(handles)
                handles.append(module.register_forward_hook(behind, with_kwargs=True))
        self._products = {name: Products(model, changes) for name, changes in at_products.items()}
        for name, products in self._products.items():
            handles += products.put_on(model.get_submodule(name), scored=True)
        self.close = weakref.finalize(self, remove_all, handles)

    def of(self, key: str) -> list[_NormBase]:
        """A site has no norm to wait for: it stands behind the last."""
        return []

    def shorten(self, key: str, way: Callable[..., bool]) -> None:
        """Ask this first behind the module at a site, from now on: whether it was all."""
        if key in self._behind:
            self._behind[key][1].short = way

    def rest(self, key: str) -> bool:
        """Take the hook behind the module at a site off, until `wake`; whether it was.

        Not where there are hooks of others, which may change what it is shown: it would come back
        behind them.
        """
        module, _, place = self._behind[key]
        if not all(isinstance(hook, ShortHook) for hook in module._forward_hooks.values()):
            return False
        self._handles[place].remove()
        return True

    def wake(self, key: str) -> None:
        """Put a hook on again that was taken off."""
        module, behind, place = self._behind[key]
        self._handles[place] = module.register_forward_hook(behind, with_kwargs=True)

    def _before(self, key: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return _with_first(partial(_seen, self._on_output, key), args, kwargs)

    def _after(
        self, key: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if isinstance(module, _NormBase):
            if (on_norm := self._on_norm()) is not None:
                on_norm(key, module, args[0] if args else kwargs["input"], output)
        elif (on_output := self._on_output()) is not None:
            on_output(key, output)


def _seen(on_output: weakref.WeakMethod[OnOutput], key: str, given: Tensor) -> Tensor:
    """What goes on in the place of a tensor that is shown."""
    # A view of its own: other readers of this tensor have gates of their own.
    view = given.view_as(given)
    if (show := on_output()) is not None:
        show(key, view)
    return view
