"""Rounding to the steps of integers, as in training for them: by one step, or by channel."""

from __future__ import annotations

from torch import Tensor

from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.rules.divisors import mask_with_ones
from taylor_kernels.tracing.run.calls import Call, rule


@rule(
    "fake_quantize_per_channel_affine", "fake_quantize_per_channel_affine_cachemask",
    "_fake_quantize_learnable_per_channel_affine",
)  # fmt: skip
def rounded_by_channel(call: Call) -> list[Labels | None]:
    """Each channel by a step and a zero point of its own, which are no operands place by place."""
    _follow_channels(call, call.args["axis"], "scale", "zero_point")
    return _as_given(call)


@rule(
    "fake_quantize_per_tensor_affine", "_fake_quantize_learnable_per_tensor_affine",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
)  # fmt: skip
def rounded(call: Call) -> list[Labels | None]:
    """All by one step: zero stays what it is."""
    for name in ("scale", "zero_point"):
        if isinstance(call.args[name], Tensor):
            for vector in call.of(call.args[name]).vectors():
                call.refuse(vector, "is a single channel that is broadcast")
    return _as_given(call)


@rule("_fused_moving_avg_obs_fq_helper")
def observed_and_rounded(call: Call) -> list[Labels | None]:
    """As these, once the range that the steps cover has been taken from the values: masked ones
    count in that."""
    old = call.of(call.args["self"])
    by_channel = bool(call.args["per_row_fake_quant"])
    axis = call.args["ch_axis"] % max(len(old.shape), 1)
    if by_channel:
        _follow_channels(call, axis, "scale", "zero_point", "running_min", "running_max")
    if bool(call.args["observer_on"].any()):
        text = "counts in the range that an observer takes, until that is disabled"
        for dim, vector in enumerate(old.dims):
            if dim != axis or not by_channel:
                call.refuse(vector, text)
    return _as_given(call)


def _as_given(call: Call) -> list[Labels | None]:
    old = call.of(call.args["self"])
    return [Labels(old.shape, list(old.dims), list(old.zero)) for _ in call.outs]


def _follow_channels(call: Call, axis: int, *names: str) -> None:
    """These vectors lose what the channels along a dimension lose."""
    old = call.of(call.args["self"])
    for name in names:
        by_channel = call.of(call.args[name])
        call.join(old.dims[axis], by_channel.dims[0])
        if name == "scale":
            mask_with_ones(call, by_channel)
