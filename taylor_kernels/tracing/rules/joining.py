"""Concatenation, stacking, padding and what else puts channels beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.rules.elementwise import merged_vector, repeated_as
from taylor_kernels.tracing.rules.reshapes import reshaped
from taylor_kernels.tracing.run.calls import Call, rule


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Labels:
    parts = [call.of(tensor) for tensor in call.args["tensors"]]
    parts = [part for part in parts if part.shape != (0,)]
    result = Labels.fixed(call.out.shape)
    if not parts:
        return result
    along = call.args.get("dim", 0) % len(result.shape)
    constant = all(part.is_uniform for part in parts)
    loose: set[int] = set()
    for dim in range(len(result.shape)):
        if dim != along:
            result.dims[dim] = _beside(call, parts, dim)
            if all(part.is_uniform or dim in part.repeated for part in parts) and not constant:
                loose.add(dim)
        elif not constant:
            vectors = [call.atoms(part, dim) for part in parts]
            if any(vector is not None and vector.any() for vector in vectors):
                whole = [
                    np.zeros(part.shape[dim], np.int64) if vector is None else vector
                    for part, vector in zip(parts, vectors, strict=True)
                ]
                result.dims[dim] = np.concatenate(whole)
        result.zero[dim] = all(
            part.is_zero(dim) or (part.dims[dim] is None and dim == along) for part in parts
        )
    result.loose, result.memory.repeated = frozenset(loose), bool(loose)
    result.counted = tuple(
        counted for part in parts for counted in part.counted if counted[0] in loose
    )
    return result


def _beside(call: Call, parts: Sequence[Labels], dim: int) -> Vector | None:
    """What a dimension has of tensors that are put beside each other along another one: one place
    that was repeated along it follows the others, as the key of DeepSeek's that all heads share."""
    wide = [part for part in parts if not part.is_uniform and dim not in part.repeated]
    merged = merged_vector(call, [part.dims[dim] for part in wide])
    for part in parts:
        if not part.is_uniform and dim in part.repeated:
            repeated_as(call, merged, part, dim)
    return merged


@rule("stack")
def stack(call: Call) -> Labels:
    parts = [call.of(tensor) for tensor in call.args["tensors"]]
    result = Labels.fixed(call.out.shape)
    new = call.args.get("dim", 0) % len(result.shape)
    kept = [dim for dim in range(len(result.shape)) if dim != new]
    for dim, place in enumerate(kept):
        result.dims[place] = _beside(call, parts, dim)
        result.zero[place] = all(part.is_zero(dim) for part in parts)
    return result


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Labels:
    """Places are added before and after; they are fixed, their number is a constant."""
    amounts: Sequence[int] = call.args["pad"]
    old = call.of(call.args["self"])
    mode = call.args.get("mode", "constant")
    result = Labels.fixed(call.out.shape)
    result.zero = list(old.zero)
    for dim in range(len(old.shape)):
        back = len(old.shape) - 1 - dim
        before, after = amounts[2 * back : 2 * back + 2] if 2 * back + 1 < len(amounts) else (0, 0)
        vector = old.dims[dim]
        if vector is None or (before == 0 and after == 0):
            result.dims[dim] = vector
        elif mode == "constant" and before >= 0 and after >= 0 and not call.args.get("value"):
            blank = [np.zeros(before, np.int64), vector, np.zeros(after, np.int64)]
            result.dims[dim] = np.concatenate(blank)
        else:
            call.refuse(vector, "is padded along its dimension")
    return result


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(call: Call) -> Labels:
    """A reshape, a transposition and a reshape."""
    old = call.of(call.args["self"])
    down = call.name == "pixel_unshuffle"
    factor = call.args["downscale_factor" if down else "upscale_factor"]
    *lead, channels, height, width = old.shape
    n = len(lead)
    if down:
        shape = (*lead, channels, height // factor, factor, width // factor, factor)
        order = [*range(n + 1), n + 2, n + 4, n + 1, n + 3]
    else:
        shape = (*lead, channels // factor**2, factor, factor, height, width)
        order = [*range(n + 1), n + 3, n + 1, n + 4, n + 2]
    grid = reshaped(call, old, shape, allowed=[n])
    moved = Labels(
        tuple(shape[i] for i in order), [grid.dims[i] for i in order],
        [grid.zero[i] for i in order], memory=old.memory,
    )  # fmt: skip
    return reshaped(call, moved, call.out.shape)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Labels:
    old = call.of(call.args["self"])
    batch, channels, *space = old.shape
    groups = call.args["groups"]
    grid = reshaped(call, old, (batch, groups, channels // groups, *space), allowed=[2])
    order = [0, 2, 1, *range(3, len(grid.shape))]
    moved = Labels(
        tuple(grid.shape[i] for i in order), [grid.dims[i] for i in order],
        [grid.zero[i] for i in order], memory=old.memory,
    )  # fmt: skip
    return reshaped(call, moved, call.out.shape)


@rule("glu")
def glu(call: Call) -> Labels:
    """The first half times the sigmoid of the second."""
    old = call.of(call.args["self"])
    dim = call.args.get("dim", -1) % len(old.shape)
    result = Labels(tuple(call.out.shape), list(old.dims), list(old.zero))
    vector = old.dims[dim]
    if vector is not None:
        half = vector.size // 2
        call.join(vector[:half], vector[half:])
        result.dims[dim] = vector[:half]
    return result


@rule("im2col", "col2im")
def columns(call: Call) -> Labels:
    """Patches of an image: the channels of a patch are a channel of the image times its places."""
    old = call.of(call.args["self"])
    result = Labels.fixed(call.out.shape)
    batched = len(old.shape) == (4 if call.name == "im2col" else 3)
    kernel = int(np.prod(call.args["kernel_size"]))
    place = 1 if batched else 0
    if batched:
        result.dims[0] = old.dims[0]
    vector: Vector | None = old.dims[place]
    for later in old.dims[place + 1 :]:
        call.mix(later)
    result.zero[place] = old.is_zero(place)
    if vector is None:
        return result
    if call.name == "im2col":
        result.dims[place] = np.repeat(vector, kernel)
    else:
        channel, inside = call.record.grid(vector.reshape(-1, kernel), call.where)
        result.dims[place] = channel
        call.refuse(inside, "is a place of a patch")
    return result
