"""What lets runs of a model be compared: small examples, double precision, no chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from taylor_kernels.pruning.alone import HIDING, is_alone
from taylor_kernels.pruning.defaults import WIDER, InDoubleBelow, made_in_double, widened, wider
from taylor_kernels.tracing.running import tensors_in, tensors_of_modules

_CASTS: dict[Any, Any] = {
    Tensor.half: Tensor.double,
    Tensor.bfloat16: Tensor.double,
    Tensor.float: Tensor.double,
}


_POOLS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}


def widen(modules: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put a model into double precision; what is returned puts it back.

    Args:
        modules: dict(model.named_modules()).
    """
    parameters, buffers = tensors_of_modules(modules)
    held = [(tensor, tensor.dtype) for tensor in (*parameters.values(), *buffers.values())]
    others = [
        (module, name, value)
        for module in modules.values()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and all(value is not tensor for tensor, _ in held)
    ]
    for tensor, _ in held:
        tensor.data = widened(tensor.data)
    for module, name, value in others:
        setattr(module, name, widened(value.detach()))

    def back() -> None:
        for tensor, dtype in held:
            tensor.data = tensor.data.to(dtype)
        for module, name, value in others:
            setattr(module, name, value)

    return back


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
            step = 32 if size >= 128 else 16  # networks halve images up to five times
            value = value.narrow(dim, 0, min(size, -(-size // (4 * step)) * step))
        return value

    return tree_map(cut, example_inputs)


class Noise:
    """Random numbers in [-0.5, 0.5) to add to tensors: as many as a prime says, again and again.

    To draw them takes longer than a small model runs. The rows of a tensor get different ones, as
    no width that tensors have is a multiple of the prime.
    """

    _PERIOD = 65537

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(self._PERIOD, generator=self._generator, dtype=torch.float64) - 0.5
        self._drawn = torch.cat([drawn, drawn])

    def add_to(self, tensor: Tensor, scale: float = 1.0) -> Tensor:
        """Add them in place to a dense tensor of floating-point numbers, from a random place on;
        others stay as they are."""
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            return tensor
        begin = int(torch.randint(self._PERIOD, (), generator=self._generator))
        noise = self._drawn[begin : begin + min(tensor.numel(), self._PERIOD)].to(tensor)
        for part in tensor.as_strided((tensor.numel(),), (1,)).split(self._PERIOD):
            part.add_(noise[: part.numel()], alpha=scale)
        return tensor


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


#: Whose groups are run at once, if what they read is no more than so many numbers: 128 MiB.
_GROUPED = {F.conv1d, F.conv2d, F.conv3d}
_MOST = 2**24
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
    """A convolution of several groups, as a product of matrices for each; None for others.

    In double precision PyTorch runs them group after group, a thousand calls for a depthwise layer.
    What does not fit together is left to PyTorch, which says so.
    """
    n = weight.dim() - 2
    fits = (
        groups > 1
        and input.numel() > 0
        and not isinstance(padding, str)
        and input.dim() == n + 2
        and input.size(1) == weight.size(1) * groups
        and weight.size(0) % groups == 0
        and input.dtype == weight.dtype == torch.float64
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if not fits:
        return None
    strides, paddings, dilations = _each(stride, n), _each(padding, n), _each(dilation, n)
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


def _each(value: Any, dims: int) -> list[int]:
    """What PyTorch makes of an argument that is one for all dimensions, or one for each."""
    return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))


#: Operations that fill a tensor with draws of one kind, and the part of the name that says so.
_DRAWS = ("bernoulli", "rand", "randn", "normal", "uniform", "exponential", "log_normal", "cauchy")


class SteadyNoise(TorchDispatchMode):
    """Whatever is drawn at random is one number everywhere, and dropout drops nothing.

    Random numbers are drawn place after place, so that a place without its neighbours would get
    other ones. What is left out of them says nothing of how channels hang together.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        name = func._schema.name.rpartition("::")[2].strip("_").removesuffix("_like")
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        out = func(*args, **(kwargs or {}))
        return out.fill_(1.0) if name in _DRAWS else out
