"""Statistics of gates: a factor of 1 on every channel, behind the norms of that channel.

The gradient of gate c over a minibatch is s_c = Σ_{n, positions} y·dy. Behind a norm with scale γ
and shift β it equals γ g_γ + β g_β, for which four vectors are read. Otherwise a forward hook keeps
y, a hook on its gradient receives dy, and `gate_gradients` reduces both at once. Until then the
output stays in memory, even where autograd itself would not need it.

A gate stands at the sites that the statistic is given (taylor_kernels/gate_sites.py), and its rows
add up over them. Without sites it stands behind the norms that are handed the very tensor that a
layer returned, else at that layer's own output.

Where neither y nor dy is seen, as of stacked experts, which fused products hide, what reads the
channels is linear in its weight, and so is an expert's output in its last: Σ y·dy over a minibatch
is the Σ g·w of the entries that the channels go through.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.ops.gate_gradients import gate_gradients
from taylor_kernels.shards import is_sharded, local_part, plan_mesh, whole
from taylor_kernels.statistics.base import Closure
from taylor_kernels.statistics.counting import counting
from taylor_kernels.statistics.hooks.captures import Captures
from taylor_kernels.statistics.hooks.following_norms import FollowingNorms
from taylor_kernels.statistics.hooks.gate_tables import GateTables, Packed
from taylor_kernels.statistics.hooks.passes import NOTHING_SEEN, WatchesPasses
from taylor_kernels.statistics.hooks.sites import IN, SiteHooks
from taylor_kernels.statistics.layers import channel_dim, is_layer
from taylor_kernels.statistics.registry import register_statistic


class GateStatistic(WatchesPasses):
    """What all statistics of gates share: when outputs are captured, and what becomes of tables."""

    at_gates = True

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._norms: FollowingNorms | SiteHooks
        if self.sites is None:
            self._norms = FollowingNorms(self.model, self.layers, self._on_output, self._on_norm)
        else:
            self._norms = SiteHooks(self.model, self.sites.sites, self._on_output, self._on_norm)
        self._at = {site.key: site for site in self.sites.sites} if self.sites is not None else {}
        self._gate_tables = GateTables(self.layers, self.sites)
        self._captures = Captures()

    @abstractmethod
    def _receive(self, name: str, module: nn.Module, gates: Tensor, pass_: int) -> None:
        """Take the gate gradients [N, C] of one use of a layer, met at the output of `module`."""

    def _bias(self, name: str, module: nn.Module, channels: int) -> Tensor | None:
        """What is subtracted from what is captured: [channels]."""
        return None

    def _wants_capture(self, name: str | None, norm: _NormBase) -> bool:
        """Whether the output of this norm is to be captured; asked after each of its runs."""
        return True

    @property
    def noise(self) -> list[str]:
        return list(self._gate_tables.noise.layers)

    @property
    def counts_here(self) -> bool:
        mesh = self._gate_tables.mesh
        return mesh is None or not any(mesh.get_coordinate() or ())

    def _finished(self, tables: dict[str, Tensor], packed: Sequence[Packed] = ()) -> list[Tensor]:
        """The tables of layers; where a plan has spread them over ranks, a collective of those."""
        self._gate_tables.mesh = plan_mesh(self.model)
        return self._gate_tables.finish(tables, self.model.training, packed)

    def discard(self) -> None:
        super().discard()
        self._gate_tables.noise.discard()

    def close(self) -> None:
        self._norms.close()
        super().close()

    def _watches_noise(self) -> bool:
        """Whether the gradients that flow back now are to be looked at for rounding noise."""
        return self._gate_tables.noise.watches

    def _begin_pass(self) -> None:
        super()._begin_pass()
        self._captures.forget()

    def _on_output(self, name: str, output: Tensor) -> None:
        self._on_call()
        # A norm may cancel this capture a moment later: only the norm can tell that it follows.
        self._capture(name, self._watched[name], output, copy=not self._norms.of(name))

    def _on_norm(self, name: str | None, norm: _NormBase, input: Tensor, output: Tensor) -> None:
        if self.sites is not None:
            self._on_call()
        wanted = self._wants_capture(name, norm)
        if name is None:
            return
        self._captures.cancel(input)
        self._unreached.discard(name)
        if wanted:
            self._capture(name, norm, output)
        elif self._watches():
            self._called.add(name)

    def _capture(self, name: str, module: nn.Module, output: Tensor, *, copy: bool = True) -> None:
        if not self._awaits_gradient(name, output):
            return
        if is_sharded(output):
            raise RuntimeError(
                f"{name}: its output is a DTensor here; make the meter after parallelize_module() "
                "(for a pruner call use_optimizer() after it), or use taylor_fo where a plan says "
                "use_local_output=False"
            )
        pass_ = self._pass
        dim = output.dim() + self._channel_dim(name, module, output)

        def receive(y: Tensor, dy: Tensor) -> None:
            if not self._takes_gradients():
                return
            self._in_backward = True
            if dim == 0:  # no batch
                y, dy = y.unsqueeze(0), dy.unsqueeze(0)
            bias = self._bias(name, module, y.size(dim or 1))
            gates = gate_gradients(y, dy, bias=bias, channel_dim=dim or 1, backend=self.backend)
            if self._watches_noise():
                self._gate_tables.noise.add(name, y, dy, dim or 1)
            self._receive(name, module, gates, pass_)

        place = name if self.sites is not None else module
        self._captures.add(name, place, output, receive, self.discard, copy=copy)

    def _channel_dim(self, name: str, module: nn.Module, output: Tensor) -> int:
        """From the end."""
        if name in self._at:
            return self._at[name].dim
        return channel_dim(module) if is_layer(module) else 1 - output.dim()


@register_statistic
class ExampleGates(GateStatistic):
    """[F, N] per layer: s[n, c] = Σ_positions (y − b)·dy for every example since the last update.

    Behind a BatchNorm y is its whole output. Where there is none, b is the layer's own bias, and
    s is exactly Σ_j g_{n,c,j} w_{c,j} over the weights of filter c. Uses of a layer in one call of
    the model add up per example (its gate is one and the same); further calls bring further
    examples.
    """

    name = "example_gates"
    columns = "N: the gate's gradient for each example"
    reads = "activations"
    per_example = True
    across_ranks = "examples"

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._received: dict[str, dict[tuple[int, int], Tensor]] = {n: {} for n in self._watched}

    def _bias(self, name: str, module: nn.Module, channels: int) -> Tensor | None:
        given = name in self._at and self._at[name].side == IN
        if not is_layer(module) or given or module.bias is None:
            return None
        part = local_part(module.bias)  # of a rank that has the outputs of a part of the channels
        return part if part.numel() == channels else whole(module.bias)

    def _receive(self, name: str, module: nn.Module, gates: Tensor, pass_: int) -> None:
        key = (pass_, gates.size(0))
        received = self._received[name]
        received[key] = received[key] + gates if key in received else gates

    def _tables(self, closure: Closure | None) -> list[Tensor]:
        self._check()
        if not any(self._received.values()):
            raise RuntimeError(NOTHING_SEEN)
        self._leave_out_padding()
        examples = {n: sum(map(len, r.values())) for n, r in self._received.items()}
        most = max(examples, key=examples.__getitem__)
        tables = {
            name: torch.cat(list(self._received[name].values())).T.contiguous()
            for name in (most, *self._received)  # the first is what missing ones are made like
            if self._received[name]
        }
        return self._finished(tables)

    def _leave_out_padding(self) -> None:
        masks = counting(self, (number for keys in self._received.values() for number, _ in keys))
        if masks is None:
            return
        for name, received in self._received.items():
            for (number, n), gates in received.items():
                counts = masks.of(name, number, n)
                received[number, n] = gates[counts.to(gates.device)]

    def discard(self) -> None:
        super().discard()
        self._received = {name: {} for name in self._watched}
