"""Products: the contracted dimension joins its operands, the others are carried along."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from torch import Tensor

from taylor_kernels.tracing.multihead import PrunedMultiheadAttention
from taylor_kernels.tracing.notes.atoms import Vector
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.notes.steps import Product
from taylor_kernels.tracing.rules.elementwise import meet, merged_vector, repeated_as
from taylor_kernels.tracing.run.calls import Call, rule


def contract(call: Call, one: Labels, dim: int, other: Labels, other_dim: int) -> None:
    """Join the dimensions that a product sums over."""
    left, right = call.atoms(one, dim), call.atoms(other, other_dim)
    call.join(left, right)
    if left is None or right is None:
        return
    if not one.is_zero(dim) and not other.is_zero(other_dim):
        text = "is multiplied with another activation and is not zero where it is masked"
        call.record.fix(left, call.reason(text, mixer=True))


def layer(
    call: Call, weight: Labels, inputs: Vector | None, outputs: Vector | None,
    groups: Vector | None = None, macs: int = 0,
) -> None:  # fmt: skip
    """Write down that a parameter was used as a layer's weight."""
    name = weight.name or call.recorder.origin(outputs)[0] or call.recorder.origin(inputs)[0]
    if not name:
        return
    owner = call.recorder.owner(name)
    zeros = np.zeros(0, np.int64)
    call.record.products.append(
        Product(
            name, owner, zeros if inputs is None else inputs.copy(),
            zeros if outputs is None else outputs.copy(), groups, macs,
            call.recorder.module, call.record.step, bool(weight.name) and not weight.computed,
        )
    )  # fmt: skip


def is_weight(call: Call, labels: Labels) -> bool:
    """Whether an operand of a product of matrices is a weight, or a stack of some."""
    if len(labels.shape) <= 2 or not labels.name:
        return len(labels.shape) == 2 and bool(labels.name)
    # A dimension of it may be several of the parameter's, put together.
    return all(call.recorder.origin(vector)[0] == labels.name for vector in labels.dims[-2:])


def add_bias(call: Call, bias: Tensor | None, result: Labels, dim: int) -> None:
    """A vector that is added along one dimension of a product."""
    if bias is None:
        return
    labels = call.of(bias)
    vector = labels.dims[-1] if labels.dims else None
    call.join(result.dims[dim], vector)
    if vector is None or not labels.is_zero(-1):
        result.zero[dim] = False
    if result.dims[dim] is None:
        result.dims[dim] = vector


@rule("linear")
def linear(call: Call) -> Labels:
    source, weight = call.of(call.args["input"]), call.of(call.args["weight"])
    result = Labels.fixed(call.out.shape)
    if len(weight.shape) == 1:
        contract(call, source, -1, weight, -1)
        return result
    contract(call, source, -1, weight, 1)
    result.dims = [*source.dims[:-1], weight.dims[0]]
    result.zero = [*source.zero[:-1], weight.zero[0]]
    macs = call.out.numel() * weight.shape[1]
    layer(call, weight, weight.dims[1], weight.dims[0], macs=macs)
    for dim in range(len(source.dims) - 1):
        result.zero[dim] = source.is_zero(dim) and call.args.get("bias") is None
    add_bias(call, call.args.get("bias"), result, -1)
    return result


@rule("bilinear")
def bilinear(call: Call) -> Labels:
    """Σ_ij one_i weight[k, i, j] other_j."""
    one, other, weight = (call.of(call.args[name]) for name in ("input1", "input2", "weight"))
    contract(call, one, -1, weight, 1)
    contract(call, other, -1, weight, 2)
    result = Labels.fixed(call.out.shape)
    for dim in range(-len(result.shape), -1):
        result.dims[dim] = merged_vector(call, [one.dims[dim], other.dims[dim]])
        result.zero[dim] = False
    result.dims[-1], result.zero[-1] = weight.dims[0], weight.is_zero(0)
    macs = call.out.numel() * prod(weight.shape[1:])
    layer(call, weight, weight.dims[1], weight.dims[0], macs=macs)
    add_bias(call, call.args.get("bias"), result, -1)
    return result


@rule("_cdist_forward", "_euclidean_dist")
def distances(call: Call) -> Labels:
    """Distances of rows: what is zero in both adds nothing."""
    one, other = (call.of(call.args[name]) for name in ("x1", "x2"))
    left, right = call.atoms(one, -1), call.atoms(other, -1)
    call.join(left, right)
    if not (one.is_zero(-1) and other.is_zero(-1)):
        for vector in (left, right):
            call.mix(vector)
    result = Labels.fixed(call.out.shape)
    result.dims[-2], result.dims[-1] = one.dims[-2], other.dims[-2]
    for dim in range(-len(result.shape), -2):
        wide = [p for p in (one, other) if len(p.shape) >= -dim and p.shape[dim] > 1]
        result.dims[dim] = merged_vector(call, [part.dims[dim] for part in wide])
    return result


@rule("mm", "bmm", "matmul", "mv", "dot", "vdot", "inner")
def matmul(call: Call) -> Labels:
    left, right = list(call.args.values())[:2]
    if isinstance(call.running, PrunedMultiheadAttention):
        call.mix(call.of(left).dims[-1])  # what it scales queries by is of a head's width
    return multiplied(call, left, right, call.out.shape)


