"""Runs without the work: layers return tensors of the right shape, and nothing in them.

What a trace writes down follows from shapes and from which operation is given what. Values matter
only where code asks for them (in a condition, as an index, as a Python number), and nearly all of
a run's time goes to the products of its layers. So these are left out: the tensors that they return
are *hollow*, and so is what is made of these. An operation that could do something else for other
values, or that is not known, ends the run, and the model runs again as it is.

What is done to the elements of hollow tensors, puts them beside each other or copies them need not
run either: a tensor that nobody has written into takes no memory.

Only what is made of the model's inputs becomes hollow: a table that code works out of parameters
alone, and may keep for its next run, is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from taylor_kernels.tracing.notes.experts import is_router
from taylor_kernels.tracing.notes.memories import Memories
from taylor_kernels.tracing.notes.operations import memory_of, per_dimension
from taylor_kernels.tracing.run.calls import MOVES, READERS, RULES

if TYPE_CHECKING:
    from taylor_kernels.tracing.run.calls import Call

#: Operations that give numbers another type.
_CASTS = {"to", "_to_copy", "type_as"}


class NeedsValues(Exception):
    """An operation was given a hollow tensor, and may ask what is in it."""


def can_be_hollow(modules: Iterable[nn.Module]) -> bool:
    """Whether nothing that is known before a run asks for values in it.

    What routers choose is looked at behind the run, and hooks are a user's, who may keep what they
    see.
    """
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or is_router(m) for m in modules)


def is_worth_it(parameters: Iterable[Tensor], inputs: Iterable[Tensor]) -> bool:
    """Whether a run may take much longer than it takes to see what is hollow in it."""
    most = max((tensor.numel() for tensor in inputs), default=0)
    return most * sum(tensor.numel() for tensor in parameters) >= _WORTH_A_RUN


class Hollow:
    """Which tensors of a run are hollow.

    Args:
        memories: the run's.

    Attributes:
        asked: values were asked for: whatever has come of the run, the model has to run as it is.
    """

    def __init__(self, memories: Memories) -> None:
        self._memories = memories
        self._given: set[int] = set()  # the memory of all that is made of the model's inputs
        self._hollow: set[int] = set()  # of these what is hollow
        self.asked = False

    def given(self, inputs: Iterable[Tensor]) -> None:
        """The model is run on these."""
        self._given.update(map(self._memories.hold, inputs))

    def reads(self, tensor: Tensor) -> None:
        """Code is about to look at the values of a tensor.

        Raises:
            NeedsValues: it is hollow.
        """
        if memory_of(tensor) in self._hollow:
            self._refuse()

    def before(self, call: Call) -> tuple[Any, set[int] | None]:
        """What an operation would return, if it is left out, and where its results belong.

        Raises:
            NeedsValues: it may ask for values that are not there.
        """
        hollow = not self._hollow.isdisjoint(call.memories)
        if not hollow and self._given.isdisjoint(call.memories):
            return None, None
        if hollow:
            self._check(call)
        make = _MAKERS.get(call.name) or (_COPIERS.get(call.name) if hollow else None)
        made = None if make is None else make(call)
        return made, self._given if made is None and not hollow else self._hollow

    def after(self, kind: set[int], call: Call, written: Sequence[Tensor]) -> None:
        """It has run.

        Args:
            kind: as `before` said.
            written: the tensors that it has written into.
        """
        kind.update(call.lies)
        if written:
            kind.update(map(self._memories.hold, written))

    @property
    def kept(self) -> bool:
        """Whether somebody still holds a hollow tensor, as what code keeps for its next run."""
        return self._memories.alive(self._hollow)

    def _check(self, call: Call) -> None:
        if call.name in READERS or not (call.operation.pointwise or call.name in RULES):
            self._refuse()
        if _only_combines(call):
            return
        for tensor, key in zip(call.tensors, call.memories, strict=True):
            if key in self._hollow and not tensor.is_floating_point():
                self._refuse()  # an index, or a mask of places

    def _refuse(self) -> None:
        self.asked = True
        raise NeedsValues("values of the model's activations are asked for")


def _only_combines(call: Call) -> bool:
    """Whether an operation does the same to numbers, whatever they are."""
    return call.operation.pointwise or call.name in MOVES or call.name in _CASTS


def _dense(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors in main memory, whose results are laid out in order too.

    On other devices nobody waits for an operation to end.
    """
    dtype = None
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not tensor.is_contiguous() or not tensor.is_cpu:
            return False
        if dtype not in (None, tensor.dtype):
            return False
        dtype = tensor.dtype
    return True


def _linear(call: Call) -> Tensor | None:
    args = call.args
    x, weight, bias = args["input"], args["weight"], args.get("bias")
    if x.numel() * weight.size(0) < _WORTH or x.dim() < 2 or weight.dim() != 2:
        return None
    fits = x.size(-1) == weight.size(1) and (bias is None or bias.shape == weight.shape[:1])
    return x.new_empty((*x.shape[:-1], len(weight))) if fits and _dense(x, weight, bias) else None


