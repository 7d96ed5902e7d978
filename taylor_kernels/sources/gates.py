"""Statistics of gates: a factor of 1 on every channel, behind the layer's BatchNorm if it has one.

The gradient of gate c over a minibatch is s_c = Σ_{n, positions} y·dy, which behind a BatchNorm
with scale γ and shift β equals γ g_γ + β g_β: then nothing is read but four vectors. Otherwise y is
met in a forward hook and dy in the backward pass, and `gate_gradients` reduces them as soon as
both are there; neither is kept longer than autograd would.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from taylor_kernels.ops.filter_moments import filter_moments
from taylor_kernels.ops.gate_gradients import gate_gradients
from taylor_kernels.sources.base import Layers, Source, filter_count
from taylor_kernels.sources.following_norms import FollowingNorms

# What becomes of a module's output between its forward and its backward; learned on first sight.
_UNTOUCHED = "untouched"
_HARMLESS = "changed in place, with the same gate gradient (ReLU)"
_OVERWRITTEN = "changed in place, so a copy must be kept"


class _Gates(Source):
    """What both gate sources share: when outputs are tapped, and how."""

    def __init__(self, model: nn.Module, layers: Layers, backend: str | None = None) -> None:
        super().__init__(model, layers, backend)
        self._norms = FollowingNorms(model, layers, self._on_output, self._on_norm)
        self._taps: dict[int, tuple[weakref.ref[Tensor], RemovableHandle]] = {}
        self._fate: dict[nn.Module, str] = {}
        self._unreached: set[str] = set()
        self._pass = 0
        self._in_backward = False

    def collect(
        self, *, loss_scale: float = 1.0, closure: Callable[[], Tensor] | None = None
    ) -> list[Tensor]:
        if self._unreached:
            raise RuntimeError(
                f"no gradient reaches the output of {', '.join(sorted(self._unreached))}, because "
                "everything before is frozen; run the pass inside tk.scoring(model), or leave "
                "these layers out with layers="
            )
        try:
            tables = self._tables()
        finally:
            self.discard()
        return [table / loss_scale for table in tables] if loss_scale != 1.0 else tables

    @abstractmethod
    def _tables(self) -> list[Tensor]:
        """What collect() hands over, before the loss scale is divided out."""

    @abstractmethod
    def _receive(self, name: str, gates: Tensor, pass_: int) -> None:
        """Take the gate gradients [N, C] of one use of a layer."""

    def _bias(self, module: nn.Module) -> Tensor | None:
        """What is subtracted from the output of a tapped module."""
        return None

    def _reads_parameters(self, name: str, norm: _BatchNorm) -> bool:
        """Whether this norm's gate is read off its parameters, so that no tap is needed."""
        return False

    def discard(self) -> None:
        self._unreached.clear()

    def close(self) -> None:
        self._norms.close()
        self.discard()

    def _on_output(self, name: str, output: Tensor) -> None:
        if self._in_backward:  # the first forward after a backward begins a new set of examples
            self._pass += 1
            self._in_backward = False
            self._taps.clear()
        # A tap that a norm takes over a moment later: only the norm can tell that it follows.
        self._tap(name, self.layers[name], output)

    def _on_norm(self, name: str, norm: _BatchNorm, input: Tensor, output: Tensor) -> None:
        tapped = self._taps.pop(id(input), None)
        if tapped is not None and tapped[0]() is input:
            tapped[1].remove()
        self._unreached.discard(name)
        if not self._reads_parameters(name, norm):
            self._tap(name, norm, output)

    def _tap(self, name: str, module: nn.Module, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not output.requires_grad:
            self._unreached.add(name)
            return
        fate = self._fate.get(module)
        alias: Tensor | None = output.detach()
        copy = output.detach().clone() if fate in (None, _OVERWRITTEN) else None
        version, pass_ = output._version, self._pass
        channel_dim = -1 if isinstance(module, nn.Linear) else 1
        unbatched = isinstance(module, _ConvNd) and output.dim() == len(module.kernel_size) + 1

        def receive(grad: Tensor) -> None:
            nonlocal alias, copy
            self._in_backward = True
            if alias is None:
                raise RuntimeError(f"{name}: backward() ran twice over a graph it had freed")
            values = self._settle(name, module, alias, copy, version, grad, gate)
            self._receive(name, values, pass_)
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                alias = copy = None  # the graph may outlive this pass; the activation must not

        def gate(y: Tensor, dy: Tensor) -> Tensor:
            if unbatched or y.dim() == 1:
                y, dy = y.unsqueeze(0), dy.unsqueeze(0)
            bias = self._bias(module)
            return gate_gradients(y, dy, bias=bias, channel_dim=channel_dim, backend=self.backend)

        self._taps[id(output)] = (weakref.ref(output), output.register_hook(receive))

    def _settle(
        self,
        name: str,
        module: nn.Module,
        alias: Tensor,
        copy: Tensor | None,
        version: int,
        grad: Tensor,
        gate: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The gate gradients, from whichever of output and copy still holds what they need.

        The first pass keeps a copy of every tapped output and compares: an in-place ReLU zeroes
        outputs whose gradient is zero too, so the overwritten tensor serves as well, for ever
        after; an in-place sum does not.
        """
        fate = self._fate.get(module)
        changed = alias._version != version
        if fate is None:
            assert copy is not None
            gates = gate(copy, grad)
            harmless = changed and torch.equal(gate(alias, grad), gates)
            fate = _HARMLESS if harmless else _OVERWRITTEN if changed else _UNTOUCHED
            self._fate[module] = fate
            return gates
        if fate == _UNTOUCHED and changed:
            self._fate[module] = _OVERWRITTEN
            raise RuntimeError(
                f"{name}: its output was changed in place in this pass, though not in the first "
                "one, and the values are gone; run the pass again, a copy is kept from now on"
            )
        return gate(alias if copy is None else copy, grad)


class ExampleGates(_Gates):
    """[F, N] per layer: s[n, c] = Σ_positions (y − b)·dy for every example since the last update.

    Behind a BatchNorm y is its whole output. Where there is none, b is the layer's own bias, and
    s is exactly Σ_j g_{n,c,j} w_{c,j} over the weights of filter c. Uses of a layer in one pass add
    up per example (its gate is one and the same); further passes bring further examples.
    """

    def __init__(self, model: nn.Module, layers: Layers, backend: str | None = None) -> None:
        super().__init__(model, layers, backend)
        self._received: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in layers}

    def _bias(self, module: nn.Module) -> Tensor | None:
        return module.bias if isinstance(module, (_ConvNd, nn.Linear)) else None

    def _receive(self, name: str, gates: Tensor, pass_: int) -> None:
        key = (pass_, gates.size(0))
        received = self._received[name]
        received[key] = received[key] + gates if key in received else gates

    def _tables(self) -> list[Tensor]:
        if not any(self._received.values()):
            raise RuntimeError(_NOTHING_SEEN)
        examples = max(sum(n for _, n in received) for received in self._received.values())
        return [
            torch.cat(list(received.values())).T.contiguous()
            if (received := self._received[name])
            else layer.weight.new_zeros(filter_count(layer), examples, dtype=torch.float32)
            for name, layer in self.layers.items()
        ]

    def discard(self) -> None:
        super().discard()
        self._received = {name: {} for name in self.layers}


class Gates(_Gates):
    """[F, 1] per layer: the gate's gradient over everything since the last update.

    The gradients of γ and β are taken as backward() hands them over, like those of outputs: what
    is done to `.grad` later (unscaling, clipping) changes neither.
    """

    def __init__(self, model: nn.Module, layers: Layers, backend: str | None = None) -> None:
        super().__init__(model, layers, backend)
        self._received: dict[str, Tensor] = {}
        self._read: dict[str, list[_BatchNorm]] = {}
        self._hooked: dict[nn.Parameter, RemovableHandle] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def _reads_parameters(self, name: str, norm: _BatchNorm) -> bool:
        if not norm.affine or not (norm.weight.requires_grad and norm.bias.requires_grad):
            return False
        if torch.is_grad_enabled():
            norms = self._read.setdefault(name, [])
            if not any(norm is known for known in norms):
                norms.append(norm)
            for parameter in (norm.weight, norm.bias):
                if parameter not in self._hooked:
                    hook = parameter.register_hook(self._gradient_hook(parameter))
                    self._hooked[parameter] = hook
        return True

    def _gradient_hook(self, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            self._in_backward = True
            grad = grad.detach().clone()  # autograd may make the original .grad itself
            known = self._gradients.get(parameter)
            self._gradients[parameter] = grad if known is None else known + grad

        return hook

    def _receive(self, name: str, gates: Tensor, pass_: int) -> None:
        total = gates.sum(0)
        self._received[name] = self._received[name] + total if name in self._received else total

    def _tables(self) -> list[Tensor]:
        norms = [
            (name, norm)
            for name, read in self._read.items()
            for norm in read
            if norm.weight in self._gradients and norm.bias in self._gradients
        ]
        if norms:
            parameters = [p for _, norm in norms for p in (norm.weight, norm.bias)]
            moments = filter_moments(
                [p.detach() for p in parameters],
                [self._gradients[p] for p in parameters],
                backend=self.backend,
            )
            for (name, _), of_scale, of_shift in zip(
                norms, moments[::2], moments[1::2], strict=True
            ):
                self._receive(name, (of_scale[:, 0] + of_shift[:, 0])[None], 0)
        if not self._received:
            raise RuntimeError(_NOTHING_SEEN)
        return [
            self._received[name][:, None]
            if name in self._received
            else layer.weight.new_zeros(filter_count(layer), 1, dtype=torch.float32)
            for name, layer in self.layers.items()
        ]

    def discard(self) -> None:
        super().discard()
        self._received, self._read, self._gradients = {}, {}, {}

    def close(self) -> None:
        super().close()
        for handle in self._hooked.values():
            handle.remove()
        self._hooked = {}


_NOTHING_SEEN = (
    "no forward and backward pass has been seen since the last update; call it once after each "
    "loss.backward(), on the model that was handed over (not a copy)"
)
