"""Gates of a minibatch: the slope of the loss along each channel's gate.

Most are read off the gradients of a norm's scale and shift, in backward() itself, or off the
gradient of a weight; the others are Σ y·dy of outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.shards import in_parts, is_fsdp
from taylor_kernels.statistics.base import Closure
from taylor_kernels.statistics.gates import GateStatistic
from taylor_kernels.statistics.hooks.gate_tables import Packed
from taylor_kernels.statistics.hooks.norm_slopes import NormSlopes
from taylor_kernels.statistics.hooks.passes import NOTHING_SEEN, inside_backward
from taylor_kernels.statistics.hooks.sites import AT_GRADIENT, SiteHooks
from taylor_kernels.statistics.hooks.steady import (
    RestingNorms,
    Steady,
    gates_of_small,
    keeps_small,
)
from taylor_kernels.statistics.hooks.weight_gates import WeightGates
from taylor_kernels.statistics.registry import register_statistic


@register_statistic
class Gates(GateStatistic):
    """[F, 1] per layer: the gate's gradient over everything since the last update.

    The gradients of γ and β are read in backward() itself, like those of outputs, so what is done
    to `.grad` later (unscaling, clipping) does not matter. They give the gate of a layer if the
    norm ran once in the pass, behind that layer alone. Of a norm that runs more often the outputs
    are captured instead. In the first passes both are done, since only their end tells which is
    right, and whether a gradient is rounding noise. At sites no hook stays behind the norms that
    are read after that. FSDP2 has freed γ and β by then: outputs it is. The gradients of weights at
    sites are read there too.
    """

    name = "gates"
    across_ranks = "sum"
    columns = "1: the gate's gradient over the minibatch"
    reads = "activations"
    gradient_sites = True

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        weights = [site for site in self._at.values() if site.how == AT_GRADIENT]
        self._weights = WeightGates(
            self.model, weights, self._reads_gradient, self._on_slopes, self.backend
        )
        self._of_weights = sorted({site.weight for site in weights})
        self._received: dict[str, Tensor] = {}
        self._steady = Steady()
        self._last_run: dict[_NormBase, tuple[int, str | None]] = {}  # the pass, and behind what
        self._shared: set[_NormBase] = set()  # run more than once in a pass, or behind two layers
        self._read: dict[_NormBase, str] = {}  # in this update
        self._quiet: dict[_NormBase, str] = {}  # of these the ones that need no look
        self._resting = RestingNorms(self._norms) if isinstance(self._norms, SiteHooks) else None
        self._captured: dict[_NormBase, list[tuple[str, Tensor]]] = {}  # beside being read
        self._spoiled: set[str] = set()
        self._of_norms = NormSlopes(self._handles, self.backend)
        self._short: set[str] = set()  # outputs that have a short way
        self._seen = 0  # gradients that had come before the pass
        self._freed = (-1, False)  # a pass, and whether FSDP2 shards the model in it

    def _wants_capture(self, name: str | None, norm: _NormBase) -> bool:
        if not self._watches():
            return False
        last_pass, last_name = self._last_run.get(norm, (-1, name))
        if last_pass == self._pass and inside_backward():
            return norm not in self._read  # a checkpoint computes the same run again
        if last_pass == self._pass or last_name != name:
            self._shared.add(norm)
            if norm in self._read and norm not in self._captured:
                self._spoiled.add(self._read[norm])
        self._last_run[norm] = (self._pass, name)
        trains = (
            not self._frees_parameters()
            and norm.affine
            and all(_is_trained(one) for one in (norm.weight, norm.bias))
        )
        if norm in self._shared or name is None or not trains:
            return True
        self._read[norm] = name
        self._of_norms.watch(norm)
        if last_pass == -1 or self._gate_tables.noise.watches:
            self._captured.setdefault(norm, [])
            return True
        self._captured.pop(norm, None)  # no longer all of its runs
        self._quiet[norm] = name
        return False

    def _on_output(self, name: str, output: Tensor) -> None:
        super()._on_output(name, output)
        # Not behind a pass without gradients alone: the short way does not note that it was called.
        if self._steady.on and name in self._called and name not in self._short:
            self._short.add(name)
            if isinstance(self._norms, SiteHooks):
                self._norms.shorten(name, keeps_small(self._steady, name))

    def _on_model(self, *_: object) -> None:
        super()._on_model()
        if self._resting is not None:
            self._resting.wake_changed()

    def _frees_parameters(self) -> bool:
        """Whether γ and β are gone by the time of backward(); the modules are asked once a pass."""
        if self._freed[0] != self._pass:
            self._freed = self._pass, is_fsdp(self.model)
        return self._freed[1]

    def _on_call(self) -> None:
        self._note_backward()
        super()._on_call()

    def _note_backward(self) -> None:
        """A backward pass has begun if gradients have come since the forward pass."""
        self._in_backward = self._in_backward or self._count() != self._seen

    def _begin_pass(self) -> None:
        self._note_backward()
        super()._begin_pass()
        self._of_norms.add_up()
        self._add_packed(self._of_small())
        self._seen = self._count()

    def _count(self) -> int:
        """How many gradients are put aside."""
        return self._of_norms.count() + len(self._steady.arrived)

    def _add_packed(self, packed: Iterable[Packed]) -> None:
        for some in packed:
            for key, total in some.each():
                self._add(key, total)

    def _of_small(self) -> Iterator[Packed]:
        """The gates of the small outputs whose gradients have come."""
        return gates_of_small(self._steady, self._at, self.backend)

    def _reads_gradient(self, key: str, parameter: nn.Parameter) -> bool:
        self._on_call()
        if not self._watches():
            return False
        self._called.add(key)
        if not parameter.requires_grad:
            self._unreached.add(key)
        return parameter.requires_grad and not self._frees_parameters()

    def _on_slopes(self, key: str, slopes: Tensor) -> None:
        if not self._takes_gradients():
            return
        self._in_backward = True
        self._add(key, slopes)

    def close(self) -> None:
        self._resting = None  # no hook comes back
        self._weights.close()
        super().close()

    def _check(self) -> None:
        super()._check()
        if self._of_weights and in_parts(self.model):
            raise RuntimeError(
                f"{', '.join(self._of_weights)}: gates "
                "are read off the gradient of a whole weight here, and on several ranks it is in "
                "parts; use taylor_fo, or leave these layers out (ignore=)"
            )

    def _receive(self, name: str, module: nn.Module, gates: Tensor, pass_: int) -> None:
        total = gates.sum(0)
        if isinstance(module, _NormBase) and module in self._captured:
            self._captured[module].append((name, total))
        else:
            self._add(name, total)

    def _add(self, name: str, total: Tensor) -> None:
        self._received[name] = self._received[name] + total if name in self._received else total

    def _tables(self, closure: Closure | None) -> list[Tensor]:
        self._check()
        if self._spoiled:
            raise RuntimeError(
                f"the BatchNorm behind {', '.join(sorted(self._spoiled))} ran more often in this "
                "pass, or behind more layers, than before; run the pass again"
            )
        for norm, captured in self._captured.items():
            for name, total in captured if norm in self._shared else ():
                self._add(name, total)
        alone = {norm: name for norm, name in self._read.items() if norm not in self._shared}
        packed = [*self._of_small(), *self._of_norms.take(alone | self._at_rest())]
        names = [*self._received, *(key for some in packed for key in some.keys)]
        different = set(names)
        if self._resting is not None:
            self._resting.wake_silent(different)
        if not names:
            raise RuntimeError(NOTHING_SEEN)
        if len(different) < len(names):
            self._add_packed(packed)
            packed = []
        tables = {name: total[:, None] for name, total in self._received.items()}
        return self._finished(tables, packed)

    def _at_rest(self) -> dict[_NormBase, str]:
        """Norms that are read and not looked at, and the keys of their sites.

        Raises:
            RuntimeError: one has other parameters than those whose gradients are put aside.
        """
        if self._resting is None:
            return {}
        names = self._resting.names
        if replaced := [names[norm] for norm in self._resting.replaced()]:
            self._resting.wake_changed()
            raise RuntimeError(
                f"{', '.join(replaced)}: other parameters were put into these norms since the "
                "model itself was called, and their gradients were not seen; run the pass again"
            )
        return names

    def discard(self) -> None:
        super().discard()
        self._note_backward()
        self._steady.arrived.clear()
        self._read.clear()
        self._received, self._captured, self._spoiled = {}, {}, set()
        self._seen = 0
        self._steady.on = not self._gate_tables.noise.watches
        if self._resting is not None:
            if self._steady.on:
                quiet = ((n, k) for n, k in self._quiet.items() if n not in self._shared)
                self._resting.add({n: k for n, k in quiet if self._of_norms.is_settled(n)})
            else:
                self._resting.wake()
        self._quiet.clear()
        self._of_norms.forget()


def _is_trained(held: Tensor) -> bool:
    """Whether gradients come of it, and are the model's: torch.func.functional_call puts other
    tensors there."""
    return isinstance(held, nn.Parameter) and held.requires_grad
