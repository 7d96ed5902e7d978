"""Gradients as they come: each parameter's is handed on in backward() and freed at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from taylor_kernels.hooks import Hook, remove_all
from taylor_kernels.shards import local_part


class GradientStream:
    """Hooks on all parameters of a model that are trained, so that no gradient outlives its use.

    After a backward pass `.grad` of every parameter is None, whether `take` wanted it or not.

    Args:
        take: a method, called with a parameter whose gradient is complete, in `.grad`. Its object
            is not kept alive.
        watch: note whether gradients are finite; each is read once more for that.
    """

    def __init__(
        self, model: nn.Module, take: Callable[[nn.Parameter], None], *, watch: bool
    ) -> None:
        self._take, self._watch = weakref.WeakMethod(take), watch
        self._came: set[str] = set()
        self._greatest: list[Tensor] = []
        self._handles = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                before = Hook(self._check_empty, name, weakref.ref(parameter))
                self._handles.append(parameter.register_hook(before))
                complete = Hook(self._pass_on, name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(complete))

    @property
    def finite(self) -> bool:
        """Whether all gradients since the last clear() were, if they are watched."""
        if not self._greatest:
            return True
        device = self._greatest[0].device
        return bool(torch.stack([one.to(device) for one in self._greatest]).isfinite().all())

    def clear(self) -> None:
        """What comes from now on is another minibatch's."""
        self._came.clear()
        self._greatest.clear()

    def close(self) -> None:
        """Take the hooks off."""
        remove_all(self._handles)

    def _check_empty(
        self, name: str, parameter: weakref.ref[nn.Parameter], gradient: Tensor
    ) -> None:
        """Before a gradient is added to what there is: there is nothing.

        Raises:
            RuntimeError: there is.
        """
        held = parameter()
        if held is not None and held.grad is not None:
            raise RuntimeError(
                f"stream: {name} has a gradient from before, which this one would be added to; "
                "call zero_grad(set_to_none=True), and skip() to forget this pass"
            )

    def _pass_on(self, name: str, parameter: nn.Parameter) -> None:
        grad = parameter.grad
        try:
            if grad is None:
                return
            if name in self._came:
                raise RuntimeError(
                    f"stream: a second gradient of {name} came before update(), and the first is "
                    "gone: streamed gradients cannot be accumulated. Call update() after each "
                    "backward(), or skip() after one that failed or is not to count; or leave "
                    "stream out. Inside a checkpoint use use_reentrant=False"
                )
            self._came.add(name)
            if self._watch and grad.numel():
                values = grad.coalesce().values() if grad.is_sparse else local_part(grad)
                self._greatest.append(torch.linalg.vector_norm(values.detach(), float("inf")))
            if (take := self._take()) is not None:
                take(parameter)
        finally:
            parameter.grad = None
