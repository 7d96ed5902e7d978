"""Both sides of a module's output: y from the forward pass and dy from the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from taylor_kernels.statistics.hooks.passes import graph_is_kept

# What later code does to a module's output before backward() comes. The first pass finds it out; a
# later pass may raise the number, never lower it.
_UNTOUCHED = 0
_HARMLESS = 1  # the output is changed in place, but only where dy is 0, as by a ReLU
_OVERWRITTEN = 2  # its values are gone by the time of backward(), so a copy is needed


class Captures:
    """Captures outputs and their gradients.

    An output that later code overwrites before backward() must be copied. To find out which, the
    first pass copies every output and compares it in backward(). A ReLU in place sets outputs to
    zero, but their gradients are zero too, so y·dy is the same without a copy; after a sum in place
    it is not.
    """

    def __init__(self) -> None:
        self._fate: dict[Hashable, int] = {}
        self._open: dict[int, tuple[weakref.ref[Tensor], RemovableHandle]] = {}

    def add(
        self,
        name: str,
        place: Hashable,
        output: Tensor,
        receive: Callable[[Tensor, Tensor], None],
        lost: Callable[[], None],
        *,
        copy: bool = True,
    ) -> None:
        """Call receive(y, dy) when the gradient of `output` is there, y as it is now.

        Args:
            place: what the output's fate is remembered by.
            lost: called before the error that y was changed in place and is gone.
            copy: keep a copy while the output's fate is unknown. False where the capture will most
                likely be cancelled.
        """
        fate = self._fate.get(place)
        keep = copy if fate is None else fate == _OVERWRITTEN
        kept = output.detach().clone() if keep else None
        alias: Tensor | None = output.detach()
        version = output._version

        def on_gradient(dy: Tensor | None) -> None:
            nonlocal alias, kept
            if dy is None:
                raise RuntimeError(
                    f"{name}: what reads its output passes no gradient back, as a quantised layer; "
                    "use a criterion that reads weights alone, such as magnitude_l2, or leave the "
                    "layer out (ignore= of a pruner, layers= of an importance)"
                )
            if alias is None:
                raise RuntimeError(f"{name}: backward() ran twice over a graph it had freed")
            changed = alias._version != version
            if kept is not None:
                self._learn(place, alias, kept, dy, changed)
            elif changed and self._fate.get(place) != _HARMLESS:
                self._fate[place] = _OVERWRITTEN
                lost()
                raise RuntimeError(
                    f"{name}: its output was changed in place in this pass, though not in those "
                    "before, and its values are gone; run the pass again (a copy is kept from now "
                    "on)"
                )
            receive(alias if kept is None else kept, dy)
            if not graph_is_kept():
                alias = kept = None  # the graph may outlive this pass; the activation must not

        self._open[id(output)] = (weakref.ref(output), output.register_hook(on_gradient))

    def cancel(self, output: Tensor) -> None:
        """Cancel the capture of an output, if there is one."""
        known = self._open.pop(id(output), None)
        if known is not None and known[0]() is output:
            known[1].remove()

    def forget(self) -> None:
        """Captures of earlier passes cannot be cancelled any more."""
        self._open.clear()

    def _learn(
        self, place: Hashable, alias: Tensor, kept: Tensor, dy: Tensor, changed: bool
    ) -> None:
        """Note what became of an output at a place, if this use of it could show that."""
        fate = _UNTOUCHED
        if changed:
            moved = alias != kept
            if not moved.any() or not dy.any():
                return
            fate = _OVERWRITTEN if dy[moved].any() else _HARMLESS
        self._fate[place] = max(fate, self._fate.get(place, _UNTOUCHED))
