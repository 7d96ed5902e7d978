"""Recurrent layers, and sequences of unlike lengths that are packed for them."""

from __future__ import annotations

from math import prod

import numpy as np
from torch import Tensor

from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.notes.operations import RECURRENT
from taylor_kernels.tracing.rules.elementwise import merged_vector, repeated_as
from taylor_kernels.tracing.rules.products import layer
from taylor_kernels.tracing.run.calls import Call, rule


@rule(*RECURRENT)
def recurrent(call: Call) -> list[Labels | None]:
    """Stacked layers of one hidden width: a hidden unit is the same in every gate and layer.

    Where an LSTM projects its state (`proj_size`), weights and the next layer read the projection.
    """
    source, states = call.arg("input", "data"), call.args["hx"]
    parameters: list[Tensor] = call.args["params"]
    biases = bool(call.args["has_biases"])
    both = 2 if call.args["bidirectional"] else 1
    each = len(parameters) // (call.args["num_layers"] * both)
    projects = each > (4 if biases else 2)
    below = call.of(source).dims[-1]
    hidden = state = call.of(parameters[1]).dims[1]
    for vector in call.of(source).dims[:-1]:
        call.mix(vector)
    if projects:
        hidden = call.of(parameters[each - 1]).dims[1]
        # PyTorch tells by their widths that a state and its projection are two.
        call.refuse(hidden, "has to stay wider than what it is projected to")
    width = 0 if hidden is None else hidden.size
    steps = prod(source.shape[:-1])
    for number in range(call.args["num_layers"] * both):
        tensors = [call.of(t) for t in parameters[number * each : (number + 1) * each]]
        if number == both:
            below = state if state is None else np.tile(state, both)
        call.join(below, tensors[0].dims[1])
        call.join(state, tensors[1].dims[1])
        layers = tensors[:2]
        if projects:
            projection = tensors.pop()
            layers.append(projection)
            call.join(hidden, projection.dims[1])
            call.join(state, projection.dims[0])
        for labels in tensors:
            gates = labels.dims[0]
            for row in gates.reshape(-1, width) if gates is not None else []:
                call.join(hidden, row)
        for labels in layers:
            layer(call, labels, labels.dims[1], labels.dims[0], macs=steps * prod(labels.shape))
    zero = True
    # Beside its state an LSTM keeps a cell, which is as wide as its gates.
    for vector, first in zip(
        (state, hidden), states if isinstance(states, (list, tuple)) else [states], strict=False
    ):
        labels = call.of(first)
        zero &= labels.is_zero(-1)
        if not labels.is_uniform:
            call.join(vector, labels.dims[-1])
            for other in labels.dims[:-1]:
                call.mix(other)  # the layers that they are for, and the batch
        elif vector is not None:
            repeated_as(call, vector, labels, -1)
    result: list[Labels | None] = []
    for number, out in enumerate(call.outs):
        new = Labels.fixed(out.shape)
        vector = hidden if number == 2 else state
        if vector is not None:
            new.dims[-1] = np.tile(vector, both) if number == 0 else vector
            # A unit without weights keeps a part of what its state was.
            new.zero[-1] = zero
        result.append(new)
    return result


@rule("_pack_padded_sequence")
def packed(call: Call) -> list[Labels | None]:
    """Steps of all sequences one after the other, [N, T, ...] to [steps, ...], and how many of them
    have each step: what is behind the two goes along."""
    old, result = call.of(call.args["input"]), Labels.fixed(call.outs[0].shape)
    for vector in old.dims[:2]:
        call.refuse(vector, "is a step of a sequence that is packed")
    result.dims[1:] = old.dims[2:]
    result.zero[1:] = [old.is_zero(dim) for dim in range(2, len(old.dims))]
    return [result]


@rule("_pad_packed_sequence")
def padded(call: Call) -> list[Labels | None]:
    """The other way round; behind the last step of a sequence stands one number."""
    old, result = call.of(call.args["data"]), Labels.fixed(call.outs[0].shape)
    call.refuse(old.dims[0], "is a step of a sequence that is packed")
    blank = call.args["padding_value"] == 0
    result.dims[2:] = old.dims[1:]
    result.zero[2:] = [blank and old.is_zero(dim) for dim in range(1, len(old.dims))]
    return [result]


@rule("pad_sequence")
def put_beside(call: Call) -> Labels:
    """Sequences of unlike lengths, [T, ...] each, beside each other; behind the last step of one
    stands one number."""
    parts = [call.of(tensor) for tensor in call.args["sequences"]]
    result = Labels.fixed(call.out.shape)
    blank = call.args.get("padding_value", 0.0) == 0
    for part in parts:
        call.refuse(part.dims[0], "is a step of a sequence that is padded")
    for dim in range(1, len(parts[0].shape)):
        result.dims[dim + 1] = merged_vector(call, [part.dims[dim] for part in parts])
        result.zero[dim + 1] = blank and all(part.is_zero(dim) for part in parts)
    return result
