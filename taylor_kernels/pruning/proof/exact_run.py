"""What lets runs of a model be compared: small examples, double precision, no chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import cycle
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from taylor_kernels.pruning.proof.alone import HIDING, is_alone
from taylor_kernels.pruning.proof.defaults import WIDER, InDoubleBelow, made_in_double, wider
from taylor_kernels.tracing.notes.operations import OperationMode, per_dimension
from taylor_kernels.tracing.run.running import tensors_in

_CASTS: dict[Any, Any] = {
    Tensor.half: Tensor.double,
    Tensor.bfloat16: Tensor.double,
    Tensor.float: Tensor.double,
}


_POOLS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}


def cut_down(example_inputs: Any) -> Any:
    """An example of images with two of them, and a sixteenth of their area."""
    tensors = list(tensors_in(example_inputs))
    batches = {tensor.shape[:1] for tensor in tensors}
    images = len(batches) == 1 and any(tensor.dim() > 3 for tensor in tensors)

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value[:2] if images else value
        for dim in range(2, value.dim() if value.dim() > 3 else 0):
            size = value.size(dim)
            # Networks halve images up to five times, and small ones three times or so.
            step = 32 if size >= 128 else 8 if 16 < size <= 32 and value.dim() == 4 else 16
            value = value.narrow(dim, 0, min(size, -(-size // (4 * step)) * step))
        return value

    return tree_map(cut, example_inputs)


#: Numbers of a channel that show what code does to it, or so many images; and so many numbers in an
#: example at most.
_ROWS, _IMAGES, _FEW = 16, 7, 2**12
#: Of a prime number of rows no reshape(-1, width, ...) makes as many others of a wrong width: it
#: fails where it stands, which says what to look at.
_TIMES = (2, 3, 5, 7, 11, 13, 17)
_FACTORS = (1.0, -1.0, 3.0, -3.0)


def repeated(example_inputs: Any) -> Any:
    """A small example again and again along its first dimension, other ways round and greater; any
    other as it is.

    Of three rows a ReLU says nothing where they are all above zero: in one case of eight, and in
    more where a bias is greater than what comes of the example.
    """
    tensors = list(tensors_in(example_inputs))
    sizes = {tensor.shape[:1] for tensor in tensors}
    numbers = sum(tensor.numel() for tensor in tensors)
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if len(sizes) != 1 or not floating or not numbers or not floating[0].dim():
        return example_inputs
    first = floating[0]
    images = first.dim() == 4
    rows, enough = (len(first), _IMAGES) if images else (prod(first.shape[:-1]), _ROWS)
    fitting = [times for times in _TIMES if times * numbers <= _FEW]
    if rows >= enough or not fitting:
        return example_inputs
    times = next((times for times in fitting if times * rows >= enough), fitting[-1])

    def repeat(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copies = [value] * times
        if value.is_floating_point():
            copies = [value * factor for factor, _ in zip(cycle(_FACTORS), copies, strict=False)]
        return torch.cat(copies)

    return tree_map(repeat, example_inputs)


class SmallPools(TorchFunctionMode):
    """Windows that averages are taken over are no larger than an image that was cut down.

    Padded ones fit as they are.

    Attributes:
        idle: every function has been run as it was called.
        alone: a softmax or the like has been given single numbers, which it hides.
    """

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.alone = True, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        if func in HIDING:
            self.alone |= is_alone(func, args, kwargs or {})
        elif func in _POOLS and len(args) > 1:
            image, kernel, *rest = args
            if rest[1] if len(rest) > 1 else (kwargs or {}).get("padding", 0):
                return func(*args, **(kwargs or {}))
            sizes = image.shape[-3:] if func is F.avg_pool3d else image.shape[-2:]
            sizes = image.shape[-1:] if func is F.avg_pool1d else sizes
            kernel = [kernel] * len(sizes) if isinstance(kernel, int) else kernel
            fitting = [min(pair) for pair in zip(kernel, sizes, strict=True)]
            self.idle &= fitting == list(kernel)
            args = (image, fitting, *rest)
        return func(*args, **(kwargs or {}))


class InDouble(SmallPools):
    """What code would cast to, or make in, a lower precision is in double precision.

    So is what they make in the default precision, which is a setting of the process and stays as it
    is. It is one mode with `SmallPools`, since every mode adds to the time of every operation.

    Args:
        below: also what operations make that no mode for functions sees: those of scripted code,
            and of `torch.Tensor(...)`. It costs time at every operation.
    """

    def __init__(self, *, below: bool = False) -> None:
        super().__init__()
        self._below = InDoubleBelow() if below else nullcontext()

    def __enter__(self) -> InDouble:
        self._below.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        for value in args:
            if type(value) is torch.dtype:
                args = tuple(self._wider(value) for value in args)
                break
        if kwargs:
            kwargs = {name: self._wider(value) for name, value in kwargs.items()}
        if func not in _SPECIAL:
            out = func(*args, **kwargs) if kwargs else func(*args)
            if out.__class__ is Tensor and out.dtype in WIDER:
                self.idle = False
                return made_in_double(func, args, kwargs or {}, out)
            return out
        if func is torch.result_type:
            return self._wider(func(*args, **(kwargs or {})))
        if func in _GROUPED and (out := _grouped(*args, **(kwargs or {}))) is not None:
            self.idle = False
            return out
        self.idle &= func not in _CASTS
        return super().__torch_function__(_CASTS.get(func, func), types, args, kwargs)

    def _wider(self, value: Any) -> Any:
        found = wider(value)
        self.idle &= found is value
        return found


#: Whose groups are run at once, if what they read is no more than so many numbers: 128 MiB. PyTorch
#: runs as few as these in no more time.
_GROUPED = {F.conv1d, F.conv2d, F.conv3d}
_MOST, _FEW_GROUPS = 2**24, 4
#: Functions that are not run as they are.
_SPECIAL = {*_CASTS, *_GROUPED, *_POOLS, *HIDING, torch.result_type}


def _grouped(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """A convolution of many groups, as a product of matrices for each; None for others.

    In double precision PyTorch runs them group after group, a thousand calls for a depthwise layer.
    What does not fit together is left to PyTorch, which says so.
    """
    n = weight.dim() - 2
    fits = (
        groups > _FEW_GROUPS
        and input.numel() > 0
        and input.dim() == n + 2
        and input.size(1) == weight.size(1) * groups
        and weight.size(0) % groups == 0
        and input.dtype == weight.dtype == torch.float64
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if not fits or isinstance(padding, str):
        return None
    strides, paddings, dilations = (
        per_dimension(value, n) for value in (stride, padding, dilation)
    )
    padded = F.pad(input, [pad for pad in reversed(paddings) for _ in range(2)])
    kernel = weight.shape[2:]
    sizes = [
        (size - every * (k - 1) - 1) // step + 1
        for size, every, k, step in zip(padded.shape[2:], dilations, kernel, strides, strict=True)
    ]
    if min(sizes) < 1 or input.size(1) * len(input) * prod((*kernel, *sizes)) > _MOST:
        return None
    steps = padded.stride()[2:]
    moves = [step * by for step, by in zip(steps, strides, strict=True)]
    inside = [step * every for step, every in zip(steps, dilations, strict=True)]
    windows = padded.as_strided(
        (*padded.shape[:2], *kernel, *sizes), (*padded.stride()[:2], *inside, *moves)
    )
    columns = windows.reshape(len(input), groups, weight[0].numel(), -1)
    out = weight.reshape(groups, -1, columns.size(2)) @ columns
    out = out.reshape(len(input), len(weight), *sizes)
    return out if bias is None else out + bias.view(-1, *[1] * n)


#: Operations that fill a tensor with draws of one kind, and the part of the name that says so.
_DRAWS = (
    "bernoulli", "rand", "randn", "normal", "uniform", "exponential", "log_normal", "cauchy",
    "geometric", "poisson", "standard_gamma",
)  # fmt: skip


class SteadyNoise(OperationMode):
    """Whatever is drawn at random is one number everywhere, and dropout drops nothing.

    Random numbers are drawn place after place, so that a place without its neighbours would get
    other ones. What is left out of them says nothing of how channels hang together. Generators
    stand still meanwhile, so that what draws whole numbers later (keys of an attention) has the
    same ones, however many channels there were.

    Args:
        lowest: uniform numbers are just above zero in place of just below one, less than whatever
            probability code compares them with. Their logarithms are finite.
    """

    def __init__(self, *, lowest: bool = False) -> None:
        super().__init__()
        self._uniform = 2.0**-24 if lowest else 1 - 2.0**-8

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        name = func._schema.name
        if (kind := _kind_of_draw(name)) is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        if kind == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if not name.endswith("_"):
            generators = _generators((kwargs or {}).get("generator"))
            before = [generator.get_state() for generator in generators]
            out = func(*args, **(kwargs or {}))
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)
        else:
            out = args[0]
        middle = _middle(kind, args, out)
        if middle is not None:
            return out.copy_(middle)
        return out.fill_(self._uniform if kind in ("rand", "uniform") else 1.0)


def _middle(kind: str, args: tuple, out: Tensor) -> Tensor | None:
    """What depends on channels that draws are made for, of those that take tensors of such."""
    if out is args[0] or not any(isinstance(value, Tensor) for value in args[:2]):
        return None  # written into a tensor, whose values are gone
    if kind == "normal":
        return args[0] + (args[1] if len(args) > 1 else 1.0)
    return args[0] if kind in ("poisson", "standard_gamma") else None


@cache
def _kind_of_draw(name: str) -> str | None:
    """What an operation of this name fills tensors with, or "native_dropout"; None for others."""
    own = name.rpartition("::")[2]
    kind = own.strip("_").removesuffix("_like")
    return own if own == "native_dropout" else kind if kind in _DRAWS else None


def _generators(given: torch.Generator | None) -> list[torch.Generator]:
    """Those that an operation may draw from."""
    if given is not None:
        return [given]
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.default_generator, *(torch.cuda.default_generators if used else ())]
