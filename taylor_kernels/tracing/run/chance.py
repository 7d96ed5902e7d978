"""Runs in which chance plays no part, and whether another run might go another way."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taylor_kernels.tracing.notes.operations import operation, tensors_of
from taylor_kernels.tracing.notes.record import Record

#: Operations whose results code may ask for; dropout only weighs what is there.
_DRAWS = {
    "rand", "rand_like", "uniform", "bernoulli", "randn", "randn_like", "normal", "randint",
    "randint_like", "random", "randperm", "multinomial", "exponential", "geometric", "poisson",
    "binomial", "cauchy", "log_normal",
}  # fmt: skip


class Draws:
    """Runs operations; uniform numbers that they draw are all the lowest or all the highest.

    Code that runs a layer, or masks some steps, with a probability asks whether such a number is
    below it: it does so with the lowest, and leaves it with the highest, whatever the caller's
    random state is. To be made and used inside `quiet`, as random states are set.

    Attributes:
        drew: something was drawn that code may ask for.
        asked: the modules whose code may have asked: in another run it may go another way.
        module: gives the name of the module that runs.

    Args:
        highest: numbers just below one in place of zeros.
    """

    def __init__(self, *, highest: bool) -> None:
        self.module: Callable[[], str] = str
        self._place = 1.0 - 2.0**-8 if highest else 0.0  # also below one in half precision
        self.drew = False
        self.asked: set[str] = set()
        torch.default_generator.manual_seed(int(highest))
        random.seed(int(highest))
        np.random.seed(int(highest))
        self._others = _other_states()

    def cross(self) -> None:
        """The run goes into a module with code of others, leaves one, or is over."""
        if (others := _other_states()) != self._others:
            self._others = others
            self.drew = True  # in Python, where nothing else can be seen of it
            self.asked.add(self.module())

    def enter(self, module: nn.Module) -> None:
        """The run goes into a module."""
        if not _draws_nothing(module):
            self.cross()

    def leave(self, module: nn.Module, outer: str, output: Any) -> None:
        """The run leaves a module for the one around it."""
        if _draws_nothing(module):
            return
        self.cross()
        if self.module() in self.asked and may_say(output):
            self.asked.add(outer)

    def __call__(self, func: Any, args: tuple, kwargs: Mapping, made: Any) -> Any:
        """Run an operation, as a recorder's `execute`."""
        out = func(*args, **kwargs) if made is None else made
        known = operation(func)
        if known.name in _DRAWS:
            self.drew = True
            drawn = tensors_of(out)
            if any(t.numel() == 1 and t.dim() < 2 for t in drawn):
                self.asked.add(self.module())
            ends = {"from": 0.0, "to": 1.0}
            if known.name == "uniform":
                ends = {
                    **known.defaults,
                    **dict(zip(known.arguments, args, strict=False)),
                    **kwargs,
                }
            if known.name in ("rand", "rand_like", "uniform"):
                for tensor in drawn:
                    tensor.fill_(ends["from"] + (ends["to"] - ends["from"]) * self._place)
        return out


def may_say(output: Any) -> bool:
    """Whether what a module returns may say what it has drawn, or been told of values: by what is
    beside tensors, or by nothing or an empty list."""
    leaves = tree_leaves(output)
    return (
        not leaves
        or output is None
        or any(not isinstance(leaf, (Tensor, type(None))) for leaf in leaves)
    )


def tell(record: Record, inside: str, outside: str, output: Any) -> None:
    """What a module has asked of values, its caller may see by what it returns."""
    if inside in record.counted:
        record.counted.add(outside)
    if inside in record.counted or (inside in record.asked and may_say(output)):
        record.asked.add(outside)


def _draws_nothing(module: nn.Module) -> bool:
    """Whether it is a layer of PyTorch's own and runs no code of others: it draws nothing that
    PyTorch does not, and what was drawn before it is seen as well behind it."""
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and not module._modules
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


def _other_states() -> tuple[Any, ...]:
    """The random states of Python and NumPy."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest
