"""Mirror-descent quantization: training that drives weights to ±1, or to −1, 0 and 1.

Ajanthan, Gupta, Torr, Hartley, Dokania: "Mirror Descent View for Neural Network Quantization",
AISTATS 2021. A network is run with w = P_β(x̃), a projection that becomes a step function as β
grows, and what is stored is the unconstrained x̃. The methods differ in one line, how x̃ moves
along the gradient g by w (η is the learning rate, d(g) is g, its momentum or Adam's direction):

    md-tanh-s      w = tanh(β x̃)                      x̃ ← x̃ − η d(g)
    md-softmax-s   w = Σ_λ λ u_λ, u = softmax(β x̃)    x̃_λ ← x̃_λ − η λ d(g)
    md-tanh        w itself is stored                  w ← (e−1)/(e+1),
                                                       e = (1+w)/(1−w)·exp(−2βη d(g))
    md-softmax     u itself is stored                  u_λ ← u_λ exp(−βη λ d(g)) / Σ
    gd-tanh        as md-tanh-s                        x̃ ← x̃ − η d(g ∂w/∂x̃)
    pmf            as md-softmax-s                     x̃_λ ← x̃_λ − η d(g ∂w/∂x̃_λ)
    binaryconnect  w = sign(x̃)                        x̃ ← clip(x̃ − η d(g), −1, 1)

pmf is "Proximal Mean-Field for Neural Network Quantization" (Ajanthan et al., ICCV 2019) with its
softmax; binaryconnect that of Courbariaux, Bengio and David (NeurIPS 2015). Ternary md-tanh-s and
gd-tanh have w = ½[tanh(β(x̃+½)) + tanh(β(x̃−½))]. The step is `ops.mirror_step`: one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from taylor_kernels.backends import check_name
from taylor_kernels.methods.mirror_rounding import Rounding
from taylor_kernels.methods.mirror_settings import (
    check_gradients,
    check_group,
    check_start,
    is_quantized,
    scale_of,
)
from taylor_kernels.methods.mirror_state import check_state, with_start
from taylor_kernels.methods.mirror_values import Call, first_value

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class MirrorDescent(Rounding):
    """Train a network to weights of ±1 or of −1, 0 and 1: a torch Optimizer.

    Give it the parameters before training. Their values become the first x̃, and from then on the
    parameters hold α·P_β(x̃), which `step` moves. β is multiplied by `beta_scale` at every
    `beta_interval`-th iteration, the first one included. In the end `quantize` rounds the weights.

    Every option but `check_gradients` and `backend` may differ between parameter groups.

    Args:
        params: parameters, named parameters or groups of them, as of any torch Optimizer.
        lr: learning rate η; schedulers may change it.
        method: "md-tanh-s", "md-softmax-s" (numerically stable), "md-tanh", "md-softmax" (the
            plain mirror forms, which stop moving where float32 rounds w to ±1), "gd-tanh", "pmf" or
            "binaryconnect". The formulas are in the documentation.
        levels: "binary" (±1) or "ternary" (−1, 0, 1).
        optimizer: "adam" or "sgd": what makes a direction of a gradient. It also updates what is
            not quantized.
        betas, eps: Adam's. ε is added to √v before the bias is corrected, as in the authors' code.
        momentum: of SGD; 0 for none.
        weight_decay: added as weight_decay·w to the gradients of what is not quantized.
        beta: β before the first iteration.
        beta_scale, beta_interval, beta_max: the annealing of β; a scale of 1 keeps it.
        scale: None: levels are ±1, as published. "layer": α is the mean |w| that a tensor starts
            with. A number: that α.
        quantize: "matrices": tensors of two or more dimensions; others are trained as they are.
            "all": every tensor, as published. False: none of this group. `parameter_groups` makes
            groups that leave out the first or the last layer.
        start: "weights": x̃ starts as the weights, as published. "spread": as the weights over the
            greatest |w| of their tensor. Ternary weights within ±½ are 0 once β is large, and usual
            starts are all there: in a short run, spread them, or few or none get out.
        check_gradients: refuse a step whose gradients are not all finite, before anything is
            changed. It reads them once more, and waits for a GPU.
        backend: one of `taylor_kernels.available_backends()`; None picks by device.

    Raises:
        TypeError, ValueError: an option of the wrong kind or out of range, a group without
            anything to quantize, weights that are not finite. Nothing is changed then.

    The defaults are those published for ResNet-18 on CIFAR-10 (100 000 iterations, lr ×0.3 at
    every 30 000th). For shorter runs take a larger `beta_scale`: β should end at some hundreds.

    Example:
        >>> import torch
        >>> import taylor_kernels as tk
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = tk.methods.MirrorDescent(
        ...     net.parameters(), lr=0.02, beta_scale=1.1, beta_interval=1, scale="layer"
        ... )
        >>> x = torch.randn(64, 4)
        >>> for _ in range(80):
        ...     optimizer.zero_grad()
        ...     loss = (net(x)[:, 0] - x[:, 0].abs()).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> report = optimizer.quantize()
        >>> report.weights, net[0].weight.abs().unique().numel()
        (40, 1)
    """

    _building = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        method: str = "md-tanh-s",
        levels: str = "binary",
        optimizer: str = "adam",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        beta: float = 1.0,
        beta_scale: float = 1.02,
        beta_interval: int = 200,
        beta_max: float = 1e35,
        scale: str | float | None = None,
        quantize: str | bool = "matrices",
        start: str = "weights",
        check_gradients: bool = True,
        backend: str | None = None,
    ):
        check_name(backend)
        self._backend = backend
        self._check_gradients = check_gradients
        self._building = True
        defaults = dict(
            lr=lr,
            method=method,
            levels=levels,
            optimizer=optimizer,
            betas=betas,
            eps=eps,
            momentum=momentum,
            weight_decay=weight_decay,
            beta=beta,
            beta_scale=beta_scale,
            beta_interval=beta_interval,
            beta_max=beta_max,
            scale=scale,
            quantize=quantize,
            start=start,
        )
        super().__init__(params, defaults)
        for i in range(len(self.param_groups)):
            self._check_group(i)
        self._building = False
        for group in self.param_groups:
            self._start(group)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles; PyTorch's own leaves out what is not of every optimizer."""
        own = {"_backend": self._backend, "_check_gradients": self._check_gradients}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which become x̃ and are projected; as of any torch Optimizer."""
        super().add_param_group(param_group)
        if self._building:
            return
        try:
            self._check_group(len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._start(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the gradients, which are there; returns what `closure` returns, if given.

        Raises:
            ValueError: gradients that are not finite, named; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups, finite=self._check_gradients)
        call = Call()
        after = []
        for group in self.param_groups:
            iteration = group["iteration"] + 1
            next_beta = group["beta"]
            if iteration % group["beta_interval"] == 0:
                next_beta = min(next_beta * group["beta_scale"], group["beta_max"])
            after.append((iteration, next_beta))
            for param in group["params"]:
                state = self.state[param]
                if param.grad is not None:
                    call.step(group, param, state, next_beta)
                elif "value" in state and next_beta != group["beta"]:
                    call.project(group, param, state, next_beta, False)
        call.run(self._backend)
        for group, (iteration, next_beta) in zip(self.param_groups, after, strict=True):
            group["iteration"], group["beta"], group["rounded"] = iteration, next_beta, False
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["step"] += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state over, bit for bit, and write the weights that it projects to.

        Raises:
            TypeError, ValueError: it is not the state of a MirrorDescent of parameters of these
                shapes, in the same groups, or an option in it is out of range. Nothing is changed.
        """
        state_dict = with_start(state_dict)
        check_state(self.param_groups, self.defaults, state_dict)
        super().load_state_dict(state_dict)
        # PyTorch casts state to the parameter's dtype, and may share memory with what it is given.
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, number in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        self.state[param][name] = value.detach().to(param.device, copy=True)
        self._project()

    def _check_group(self, number: int) -> None:
        check_group(self.param_groups[number], number)
        check_start(self.param_groups[number], number)

    @torch.no_grad()
    def _start(self, group: dict[str, Any]) -> None:
        """Make the values of a group's parameters, and project them."""
        group["iteration"], group["rounded"] = 0, False
        group["beta"] = min(group["beta"] * group["beta_scale"], group["beta_max"])
        call = Call()
        for param in group["params"]:
            state = self.state[param]
            state["step"] = 0
            if is_quantized(group, param):
                state["scale"] = scale_of(group["scale"], param)
                state["value"] = first_value(group, param)
                call.project(group, param, state, group["beta"], False)
        call.run(self._backend)
