"""GSM: momentum SGD in which, at every step, the gradient reaches the Q weights that matter most.

    Z ← β Z + η W + B∘g        W ← W − α Z

B is 1 for the Q greatest |g·w| of the whole network and 0 for all others, which therefore decay
towards zero, W·exp(−α η / (1 − β) · steps), and can be cut at the end at no loss: Ding et al.,
"Global Sparse Momentum SGD for Pruning Very Deep Neural Networks", NeurIPS 2019, eq. 8 and 9.
Matrices and 4-D kernels are ranked; all other parameters take plain steps without decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from taylor_kernels.backends import check_name
from taylor_kernels.checks import is_number
from taylor_kernels.ops.global_threshold import global_threshold, greatest_masks
from taylor_kernels.ops.sparse_momentum import sparse_momentum

#: Dimensions of the parameters that are ranked: linear layers and 2-D convolutions.
RANKED_DIMENSIONS = (2, 4)


class GSM(Optimizer):
    """Global Sparse Momentum SGD (Ding et al., NeurIPS 2019); defaults are the paper's for LeNets.

    Exactly Q = ⌊weights / compression⌋ of the ranked weights, those of 2 and 4 dimensions, get
    their gradient in a step: the greatest |g·w|, equal ones by position. (The authors' code keeps
    all that are equal to the last.) The ranking and the update are one multi-tensor pass each,
    without a sort, a copy of the scores or a wait of the host.

    Args:
        params: parameters, or dicts with their own `lr`, `momentum` and `weight_decay`, on one
            device. Weight decay reaches ranked weights alone.
        lr: α, the learning rate. Passive weights decay by α·η/(1 − β) a step: they are near zero
            when that times the number of steps has reached about 8.
        momentum: β, in [0, 1).
        weight_decay: η.
        compression: ranked weights over those that are left at the end, from 1 on.
        backend: one of `taylor_kernels.available_backends()`; None picks by device.

    Raises:
        ValueError: a number out of its range, or no parameter that can be ranked.
        FloatingPointError: by `step`, if a gradient or a product g·w is not finite; the message
            names the parameter. On a CPU nothing was changed; on a GPU nothing was changed either,
            but `step` waits for nothing, so a later call says so: the next `step` whose turn comes
            after the GPU's answer, `check`, `finish` or `state_dict`.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> model = torch.nn.Linear(20, 5)
        >>> optimizer = tk.methods.GSM(model.parameters(), lr=0.1, compression=4)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 20)).square().mean().backward()
        ...     _ = optimizer.step()
        >>> masks = optimizer.finish()
        >>> int(model.weight.count_nonzero())
        25
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        momentum: float = 0.99,
        weight_decay: float = 5e-4,
        compression: float = 60.0,
        *,
        backend: str | None = None,
    ) -> None:
        check_name(backend)
        self._backend = backend
        self._told: list[tuple[Tensor, torch.cuda.Event, list[Any]]] = []  # oldest first
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "compression": compression,
        }
        super().__init__(params, defaults)
        if not any(True for _ in self.ranked_parameters()):
            raise ValueError(
                "params: none has 2 or 4 dimensions, so there is nothing to rank; pass the weights "
                "of linear layers or convolutions too"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer; the options are checked.

        Raises:
            ValueError: an option is out of range, or the compression is not that of the others.
        """
        group = {**self.defaults, **param_group}
        for name, fits, range_ in (
            ("lr", lambda x: x >= 0, "not negative"),
            ("momentum", lambda x: 0 <= x < 1, "in [0, 1)"),
            ("weight_decay", lambda x: x >= 0, "not negative"),
            ("compression", lambda x: x >= 1, "at least 1"),
        ):
            value = group[name]
            if not is_number(value) and not (isinstance(value, Tensor) and value.numel() == 1):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not (math.isfinite(value) and fits(value)):
                raise ValueError(f"{name}: {value} is out of range; it must be {range_}")
        if group["compression"] != self.defaults["compression"]:
            raise ValueError(
                "compression: one for all groups, since all weights are ranked together; got "
                f"{group['compression']} beside {self.defaults['compression']}"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        self.check()  # what a GPU still has to tell stays behind
        return {**super().__getstate__(), "_backend": self._backend, "_told": []}

    def ranked_parameters(self) -> Iterator[nn.Parameter]:
        """Those whose weights are ranked, group by group; none that is frozen."""
        for group in self.param_groups:
            yield from (p for p in group["params"] if p.requires_grad and _is_ranked(p))

    @property
    def active(self) -> int:
        """Q: how many weights get their gradient in a step, and are left by `finish`."""
        weights = sum(p.numel() for p in self.ranked_parameters())
        return max(math.floor(weights / self.param_groups[0]["compression"] * (1 + 1e-12)), 1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of all parameters that have a gradient, if a ranked one has.

        Returns:
            What `closure` gives, which is called first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._say_if_broken(wait=False)
        taken = [(p, group) for group in self.param_groups for p in group["params"] if _moves(p)]
        available = sum(p.numel() for p, _ in taken if _is_ranked(p))
        if not available:
            return loss
        self._check(taken)
        weights = [p for p, _ in taken]
        grads = [p.grad for p in weights]
        ranked = [_is_ranked(p) for p in weights]
        table = global_threshold(
            weights,
            min(self.active, available),
            factors=grads,
            ranked=ranked,
            backend=self._backend,
        )
        self._note(table, weights)
        sparse_momentum(
            weights,
            grads,
            [self._momentum(p) for p in weights],
            table,
            lr=[float(group["lr"]) for _, group in taken],
            momentum=[float(group["momentum"]) for _, group in taken],
            weight_decay=[
                float(group["weight_decay"]) if is_ranked else 0.0
                for (_, group), is_ranked in zip(taken, ranked, strict=True)
            ],
            ranked=ranked,
            backend=self._backend,
        )
        return loss

    @torch.no_grad()
    def finish(self) -> list[Tensor]:
        """Set all but the Q ranked weights of greatest magnitude to zero, and their momentum.

        Returns:
            A bool mask of the kept weights for each of `ranked_parameters()`.

        Raises:
            FloatingPointError: a weight is not finite. Nothing is changed then.
        """
        self.check()
        weights = list(self.ranked_parameters())
        table = global_threshold(weights, self.active, backend=self._backend)
        if broken := int(table[2]):  # counted from the end, of those that are not empty
            name = self._name([weight for weight in weights if weight.numel()][-broken])
            raise FloatingPointError(
                f"{name}: a weight is not finite, so none is cut; load an earlier state"
            )
        masks = greatest_masks(weights, table)
        for weight, mask in zip(weights, masks, strict=True):
            weight.masked_fill_(~mask, 0)
            self._momentum(weight).masked_fill_(~mask, 0)
        return masks

    def check(self) -> None:
        """Wait for what was launched, and raise FloatingPointError if a step could not be done."""
        self._say_if_broken(wait=True)

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, once `check` has found that every step was done."""
        self.check()
        return super().state_dict()

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(
                parameter, memory_format=torch.preserve_format
            )
        found: Tensor = state["momentum_buffer"]
        return found

    def _check(self, taken: list[tuple[Any, dict[str, Any]]]) -> None:
        device = taken[0][0].device
        for p, _ in taken:
            if p.grad.is_sparse:
                raise ValueError(f"{self._name(p)}: its gradient is sparse, which cannot be ranked")
            if p.device != device:
                raise ValueError(
                    f"{self._name(p)}: is on {p.device} and others on {device}; GSM ranks all "
                    "weights together, so they must be on one device"
                )

    def _note(self, table: Tensor, weights: list[Any]) -> None:
        """Raise if a score is not finite; on a GPU, have that told when it is known."""
        if table.device.type == "cpu":
            if broken := int(table[2]):
                self._raise(self._name(weights[len(weights) - broken]))
        elif not torch.cuda.is_current_stream_capturing():
            told = torch.empty(1, dtype=torch.int64, pin_memory=True)
            told.copy_(table[2:], non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(table.device))
            self._told.append((told, event, weights))

    def _say_if_broken(self, *, wait: bool) -> None:
        while self._told:
            told, event, weights = self._told[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            del self._told[0]
            if broken := int(told):
                self._raise(self._name(weights[len(weights) - broken]))

    def _raise(self, name: str) -> None:
        raise FloatingPointError(
            f"{name}: its gradient, or its gradient times its weight, is not finite; nothing was "
            "changed by this step"
        )

    def _name(self, parameter: Tensor) -> str:
        """As a message names it: by its own name where the optimizer was given names."""
        for i, group in enumerate(self.param_groups):
            for j, (p, name) in enumerate(
                zip(group["params"], group.get("param_names") or group["params"], strict=True)
            ):
                if p is parameter:
                    return name if isinstance(name, str) else f"param_groups[{i}]['params'][{j}]"
        return "a parameter"


def _is_ranked(parameter: Tensor) -> bool:
    return parameter.dim() in RANKED_DIMENSIONS


def _moves(parameter: Tensor) -> bool:
    return parameter.grad is not None and parameter.numel() > 0
