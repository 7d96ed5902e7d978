"""Runs without the work: layers return tensors of the right shape, and nothing in them.

What a trace writes down follows from shapes and from which operation is given what. Values matter
only where code asks for them (in a condition, as an index, as a Python number), and nearly all of
a run's time goes to the products of its layers. So these are left out: the tensors that they return
are *hollow*, and so is what is made of these. An operation that could do something else for other
values, or that is not known, ends the run, and the model runs again as it is.

Only what is made of the model's inputs becomes hollow: a table that code works out of parameters
alone, and may keep for its next run, is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from taylor_kernels.tracing.calls import MOVES, RULES
from taylor_kernels.tracing.experts import is_router
from taylor_kernels.tracing.memories import Memories
from taylor_kernels.tracing.operations import memory_of

if TYPE_CHECKING:
    from taylor_kernels.tracing.calls import Call

#: Operations that give numbers another type.
_CASTS = {"to", "_to_copy", "type_as"}
#: Operations that have a rule and make Python numbers of values.
_READERS = {"_local_scalar_dense", "item", "equal"}


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
        self._mark(self._given, inputs)

    def reads(self, tensor: Tensor) -> None:
        """Code is about to look at the values of a tensor.

        Raises:
            NeedsValues: it is hollow.
        """
        if memory_of(tensor) in self._hollow:
            self._refuse()

    def run(self, call: Call, written: Sequence[Tensor], run: Callable[[Any], Any]) -> Any:
        """Run an operation, or make what it returns.

        Args:
            written: the tensors that it writes into.
            run: runs it; given what it returns, it only takes note of it.

        Raises:
            NeedsValues: it may ask for values that are not there.
        """
        hollow = given = False
        for tensor, key in zip(call.tensors, call.memories, strict=True):
            if key in self._hollow:
                hollow = True
                if not tensor.is_floating_point() and not _only_combines(call):
                    self._refuse()  # an index, or a mask of places
            elif key in self._given:
                given = True
        if not hollow and not given:
            return run(None)
        if hollow:
            name = call.name
            if name in _READERS or not (call.operation.pointwise or name in RULES):
                self._refuse()
        make = _MAKERS.get(call.name)
        made = None if make is None else make(call)
        out = run(made)
        kind = self._hollow if hollow or made is not None else self._given
        self._mark(kind, written)
        if isinstance(out, Tensor):
            self._mark(kind, (out,))
        elif isinstance(out, (list, tuple)):
            self._mark(kind, (part for part in out if isinstance(part, Tensor)))
        return out

    def _mark(self, kind: set[int], tensors: Iterable[Tensor]) -> None:
        kind.update(map(self._memories.hold, tensors))

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
    first = tensors[0]
    return all(
        tensor is None
        or (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.device.type == "cpu"
            and tensor.dtype == first.dtype  # type: ignore[union-attr]
            and tensor.is_contiguous()
        )
        for tensor in tensors
    )


def _linear(call: Call) -> Tensor | None:
    args = call.args
    x, weight, bias = args["input"], args["weight"], args.get("bias")
    fits = (
        x.dim() > 1
        and weight.dim() == 2
        and x.size(-1) == weight.size(1)
        and (bias is None or bias.shape == weight.shape[:1])
        and _dense(x, weight, bias)
    )
    return x.new_empty((*x.shape[:-1], weight.size(0))) if fits else None


def _convolution(call: Call) -> Tensor | None:
    args = call.args
    x, weight, bias = args["input"], args["weight"], args.get("bias")
    dims, padding = weight.dim() - 2, args["padding"]
    fits = (
        x.dim() == weight.dim()
        and not isinstance(padding, str)
        and x.size(1) == weight.size(1) * args["groups"]
        and weight.size(0) % args["groups"] == 0
        and (bias is None or bias.shape == weight.shape[:1])
        and _dense(x, weight, bias)
    )
    if not fits:
        return None
    strides, pads, dilations = (
        _each(args[name], dims) for name in ("stride", "padding", "dilation")
    )
    if min(*strides, *dilations) < 1 or min(pads) < 0 or not x.numel() or not weight.numel():
        return None
    sizes = [
        (size + 2 * pad - every * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, every in zip(
            x.shape[2:], weight.shape[2:], strides, pads, dilations, strict=True
        )
    ]
    return x.new_empty((x.size(0), weight.size(0), *sizes)) if min(sizes) > 0 else None


def _each(value: Sequence[int], dims: int) -> list[int]:
    """What PyTorch makes of an argument that is one for all dimensions, or one for each."""
    return list(value) * (dims // len(value))


def _batch_norm(call: Call) -> Tensor | None:
    args = call.args
    x, mean, var = args["input"], args["running_mean"], args["running_var"]
    sides = (mean, var, args["weight"], args["bias"])
    if args["training"] == (mean is not None) or x.dim() < 2 or not _dense(x, *sides):
        return None  # in training it writes into its buffers
    fits = all(side is None or side.shape == x.shape[1:2] for side in sides)
    return x.new_empty(x.shape) if fits else None


#: Layers that are left out, and how to make what they return; None where they have to run.
_MAKERS: dict[str, Callable[[Call], Tensor | None]] = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "batch_norm": _batch_norm,
}