@rule("addmm", "baddbmm", "addmv")
def added(call: Call) -> Labels:
    names = ("mat1", "mat2") if "mat1" in call.args else ("batch1", "batch2")
    if "vec" in call.args:
        names = ("mat", "vec")
    left, right = (call.args[name] for name in names)
    product = multiplied(call, left, right, call.out.shape)
    added = call.of(call.args["self"])
    for dim in range(-len(added.shape), 0):
        if added.shape[dim] == product.shape[dim] and (
            added.shape[dim] > 1 or added.dims[dim] is not None
        ):
            call.join(product.dims[dim], added.dims[dim])
    for dim, vector in enumerate(product.dims):
        back = dim - len(product.dims)
        shared = len(added.shape) >= -back and added.shape[back] == product.shape[dim]
        if not shared or not added.is_zero(back):
            product.zero[dim] = False
        if vector is None and shared:
            product.dims[dim] = added.dims[back]
    return product


def multiplied(call: Call, left: Tensor, right: Tensor, shape: Sequence[int]) -> Labels:
    """The labels of a matrix product, with or without batch dimensions."""
    one, other = call.of(left), call.of(right)
    result = Labels.fixed(shape)
    vector = len(other.shape) == 1
    contract(call, one, -1, other, -1 if vector else -2)
    rows = [(call.atoms(one, -2), one.zero[-2])] if len(one.shape) > 1 else []
    columns = [] if vector else [(call.atoms(other, -1), other.zero[-1])]
    for place, (dim, zero) in zip(range(-len(rows) - len(columns), 0), rows + columns, strict=True):
        result.dims[place], result.zero[place] = dim, zero
    for place in range(-len(shape), -2):
        batch = [
            labels for labels in (one, other)
            if len(labels.shape) >= -place and labels.shape[place] == shape[place]
        ]  # fmt: skip
        several = [b for b in batch if not b.is_uniform and place + len(b.shape) not in b.repeated]
        wide = several or batch
        heads = merged_vector(call, [labels.dims[place] for labels in wide])
        for labels in batch:
            if not any(labels is b for b in wide):
                repeated_as(call, heads, labels, place)
        result.dims[place] = heads
        result.zero[place] = any(labels.is_zero(place) for labels in batch)
        if heads is not None:
            call.record.heads.append(heads)
    macs = prod(shape) * one.shape[-1]
    if not vector and is_weight(call, other):
        layer(call, other, other.dims[-2], other.dims[-1], macs=macs)
    elif is_weight(call, one):
        layer(call, one, one.dims[-1], one.dims[-2], macs=macs)
    if one.memory.spoiled or other.memory.spoiled:
        result.zero = [False] * len(shape)
    return result


@rule("embedding", "embedding_renorm")
def embedding(call: Call) -> Labels:
    weight, index = call.of(call.args["weight"]), call.of(call.args["indices"])
    call.refuse(weight.dims[0], "is a row of an embedding")
    for vector in index.vectors():
        call.refuse(vector, "is used as an index")
    layer(call, weight, None, weight.dims[1])
    result = Labels.fixed(call.out.shape)
    result.dims[-1], result.zero[-1] = weight.dims[1], weight.zero[1]
    return result


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> list[Labels | None]:
    weight = call.of(call.args["weight"])
    call.refuse(weight.dims[0], "is a row of an embedding")
    for tensor in call.tensors:
        if tensor is not call.args["weight"]:
            for vector in call.of(tensor).vectors():
                call.refuse(vector, "says which rows of an embedding are added")
    layer(call, weight, None, weight.dims[1])
    first = call.outs[0]
    result = Labels.fixed(first.shape)
    result.dims[-1], result.zero[-1] = weight.dims[1], weight.zero[1]
    return [result]


def _meet_heads(call: Call, heads: Vector | None, other: Labels, dim: int, size: int) -> None:
    """Heads of queries meet those of keys or values, of which one may serve several."""
    if len(other.shape) < -dim:
        return
    theirs = other.dims[dim]
    if other.shape[dim] == 1 < size:
        call.refuse(theirs, "is a single channel that is broadcast")
    elif dim + len(other.shape) in other.repeated:
        repeated_as(call, heads, other, dim)
    else:
        if theirs is not None and other.shape[dim] != size:
            theirs = np.repeat(theirs, size // other.shape[dim])
        call.join(heads, theirs)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Labels:
    """softmax(q kᵀ · scale) v; without a given scale it is computed from the width of a head."""
    query, key, value = (call.of(call.args[name]) for name in ("query", "key", "value"))
    result = Labels.fixed(call.out.shape)
    contract(call, query, -1, key, -1)
    if call.args.get("scale") is None:
        for vector in (query.dims[-1], key.dims[-1]):
            call.mix(vector)
    call.join(key.dims[-2], value.dims[-2])
    call.mix(key.dims[-2])
    call.mix(value.dims[-2])
    for dim in range(-len(result.shape), -2):
        heads = query.dims[dim] if len(query.shape) >= -dim else None
        for other in (key, value):
            _meet_heads(call, heads, other, dim, result.shape[dim])
        result.dims[dim] = heads
        result.zero[dim] = value.is_zero(dim) if len(value.shape) >= -dim else False
        if heads is not None:
            call.record.heads.append(heads)
    result.dims[-2], result.dims[-1] = query.dims[-2], value.dims[-1]
    result.zero[-1] = value.is_zero(-1)
    mask = call.args.get("attn_mask")
    if mask is not None:
        scores = [*result.shape[:-1], key.shape[-2]]
        labels = meet(call, [mask], scores) if mask.dim() <= len(scores) else None
        for dim in range(-len(scores), 0):
            mine = result.dims[dim] if dim < -1 else key.dims[-2]
            theirs = labels.dims[dim] if labels is not None else None
            if len(mask.shape) >= -dim and mask.shape[dim] > 1:
                call.join(mine, theirs)
    return result
