"""Norms: over all channels together, over groups of them, or channel by channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taylor_kernels.tracing.model.code import running, says
from taylor_kernels.tracing.notes.atoms import MEETS_FIXED, Vector
from taylor_kernels.tracing.notes.attributes import guess, rules_of, tie
from taylor_kernels.tracing.notes.entries import NormCall, Size
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.notes.norm_calls import FUNCTIONS
from taylor_kernels.tracing.notes.steps import Norm
from taylor_kernels.tracing.run.calls import Call, rule

#: Why the entry of a dimension of size one stays, among which nothing is mixed.
ALONE = "is the only one of its dimension"


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> list[Labels | None]:
    old = call.of(call.args["input"])
    shape: Sequence[int] = call.args["normalized_shape"]
    result = Labels(old.shape, list(old.dims), [False] * len(old.shape), memory=old.memory)
    result.memory = type(old.memory)()
    first = len(call.record.fixed)
    for back in range(1, len(shape) + 1):
        vector = old.dims[-back]
        mix = call.mix if shape[-back] > 1 else partial(call.refuse, text=ALONE)
        mix(vector)
        for name in ("weight", "bias"):
            if isinstance(call.args.get(name), Tensor):
                affine = call.of(call.args[name]).dims[-back]
                if vector is not None or shape[-back] > 1:
                    call.join(vector, affine)
                mix(affine)
        weight = call.args.get("weight")
        if not isinstance(weight, Tensor) and not (
            (call.running is not None and "normalized_shape" in rules_of(call.running))
            or tie(call, shape[-back], vector, index=1)
        ):
            if vector is not None and call.name in FUNCTIONS and not says(shape[-back]):
                call.recorder.echo(vector, call.where)
            else:
                call.refuse(vector, "is normalised over a constant size")
        elif isinstance(weight, Tensor) and vector is not None:
            guess(call, shape[-back], vector, inferred=True)
        # Scaled by zero and shifted by zero.
        result.zero[-back] = isinstance(weight, Tensor)
    if call.name in FUNCTIONS:
        parameters = [call.args[n] for n in ("weight", "bias") if n in call.args]
        along = [call.of(p).dims[-1] for p in parameters if isinstance(p, Tensor)]
        channels = old.dims[-1] if len(shape) == 1 and shape[0] > 1 else None
        copies = [None if vector is None else vector.copy() for vector in (channels, *along)]
        spoken = range(first, len(call.record.fixed))
        found = NormCall(running().place, copies[0], tuple(copies[1:]), spoken)
        call.recorder.frame.norms.append(found)
    return [result]


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> list[Labels | None]:
    old = call.of(call.args["input"])
    vector = old.dims[1]
    groups = call.args.get("num_groups", call.args.get("group", 1))
    alone = vector is not None and vector.size == groups > 1 and _counts_groups(call, vector)
    if vector is not None and groups > 1 and not alone:
        # Each group keeps as many channels as the others.
        call.record.grid(vector.reshape(groups, -1), call.where, "rows", [1])
    if not alone:
        call.mix(vector)
    for name in ("weight", "bias"):
        if isinstance(call.args.get(name), Tensor):
            affine = call.of(call.args[name]).dims[0]
            call.join(vector, affine)
            if not alone:
                call.mix(affine)
    for later in old.dims[2:]:
        call.mix(later)
    weight = call.args.get("weight")
    if alone and vector is not None:
        name = call.of(weight).name if isinstance(weight, Tensor) else ""
        call.record.norms.append(Norm(call.recorder.module, vector.copy(), name, call.record.step))
    result = Labels(old.shape, list(old.dims), [False] * len(old.shape))
    result.zero[1] = isinstance(weight, Tensor)
    return [result]


def _counts_groups(call: Call, vector: Vector) -> bool:
    """Whether an attribute says that there are as many groups as channels, each of which is
    normalised by itself: there are fewer groups then as channels go."""
    module = call.running
    if isinstance(module, nn.GroupNorm):
        for attribute in ("num_groups", "num_channels"):
            call.record.sizes.append(Size(call.recorder.module, attribute, vector.copy(), False))
        return True
    return tie(call, vector.size, vector)


@rule(
    "batch_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm",
    "_native_batch_norm_legit_no_training", "_batch_norm_impl_index", "miopen_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "_native_batch_norm_legit_functional",
)  # fmt: skip
def batch_norm(call: Call) -> list[Labels | None]:
    """Channel by channel: its vectors are the channels', and it stands behind them."""
    old = call.of(call.args["input"])
    record, vector = call.record, old.dims[1]
    weight = call.args.get("weight")
    result = Labels(old.shape, list(old.dims), [False] * len(old.shape))
    result.zero[1] = isinstance(weight, Tensor) or old.is_zero(1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = call.args.get(name)
        if not isinstance(tensor, Tensor):
            continue
        labels = call.of(tensor)
        if labels.is_uniform:
            # Made by code: of any width, which an attribute may say.
            tie(call, tensor.size(0), vector, index=1, weak=True)
            continue
        if labels.dims[0] is None:
            call.refuse(vector, MEETS_FIXED)
            continue
        call.join(vector, labels.dims[0])
        if name == "running_var":
            _mask_with_ones(call, labels, 0)
        result.dims[1] = vector = labels.dims[0] if vector is None else vector
    for later in old.dims[2:]:
        call.mix(later)
    if vector is not None:
        name = call.of(weight).name if isinstance(weight, Tensor) else ""
        record.norms.append(Norm(call.recorder.module, vector.copy(), name, record.step))
    return [result]


def running_variances(modules: Mapping[str, nn.Module]) -> frozenset[tuple[str, int]]:
    """The running variances of PyTorch's norms, which are masked with ones."""
    found = (
        f"{prefix}.running_var" if prefix else "running_var"
        for prefix, module in modules.items()
        if isinstance(module, _NormBase) and module.running_var is not None
    )
    return frozenset((name, 0) for name in found)


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> list[Labels | None]:
    """v · g / ‖v‖, the norm over all dimensions but one: what is zero does not count in it."""
    direction, scale = call.of(call.args["v"]), call.of(call.args["g"])
    dim = call.args.get("dim", 0) % len(direction.shape)
    call.join(direction.dims[dim], scale.dims[dim])
    # A filter of zeros has no direction; its length is what masks it.
    _mask_with_ones(call, direction, dim)
    zero = list(direction.zero)
    zero[dim] = scale.is_zero(dim)
    return [Labels(direction.shape, list(direction.dims), zero)]


def _mask_with_ones(call: Call, labels: Labels, dim: int) -> None:
    """Let what masks these channels be one in the parameter or buffer that they are of: the trace
    is made again, in which nothing takes it for zero."""
    origin = call.recorder.origin(labels.dims[dim])
    if origin[0] and labels.is_zero(dim):
        call.record.divisors.add(origin)
