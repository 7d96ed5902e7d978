"""ParameterFisher: a meter on a model that gives the Fisher diagonal of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from taylor_kernels.backends import check_name
from taylor_kernels.checks import check_choice, check_module, integer
from taylor_kernels.hooks import OnModel
from taylor_kernels.layout import accumulator
from taylor_kernels.parameter_fisher.calls import Call
from taylor_kernels.parameter_fisher.own_passes import Matrix, OwnPasses
from taylor_kernels.parameter_fisher.watch import Watch
from taylor_kernels.parameter_fisher.ways import find_parameters
from taylor_kernels.statistics import check_loss_scale
from taylor_kernels.statistics.hooks.passes import NOTHING_SEEN

Reduction = Literal["mean", "sum"]
_STATE_VERSION = 1


class ParameterFisher(OnModel):
    """mean_n g_n² of every parameter, element by element, g_n the gradient of example n's own loss.

    This is the diagonal of the empirical Fisher matrix (Kirkpatrick et al., PNAS 2017; Kunstner et
    al., NeurIPS 2019). Squares are of each example's gradient, not of the minibatch's, as if the
    batch size were 1, at about the price of a plain step: they are formed from the inputs of
    modules and the gradients of their outputs as these appear, and no tensor of examples times
    parameters exists.

    Call update() after every backward() of a loop; or hand it a closure in place of backward(),
    which computes no weight gradients:

        fisher = tk.ParameterFisher(model.eval())
        for x, y in batches:
            fisher.update(closure=lambda: loss_fn(model(x), y))
        importances = fisher.compute()

    With `matrix="gauss_newton"` it is the diagonal of the generalised Gauss-Newton matrix instead,
    Σ_k (∂(z_n·v_nk)/∂θ)² with V_n V_nᵀ = ∂²loss/∂z_n² at the model's output z_n (Schraudolph 2002):
    for softmax and cross entropy the Fisher matrix itself, without drawing labels. It takes a
    backward pass for each column of V, and a closure.

    Defined behaviour, by example:
        every kind of parameter: weights and biases of linear layers and of all convolutions,
            embeddings, affine parameters of BatchNorm, InstanceNorm, LayerNorm, GroupNorm and
            RMSNorm from one pass. Any other (an LSTM's, attention's, a class token) by running its
            module once more for each example, with a warning that names it.
        a parameter used several times, by modules that are called twice or that share it: the
            gradients of an example add up before they are squared.
        BatchNorm in train mode mixes examples: what is squared is the gradient of the minibatch's
            loss in the example's own share of a parameter, the way through the batch's statistics
            included. In eval mode, which is meant as a rule, it is that of the example's own loss.
        dropout: each example has its own mask, that of the pass.
        several calls of the model before one update(): their examples are examples of their own.
        frozen parameters: left out.
        parameters that no gradient reaches: 0.
        activation checkpointing: with use_reentrant=False.
        a penalty on parameters in the loss: not counted; only what comes through the model is.

    Dim 0 of what is passed to the model counts examples (dim 1 of an RNN with batch_first=False).

    Args:
        model: any nn.Module.
        parameters: names of the parameters to follow (* and ? match); None means all trained ones.
        reduction: whether the loss is the "mean" over the examples of a batch or their "sum".
        matrix: "empirical" or "gauss_newton".
        samples: with "gauss_newton", how many random probes to take in place of the columns of V:
            an unbiased estimate at that many backward passes. None: exact.
        seed: of these probes, up to 2**31; other ones are drawn at each update.
        backend: one of `tk.available_backends()`; None picks by device.

    Raises:
        ValueError: a name that matches nothing, a model without a trained parameter, an unknown
            reduction, matrix or backend.

    Example:
        >>> import torch, taylor_kernels as tk
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        >>> fisher = tk.ParameterFisher(model)
        >>> for _ in range(5):
        ...     model(torch.randn(8, 4)).square().sum(1).mean().backward()
        ...     fisher.update()
        >>> {name: tuple(diagonal.shape) for name, diagonal in fisher.compute().items()}
        {'0.weight': (3, 4), '0.bias': (3,), '1.weight': (3,), '1.bias': (3,)}
        >>> fisher.examples
        40
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        parameters: Sequence[str] | None = None,
        reduction: Reduction = "mean",
        matrix: Matrix = "empirical",
        samples: int | None = None,
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        check_module(model)
        check_name(backend)
        for name, value, known in (
            ("reduction", reduction, get_args(Reduction)),
            ("matrix", matrix, get_args(Matrix)),
        ):
            check_choice(name, value, known)
        seed = integer("seed", seed)
        if samples is not None and (matrix == "empirical" or samples < 1):
            raise ValueError(
                f"samples: {samples!r} with matrix={matrix!r}; give a positive number, with "
                "matrix='gauss_newton' alone"
            )
        self.reduction, self.matrix, self.samples = reduction, matrix, samples
        self._seed = seed << 32
        self._parameters = find_parameters(model, parameters)
        self._watch = Watch(model, self._parameters, backend, self._receive)
        self._passes = OwnPasses(self._watch, matrix, samples)
        self._pending: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._examples = 0
        self._updates = 0
        self._closed = False

    def update(
        self, *, loss_scale: float = 1.0, closure: Callable[[], Tensor] | None = None
    ) -> None:
        """Count the examples that went through the model and back since the last update().

        Args:
            loss_scale: what the loss was multiplied by before backward(), as by a GradScaler;
                divided out. A closure's loss is taken as it is.
            closure: returns the loss of the model as it stands, a scalar; in place of backward().
                `.grad` stays as it is.

        Raises:
            RuntimeError: no pass was seen; the meter is closed; a parameter that takes runs of its
                own gives an example other outputs alone than among the others.
            ValueError: `loss_scale` is not a positive number; a closure is missing for
                `matrix="gauss_newton"`, or returned no scalar that depends on the model.
        """
        check_loss_scale(loss_scale)
        self._require_open("update")
        watch = self._watch
        try:
            if closure is not None:
                self._discard()
                self._passes.run(closure, self._seed + self._updates)
                loss_scale = 1.0
            elif self.matrix == "gauss_newton":
                raise ValueError(
                    "closure: the Gauss-Newton matrix takes backward passes of its own; call "
                    "update(closure=lambda: loss_fn(model(x), y))"
                )
            watch.reduce()
            # A loss without curvature has no column to send back, and its zeros count.
            counted = bool(self._pending) or self.matrix == "gauss_newton"
            if not watch.calls or not counted:
                raise RuntimeError(NOTHING_SEEN)
            for name, found in self._pending.items():
                found = found / loss_scale**2 if loss_scale != 1.0 else found
                self._sums[name] = self._sums[name] + found if name in self._sums else found
            self._examples += sum(call.examples for call in watch.calls)
            self._updates += 1
        finally:
            self._discard()

    def skip(self) -> None:
        """Forget what was seen since the last update(), as of a minibatch that overflowed."""
        self._require_open("skip")
        self._discard()

    @property
    def examples(self) -> int:
        """How many examples were counted; compute() times this is their sum."""
        return self._examples

    def compute(self) -> dict[str, Tensor]:
        """{parameter's name: float32 in its shape (float64 of float64)}: the mean over examples.

        Names are those of `model.named_parameters()`.

        Raises:
            RuntimeError: there was no update yet.
        """
        if not self._examples:
            raise RuntimeError("compute(): there is nothing to compute from; call update() first")
        return {
            name: self._sums[name] / self._examples
            if name in self._sums
            else torch.zeros_like(parameter, dtype=accumulator(parameter.dtype)).detach()
            for name, parameter in self._parameters.items()
        }

    def sum(self) -> dict[str, Tensor]:
        """Σ_n g_n² of the parameters that a gradient has reached, as it is kept: not to be changed.

        Names and dtypes are those of compute(), which is this over `examples`.
        """
        return dict(self._sums)

    def reset(self) -> None:
        """Forget all updates, and what was seen since the last."""
        self._discard()
        self._sums, self._examples, self._updates = {}, 0, 0

    def close(self) -> None:
        """Take every hook off the model; what was counted stays, and none is added."""
        self._closed = True
        self._watch.close()
        self._discard()

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict() needs to go on: sums and counts."""
        return {
            "version": _STATE_VERSION,
            "matrix": self.matrix,
            "sums": {name: total.clone() for name, total in self._sums.items()},
            "examples": self._examples,
            "updates": self._updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict() of a meter on such a model.

        Raises:
            ValueError: it is of another version or matrix, or of other parameters; nothing is
                changed.
        """
        if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
            raise ValueError("state: is no state_dict() of a tk.ParameterFisher of this version")
        if state["matrix"] != self.matrix:
            raise ValueError(f"state: is of the {state['matrix']} matrix, this of {self.matrix}")
        for name, total in state["sums"].items():
            known = self._parameters.get(name)
            if known is None or known.shape != total.shape:
                raise ValueError(
                    f"state: has {name!r} of shape {tuple(total.shape)}, which is "
                    f"{'not here' if known is None else f'{tuple(known.shape)} here'}; load it "
                    "into a meter on the same model"
                )
        self._discard()
        self._sums = {
            name: total.clone().to(self._parameters[name].device)
            for name, total in state["sums"].items()
        }
        self._examples, self._updates = state["examples"], state["updates"]

    def _receive(self, call: Call, name: str, squares: Tensor) -> None:
        """Σ_n g_n² of a call, g_n as the loss's reduction left it."""
        factor = self._passes.sign
        if self.reduction == "mean":  # dy carries 1/N of a mean, a root of its curvature 1/√N
            factor *= call.examples ** (2 if self.matrix == "empirical" else 1)
        known = self._pending.get(name)
        if known is not None:
            known.add_(squares, alpha=factor)
        else:
            self._pending[name] = squares if factor == 1 else squares.mul_(factor)

    def _discard(self) -> None:
        self._watch.discard()
        self._pending = {}

    def _require_open(self, method: str) -> None:
        if self._closed:
            raise RuntimeError(f"{method}(): this meter is closed; make a new one")
