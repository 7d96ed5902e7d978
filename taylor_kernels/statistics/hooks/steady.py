"""What hooks do in most passes, in as little code as may be.

Between two layers nothing of this package is in the caches of a processor, and each function that
is called there takes ten times what it takes in a loop. So what needs no looking at is put aside
here, and made something of when the pass is over. A hook that meets anything else, or anything for
the first time, goes the long way (`SiteHooks`). Conditions stand where they are asked for: a
function of them would double what a short way takes. Most norms need no hook at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.hooks import forget_compiled
from taylor_kernels.ops.gate_gradients import gate_gradients
from taylor_kernels.statistics.hooks.gate_tables import Packed
from taylor_kernels.statistics.hooks.passes import WatchesPasses
from taylor_kernels.statistics.hooks.sites import Site, SiteHooks

#: Elements of an output that is small: its copy, and its gradient, are held until the pass is over.
SMALL = 1 << 15
_gradients_on, _tracing = torch.is_grad_enabled, torch._C._get_tracing_state
_keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


class Steady:
    """What the short ways of a statistic's hooks share; it holds neither statistic nor model.

    Attributes:
        on: whether they may be gone.
        arrived: (key, y, dy) of small outputs, as gradients come.
    """

    def __init__(self) -> None:
        self.on = False
        self.arrived: list[tuple[str, Tensor, Tensor]] = []


class RestingNorms:
    """Norms whose scale and shift are read, and whose outputs nothing looks at.

    With y = γ x̂ + β the sum of y·dy over all runs of a norm is γ g_γ + β g_β, however many there
    are. What is left to see is whether both are still the parameters that gradients come of, which
    is asked when a pass begins.

    Attributes:
        names: of each norm the key of its site.
    """

    def __init__(self, hooks: SiteHooks) -> None:
        self.names: dict[_NormBase, str] = {}
        self._hooks = hooks
        self._read: dict[_NormBase, tuple[nn.Parameter, nn.Parameter]] = {}
        self._restless: set[_NormBase] = set()

    def add(self, norms: Mapping[_NormBase, str]) -> None:
        """Take the hooks behind these off; but not where they have been missed before."""
        for norm, key in norms.items():
            if norm not in self._restless and self._hooks.rest(key):
                self.names[norm], self._read[norm] = key, (norm.weight, norm.bias)

    def replaced(self) -> list[_NormBase]:
        """Those whose scale or shift is another tensor now."""
        return [
            norm
            for norm, (scale, shift) in self._read.items()
            if (held := norm._parameters).get("weight") is not scale
            or held.get("bias") is not shift
        ]

    def wake_changed(self) -> None:
        """Let hooks see those again whose scale or shift is replaced or frozen, from now on."""
        frozen = [
            norm
            for norm, (scale, shift) in self._read.items()
            if not (scale.requires_grad and shift.requires_grad)
        ]
        changed = {*self.replaced(), *frozen}
        self._restless.update(changed)
        self.wake(changed)

    def wake_silent(self, keys: Collection[str]) -> None:
        """Let hooks see those again whose sites are none of these, of which gradients have come.

        Such a norm has not run; or it was lent other parameters, as by torch.func.functional_call
        on a part of the model.
        """
        silent = [norm for norm, key in self.names.items() if key not in keys]
        self._restless.update(silent)
        self.wake(silent)

    def wake(self, norms: Iterable[_NormBase] | None = None) -> None:
        """Put the hooks behind these, or all of them, on again."""
        woken = list(self.names if norms is None else norms)
        for norm in woken:
            self._hooks.wake(self.names.pop(norm))
            del self._read[norm]
        if woken:
            forget_compiled()


def keeps_small(shared: Steady, key: str) -> Callable[[nn.Module, Any, Any, Tensor], bool]:
    """The short way at an output: if it is small, a copy of it is kept for its gradient."""

    def has_run(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> bool:
        if (
            type(output) is not Tensor
            or output.numel() > SMALL
            or not output.requires_grad
            or not shared.on
            or not _gradients_on()
            or WatchesPasses.in_closure
            or _tracing() is not None
        ):
            return False
        y: Tensor | None = output.detach().clone()

        def on_gradient(dy: Tensor) -> None:
            nonlocal y
            if y is None:
                raise RuntimeError(f"{key}: backward() ran twice over a graph it had freed")
            shared.arrived.append((key, y, dy))
            if not _keeps_graph():
                y = None  # the graph may outlive this pass

        output.register_hook(on_gradient)
        return True

    return has_run


def gates_of_small(shared: Steady, at: Mapping[str, Site], backend: str | None) -> Iterator[Packed]:
    """What has arrived, reduced: outputs of one position each, as of a squeezed image, in one call.

    Args:
        at: the sites by their keys.
    """
    alike: dict[object, list[tuple[str, Tensor, Tensor]]] = {}
    times: dict[str, int] = {}
    for key, y, dy in shared.arrived:
        dim = y.dim() + at[key].dim
        if dim == 0:  # no batch
            y, dy, dim = y.unsqueeze(0), dy.unsqueeze(0), 1
        shape = y.shape
        if dim == 1 and y.numel() == shape[0] * shape[1]:
            times[key] = number = times.get(key, 0) + 1
            kind: object = (number, shape[0], shape[2:], y.dtype, y.device)
            alike.setdefault(kind, []).append((key, y, dy))
        else:
            alike[len(alike)] = [(key, y.movedim(dim, 1), dy.movedim(dim, 1))]
    shared.arrived.clear()
    for some in alike.values():
        keys, ys, dys = zip(*some, strict=True)
        y, dy = (ys[0], dys[0]) if len(some) == 1 else (torch.cat(ys, 1), torch.cat(dys, 1))
        sizes = tuple(one.size(1) for one in ys)
        yield Packed(keys, sizes, gate_gradients(y, dy, backend=backend).sum(0))