def _convolution(call: Call) -> Tensor | None:
    args = call.args
    x, weight, bias = args["input"], args["weight"], args.get("bias")
    groups, dims = args["groups"], weight.dim() - 2
    if x.dim() != weight.dim() or isinstance(args["padding"], str):
        return None
    strides, pads, dilations = (
        per_dimension(args[name], dims) for name in ("stride", "padding", "dilation")
    )
    if min(*strides, *dilations, groups) < 1 or min(pads) < 0 or not weight.numel():
        return None
    sizes = [
        (size + 2 * pad - every * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, every in zip(
            x.shape[2:], weight.shape[2:], strides, pads, dilations, strict=True
        )
    ]
    fits = (
        min(sizes) > 0
        and x.size(1) == weight.size(1) * groups
        and weight.size(0) % groups == 0
        and (bias is None or bias.shape == weight.shape[:1])
        and x.size(0) * prod(sizes) * weight.numel() >= _WORTH
        and _dense(x, weight, bias)
    )
    return x.new_empty((x.size(0), weight.size(0), *sizes)) if fits else None


def _batch_norm(call: Call) -> Tensor | None:
    args = call.args
    x, mean, var = args["input"], args["running_mean"], args["running_var"]
    if args["training"] == (mean is not None) or x.dim() < 2 or x.numel() < _WORTH_A_NORM:
        return None  # in training it writes into its buffers
    sides = (mean, var, args["weight"], args["bias"])
    fits = all(side is None or side.shape == x.shape[1:2] for side in sides)
    return x.new_empty(x.shape) if fits and _dense(x, *sides) else None


def _pointwise(call: Call) -> Tensor | None:
    """As wide as the widest operand; of in-place forms the first one, which keeps what it holds."""
    widest = max(call.tensors, key=Tensor.numel)
    if widest.numel() < _WORTH or not widest.is_floating_point() or not _dense(*call.tensors):
        return None
    for tensor in call.tensors:
        pairs = zip(reversed(tensor.shape), reversed(widest.shape), strict=False)
        if tensor.dim() > widest.dim() or any(one not in (1, other) for one, other in pairs):
            return None  # the result is wider still, or PyTorch says what does not fit
    if complex in map(type, call.args.values()):
        return None
    first = call.args["self"]
    if call.operation.written:
        return (
            first if call.operation.written == ("self",) and first.shape == widest.shape else None
        )
    return widest.new_empty(widest.shape)


def _cat(call: Call) -> Tensor | None:
    parts, dim = call.args["tensors"], call.args.get("dim", 0)
    first = parts[0]
    if not first.is_floating_point() or not -first.dim() <= dim < first.dim():
        return None
    sizes = [list(part.shape) for part in parts if part.dim() == first.dim()]
    along = [size.pop(dim) for size in sizes]
    if len(sizes) < len(parts) or any(size != sizes[0] for size in sizes) or "out" in call.args:
        return None
    shape = list(first.shape)
    shape[dim] = sum(along)
    return first.new_empty(shape) if prod(shape) >= _WORTH and _dense(*parts) else None


def _pad(call: Call) -> Tensor | None:
    x, pads = call.args["self"], call.args["pad"]
    if x.numel() < _WORTH or len(pads) > 2 * x.dim() or len(pads) % 2 or not _dense(x):
        return None
    sizes = list(x.shape)
    for back, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True), 1):
        sizes[-back] += before + after
    padded = call.args.get("mode", "constant") == "constant" and min(pads, default=-1) >= 0
    return x.new_empty(sizes) if padded and any(pads) else None


def _contiguous(call: Call) -> Tensor | None:
    x, form = call.args["self"], call.args["memory_format"]
    # By default it is a number in PyTorch's own table of formats, whose first is this one.
    if form not in (0, torch.contiguous_format) or x.numel() < _WORTH or x.is_contiguous():
        return None
    return x.new_empty(x.shape) if type(x) in _PLAIN and x.is_cpu else None


_PLAIN = (Tensor, nn.Parameter)
#: So many multiply-adds at least are left out: fewer take no longer than it takes to see to it.
_WORTH = 2**14
#: So many numbers of a norm: PyTorch calls operation after operation for it.
_WORTH_A_NORM = 2**10
#: Entries of parameters times entries of an input: twenty networks of width 32 have fewer, none of
#: the usual size.
_WORTH_A_RUN = 2**28
#: Layers that are left out, and how to make what they return; None where they have to run.
_MAKERS: dict[str, Callable[[Call], Tensor | None]] = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "batch_norm": _batch_norm,
}
#: What is left out beside them where a tensor is hollow already: others may be asked for values.
_COPIERS: dict[str, Callable[[Call], Tensor | None]] = {
    **dict.fromkeys(
        (
            "add", "sub", "mul", "div", "relu", "hardtanh", "hardswish", "hardsigmoid", "sigmoid",
            "silu", "gelu", "tanh", "elu", "leaky_relu", "mish", "softplus", "clamp", "neg",
        ),
        _pointwise,
    ),
    "cat": _cat,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "contiguous": _contiguous,
}  # fmt: skip
