"""What hooks do in most passes, in as little code as may be.

Between two layers nothing of this package is in the caches of a processor, and each function that
is called there takes ten times what it takes in a loop. So what needs no looking at is put aside
here, and made something of when the pass is over. A hook that meets anything else, or anything for
the first time, goes the long way (`SiteHooks`). Conditions stand where they are asked for: a
function of them would double what a short way takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.statistics.hooks.passes import WatchesPasses

#: Elements of an output that is small: its copy, and its gradient, are held until the pass is over.
SMALL = 1 << 15
_gradients_on, _tracing = torch.is_grad_enabled, torch._C._get_tracing_state
_keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


class Steady:
    """What the short ways of a statistic's hooks share; it holds neither statistic nor model.

    Attributes:
        on: whether they may be gone.
        pass_: the number of the pass.
        last_run: of norms, the pass and the key of the site.
        read: norms whose scale and shift are read in this update, and the key of the site.
        arrived: (key, y, dy) of small outputs, as gradients come.
    """

    def __init__(self) -> None:
        self.on = False
        self.pass_ = 0
        self.last_run: dict[_NormBase, tuple[int, str | None]] = {}
        self.read: dict[_NormBase, str] = {}
        self.arrived: list[tuple[str, Tensor, Tensor]] = []


def counts_runs(
    shared: Steady, key: str, norm: _NormBase
) -> Callable[[nn.Module, Any, Any, Tensor], bool]:
    """The short way behind a norm whose scale and shift are read: it has run, once in this pass."""
    scale, shift = norm.weight, norm.bias

    def has_run(norm: Any, args: Any, kwargs: Any, output: Tensor) -> bool:
        held = norm._parameters
        if (
            not shared.on
            or not _gradients_on()
            or WatchesPasses.in_closure
            or _tracing() is not None
            or shared.last_run.get(norm, (shared.pass_,))[0] == shared.pass_
            or held["weight"] is not scale
            or held["bias"] is not shift
            or not scale.requires_grad
            or not shift.requires_grad
        ):
            return False
        shared.last_run[norm] = shared.pass_, key
        shared.read[norm] = key
        return True

    return has_run


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
