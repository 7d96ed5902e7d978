"""Operations on elements: the labels that meet are one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.entries import Size
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.run.calls import OTHER, Call, rule

#: Elementwise operations without PyTorch's tag for them.
_UNTAGGED = {
    "_prelu_kernel", "_to_copy", "clone", "copy", "fill", "zero", "where", "masked_fill",
    "native_dropout", "bernoulli", "uniform", "contiguous", "to", "lift_fresh",
    "rrelu_with_noise", "hardswish", "_fused_dropout", "celu", "selu", "threshold", "rrelu",
    "dropout", "alpha_dropout", "feature_dropout", "exponential",
    "random", "_conj", "conj", "resolve_conj", "resolve_neg", "type_as", "nan_to_num",
    "complex", "polar", "normal", "poisson", "_standard_gamma", "geometric", "cauchy", "log_normal",
}  # fmt: skip
#: f(0) = 0, whatever the other arguments are.
_KEEP_ZERO = {
    "relu", "relu6", "gelu", "silu", "tanh", "neg", "abs", "clone", "_to_copy", "to", "contiguous",
    "hardswish", "leaky_relu", "elu", "celu", "selu", "sqrt", "square", "sin", "sinh", "tan", "erf",
    "sign", "mish", "prelu", "_prelu_kernel", "dropout", "native_dropout", "hardshrink", "asin",
    "softshrink", "trunc", "round", "floor", "ceil", "atan", "asinh", "atanh", "expm1", "log1p",
    "feature_dropout", "rrelu", "rrelu_with_noise", "zero", "_conj", "conj", "resolve_conj",
    "resolve_neg", "type_as", "isnan", "isinf", "nan_to_num", "positive",
}  # fmt: skip
#: Zero where one operand is.
PRODUCTS = {"mul", "logical_and", "bitwise_and"}
#: Zero where all operands are.
_SUMS = {"add", "sub", "rsub", "maximum", "minimum", "where", "lerp", "logical_or", "hypot"}
#: The operands after the first do not matter where the first is zero.
QUOTIENTS = {"div", "true_divide", "floor_divide", "divide"}
#: Operations of which only the first operand says where its channels are.
_FIRST = {"zero", "type_as", "bernoulli", "uniform"}
#: Operations that give every value back, but for its type.
_SAME_VALUES = {"_to_copy", "to", "type_as", "clone", "contiguous"}


def is_elementwise(call: Call) -> bool:
    """Whether an operation computes each element from those at its place."""
    return call.operation.pointwise or call.name in _UNTAGGED


@rule(*_UNTAGGED)
def elementwise(call: Call) -> Labels | list[Labels | None]:
    shapes = [out.shape for out in call.outs] or [call.tensors[0].shape]
    operands = call.tensors
    if call.name in _FIRST:
        operands = operands[:1]
    if call.name == "copy":
        operands = [call.args["src"]]  # what was there before is gone
    labels = meet(call, operands, shapes[0])
    if call.name == "copy":
        labels.name = ""
    return labels if len(shapes) == 1 else [labels] * len(shapes)


@rule("log_sigmoid_forward")
def log_sigmoid(call: Call) -> list[Labels | None]:
    """It keeps something for its gradient beside what it returns."""
    return [meet(call, call.tensors[:1], call.outs[0].shape), None]


def meet(call: Call, operands: Sequence[Tensor], shape: Sequence[int]) -> Labels:
    """Unite the labels of operands that broadcast to a shape."""
    parts = [call.of(tensor) for tensor in operands]
    first = parts[0] if parts else Labels.fixed(shape)
    if len(parts) == 1 and first.shape == tuple(shape) and not first.uniform and not first.loose:
        if call.name in _KEEP_ZERO and not first.memory.spoiled:
            zero = list(first.zero)
        else:
            zero = [_zero(call, parts, parts, dim) for dim in range(len(shape))]
        computed = first.computed or call.name not in _SAME_VALUES
        return Labels(first.shape, list(first.dims), zero, name=first.name, computed=computed)
    fixed = [part for part in parts if not part.is_uniform]
    result = Labels.fixed(shape)
    result.uniform = bool(parts) and not fixed
    if result.uniform:
        result.dims = [np.zeros(size, np.int64) for size in shape]
        sizes = (size for p in parts if p.shape == result.shape for size in p.counted)
        result.counted = tuple(dict.fromkeys(sizes))
        if call.name in _KEEP_ZERO or call.name in PRODUCTS or call.name in _SUMS:
            result.zero = [all(all(p.zero) for p in parts)] * len(shape)
        return result
    if all(part.shape == result.shape and not part.loose for part in fixed):
        for dim in range(len(shape)):
            result.dims[dim] = merged_vector(call, [part.dims[dim] for part in fixed])
            if result.dims[dim] is not None:
                result.zero[dim] = _zero(call, parts, fixed, dim)
        _size_made(call, parts, result)
        return _named(call, parts, result)
    loose: set[int] = set()
    for dim in range(-len(shape), 0):
        size = shape[dim]
        # Scalars in a tensor, and tensors with fewer dimensions, broadcast too.
        here = [part for part in fixed if len(part.shape) >= -dim]
        same = [part for part in here if part.shape[dim] == size]
        wide = [part for part in same if len(part.shape) + dim not in part.repeated]
        if same and not wide:
            loose.add(len(shape) + dim)
        for part in here:
            if part.shape[dim] != size:
                call.refuse(part.dims[dim], "is a single channel that is broadcast")
        merged = merged_vector(call, [part.dims[dim] for part in wide])
        result.dims[dim] = merged
        if merged is not None:
            result.zero[dim] = _zero(call, parts, wide, dim)
            for part in same:
                if len(part.shape) + dim in part.repeated:
                    repeated_as(call, merged, part, dim)
    result.loose = frozenset(loose)
    result.counted = tuple(
        (place + len(shape) - len(part.shape), module, attribute)
        for part in fixed
        for place, module, attribute in part.counted
        if place + len(shape) - len(part.shape) in loose
    )
    result.memory.repeated = bool(loose)
    _size_made(call, parts, result)
    return _named(call, parts, result)


def _size_made(call: Call, parts: Sequence[Labels], result: Labels) -> None:
    """What attributes say of the sizes of tensors of one value, or of noise, that code has made."""
    for part in parts:
        if part.is_uniform and part.counted:
            more = len(result.shape) - len(part.shape)
            for dim in {place for place, _, _ in part.counted}:
                if part.shape[dim] == result.shape[dim + more]:
                    repeated_as(call, result.dims[dim + more], part, dim)


def repeated_as(call: Call, vector: Vector | None, other: Labels, dim: int) -> None:
    """One place of the other tensor is repeated for each of these, as often as attributes say."""
    if vector is None:
        return
    for place, module, attribute in other.counted:
        if place == dim % len(other.shape):
            call.record.sizes.append(Size(module, attribute, vector.copy(), True))


def _named(call: Call, parts: Sequence[Labels], result: Labels) -> Labels:
    """The result, with the name of what it is computed of place by place."""
    quotient = call.name in QUOTIENTS and all(part.name for part in parts)
    if len(parts) == 1 or ((quotient or call.name in _KEEP_ZERO) and parts):
        result.name, result.computed = parts[0].name, True
    return result


def merged_vector(call: Call, vectors: Sequence[Vector | None]) -> Vector | None:
    """One vector for several that meet place by place."""
    if not vectors:
        return None
    first = vectors[0]
    for other in vectors[1:]:
        if other is first:
            continue
        call.join(first, other)
        if first is None or other is None:
            first = first if other is None else other
        elif not first.all():
            first = np.where(first == 0, other, first)
    return first


def _zero(call: Call, parts: Sequence[Labels], wide: Sequence[Labels], dim: int) -> bool:
    """Whether the result is zero along this dimension where the operands' atoms are masked."""
    zero = [part.is_zero(dim) for part in wide]
    if call.name == "where":
        parts = [call.of(v) for v in map(call.args.get, ("self", "other")) if isinstance(v, Tensor)]
        wide = [part for part in wide if any(part is other for other in parts)]
        zero = [part.is_zero(dim) for part in wide]
    scalars = any(
        isinstance(call.args.get(name), (int, float)) and call.args[name] != 0
        for name in ("self", "other", "value")
    )
    if call.name in _KEEP_ZERO:
        return bool(zero) and zero[0]
    if call.name in PRODUCTS:
        return any(zero)
    if call.name in QUOTIENTS:
        return call.of(call.args["self"]) in wide and zero[0]
    if call.name in _SUMS:
        # A broadcast operand, or a scalar, adds something everywhere.
        return all(zero) and len(wide) == len(parts) and not scalars
    if call.name == "pow":
        exponent = call.args.get("exponent")
        return isinstance(exponent, (int, float)) and exponent > 0 and all(zero)
    if call.name in ("hardtanh", "clamp"):
        low, high = call.arg("min_val", "min"), call.arg("max_val", "max")
        return all(zero) and (low is None or low <= 0) and (high is None or high >= 0)
    if call.name in ("copy", "fill"):
        # What was there before is gone.
        source = call.arg("src", "value")
        if not isinstance(source, Tensor):
            return source == 0
        labels = call.of(source)
        return any(labels is part for part in wide) and labels.is_zero(dim)
    if call.name == "masked_fill":
        return bool(zero) and zero[0] and call.args.get("value") == 0
    if call.name == "addcmul":
        return all(zero) and len(wide) == len(parts)
    return False


@rule(OTHER)
def other(call: Call) -> Labels | list[Labels | None] | None:
    """An operation without a rule: elementwise by its tag, else its channels stay."""
    if is_elementwise(call):
        return elementwise(call)
    call.refuse_all("goes through an operation that is not known")
    return None
