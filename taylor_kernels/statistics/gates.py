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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.hooks import Hook
from taylor_kernels.ops.filter_moments import needed_moments
from taylor_kernels.ops.gate_gradients import gate_gradients
from taylor_kernels.shards import in_parts, is_fsdp, is_sharded, local_part, plan_mesh, whole
from taylor_kernels.statistics.base import Closure
from taylor_kernels.statistics.counting import counting
from taylor_kernels.statistics.hooks.captures import Captures
from taylor_kernels.statistics.hooks.following_norms import FollowingNorms
from taylor_kernels.statistics.hooks.gate_tables import GateTables
from taylor_kernels.statistics.hooks.passes import NOTHING_SEEN, WatchesPasses, inside_backward
from taylor_kernels.statistics.hooks.sites import AT_GRADIENT, IN, SiteHooks
from taylor_kernels.statistics.hooks.weight_gates import WeightGates
from taylor_kernels.statistics.layers import channel_dim, is_layer
from taylor_kernels.statistics.registry import register_statistic


class _Gates(WatchesPasses):
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

    def _finished(self, tables: dict[str, Tensor]) -> list[Tensor]:
        """The tables of layers; where a plan has spread them over ranks, a collective of those."""
        self._gate_tables.mesh = plan_mesh(self.model)
        return self._gate_tables.finish(tables, self.model.training)

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
class ExampleGates(_Gates):
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


@register_statistic
class Gates(_Gates):
    """[F, 1] per layer: the gate's gradient over everything since the last update.

    The gradients of γ and β are read in backward() itself, like those of outputs, so what is done
    to `.grad` later (unscaling, clipping) does not matter. They give the gate of a layer if the
    norm ran once in the pass, behind that layer alone. Of a norm that runs more often the outputs
    are captured instead. In the first passes both are done, since only their end tells which is
    right, and whether a gradient is rounding noise. FSDP2 has freed γ and β by then: outputs it is.
    The gradients of weights at sites are read there too.
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
        self._last_run: dict[_NormBase, tuple[int, str | None]] = {}  # its pass and its layer
        self._shared: set[_NormBase] = set()  # run more than once in a pass, or behind two layers
        self._read: dict[_NormBase, str] = {}
        self._captured: dict[_NormBase, list[tuple[str, Tensor]]] = {}  # beside being read
        self._spoiled: set[str] = set()
        self._hooked: set[nn.Parameter] = set()
        self._gradients: dict[nn.Parameter, Tensor] = {}
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
            and norm.weight.requires_grad
            and norm.bias.requires_grad
        )
        if norm in self._shared or name is None or not trains:
            return True
        self._read[norm] = name
        for parameter in (norm.weight, norm.bias):
            if parameter not in self._hooked:
                self._hooked.add(parameter)
                self._handles.append(parameter.register_hook(Hook(self._on_gradient, parameter)))
        if last_pass == -1 or self._gate_tables.noise.watches:
            self._captured.setdefault(norm, [])
            return True
        self._captured.pop(norm, None)  # no longer all of its runs
        return False

    def _frees_parameters(self) -> bool:
        """Whether γ and β are gone by the time of backward(); the modules are asked once a pass."""
        if self._freed[0] != self._pass:
            self._freed = self._pass, is_fsdp(self.model)
        return self._freed[1]

    def _on_gradient(self, parameter: nn.Parameter, grad: Tensor) -> None:
        self._in_backward = True
        grad = grad.detach().clone()  # autograd may make the original .grad itself
        known = self._gradients.get(parameter)
        self._gradients[parameter] = grad if known is None else known + grad

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
        norms = [
            (name, norm)
            for norm, name in self._read.items()
            if norm not in self._shared
            and norm.weight in self._gradients
            and norm.bias in self._gradients
        ]
        if norms:
            parameters = [p for _, norm in norms for p in (norm.weight, norm.bias)]
            moments = needed_moments(
                [p.detach() for p in parameters],
                [self._gradients[p] for p in parameters],
                moments=("gw",),
                backend=self.backend,
            )
            for (name, _), of_scale, of_shift in zip(
                norms, moments[::2], moments[1::2], strict=True
            ):
                self._add(name, of_scale[:, 0] + of_shift[:, 0])
        if not self._received:
            raise RuntimeError(NOTHING_SEEN)
        tables = {name: total[:, None] for name, total in self._received.items()}
        return self._finished(tables)

    def discard(self) -> None:
        super().discard()
        self._received, self._gradients = {}, {}
        self._read, self._captured, self._spoiled = {}, {}, set()
