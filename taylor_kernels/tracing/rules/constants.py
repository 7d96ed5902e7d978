"""Tensors that code makes: of one value, or of noise, they fit any width; others are fixed."""

from __future__ import annotations

import numpy as np

from taylor_kernels.tracing.notes.attributes import counting
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.run.calls import Call, rule


@rule(
    "zeros", "ones", "full", "empty", "scalar_tensor", "empty_strided",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "rand", "randn",
)  # fmt: skip
def uniform(call: Call) -> Labels:
    shape = tuple(call.out.shape)
    vectors = [np.zeros(size, np.int64) for size in shape]
    zero = call.name.endswith("zeros") or call.arg("fill_value") == 0
    counted = tuple(
        (dim, call.holder[1], attribute)
        for dim, size in enumerate(shape)
        for attribute in counting(call, size, weak=True)
    )
    return Labels(shape, list(vectors), [zero] * len(shape), uniform=True, counted=counted)


@rule("arange", "linspace", "logspace", "randint", "randperm", "eye")
def positional(call: Call) -> None:
    """Its values depend on the place, and its width may be a constant."""


@rule(
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"
)
def like(call: Call) -> Labels:
    """The shape follows a tensor's; the memory is its own."""
    source = call.of(call.args["self"])
    vectors = [None if vector is None else vector.copy() for vector in source.dims]
    zero = call.name == "zeros_like"
    return Labels(source.shape, vectors, [zero] * len(vectors), uniform=source.is_uniform)


@rule(
    "sym_size",
    "sym_stride",
    "sym_numel",
    "_local_scalar_dense",
    "item",
    "size",
    "stride",
    "equal",
    "_nested_tensor_from_mask_left_aligned",
)
def numbers(call: Call) -> list:
    """Python numbers: what code does with them cannot be seen, only proven."""
    return [None for _ in call.outs]
