"""What mixes the places of a dimension: reductions, softmax, sorts, pooling, transforms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from taylor_kernels.tracing.notes.atoms import Reason, Vector
from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.run.calls import MIXED, Call, rule


def dimensions(dims: Any, count: int) -> list[int]:
    """The dimensions that an argument names; all of them for None."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(count))
    return [dim % max(count, 1) for dim in ([dims] if isinstance(dims, int) else dims)]


@rule(
    "sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "argmax",
    "argmin", "prod", "norm", "linalg_vector_norm", "logsumexp", "any", "all", "median", "mode",
    "nansum", "nanmean", "nanmedian", "aminmax", "count_nonzero", "kthvalue", "quantile",
)  # fmt: skip
def reduction(call: Call) -> Any:
    """The sum of what is zero where it is masked is the sum without it; nothing else is."""
    if isinstance(call.args.get("other"), Tensor):
        from taylor_kernels.tracing.rules.elementwise import elementwise

        return elementwise(call)
    source = call.arg("self", "input", "x")
    old = call.of(source)
    along = set(dimensions(call.arg("dim", "axis"), len(old.shape)))
    keep = bool(call.args.get("keepdim"))
    # As the mean of all heads' attention, which is returned by default and mostly thrown away.
    aside = call.name == "mean" and not call.operation.written
    mixed: list[tuple[Vector, Reason]] = []
    for dim in along:
        vector = old.dims[dim] if old.dims else None
        harmless = call.name in ("sum", "nansum", "any", "count_nonzero")
        harmless |= call.name in ("norm", "linalg_vector_norm")
        if aside:
            if vector is not None:
                mixed.append((vector, call.reason(MIXED, mixer=True)))
        elif not (harmless and old.is_zero(dim)):
            call.mix(vector)
    result: list[Labels | None] = []
    for out in call.outs:
        new = Labels.fixed(out.shape)
        new.kept_if_read = tuple(mixed)
        places = [dim for dim in range(len(old.shape)) if keep or dim not in along]
        if len(places) == out.dim():
            for place, dim in enumerate(places):
                if dim not in along:
                    new.dims[place] = old.dims[dim]
                    new.zero[place] = old.is_zero(dim) and call.name not in ("argmax", "argmin")
        result.append(new)
    return result


@rule("_is_all_true", "_is_any_true")
def argument_check(call: Call) -> list[Labels | None]:
    """Of torch.distributions, which asks whether what it is given is valid, place by place."""
    return [Labels.fixed(out.shape) for out in call.outs]


@rule(
    "_softmax", "softmax", "_log_softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp",
    "sort", "argsort", "topk", "cummax", "cummin", "_safe_softmax", "_fft_r2c", "_fft_c2r",
    "_fft_c2c", "msort", "renorm", "diff",
)  # fmt: skip
def along_dimension(call: Call) -> Any:
    old = call.of(call.arg("self", "input"))
    along = dimensions(call.args.get("dim", 0), len(old.shape))
    for dim in along:
        call.mix(old.dims[dim] if old.dims else None)
    result: list[Labels | None] = []
    for out in call.outs:
        new = Labels.fixed(out.shape)
        for dim in range(len(old.shape)):
            if dim not in along and len(old.shape) == out.dim():
                new.dims[dim] = old.dims[dim]
                new.zero[dim] = old.is_zero(dim) and call.name not in ("_softmax", "softmax")
        result.append(new)
    return result


def _spatial(call: Call, old: Labels, trailing: int) -> list[Labels | None]:
    """Space is mixed, batch and channels go along."""
    lead = len(old.shape) - trailing
    kept = [dim for dim in range(len(old.shape)) if dim < lead or _is_alone(call, dim - lead)]
    for dim in range(lead, len(old.shape)):
        if dim not in kept:
            call.mix(old.dims[dim])
    result: list[Labels | None] = []
    for out in call.outs:
        new = Labels.fixed(out.shape)
        if out.dim() == len(old.shape):
            for dim in kept:
                new.dims[dim], new.zero[dim] = old.dims[dim], old.is_zero(dim)
        result.append(new)
    return result


def _is_alone(call: Call, dim: int) -> bool:
    """Whether a pooling leaves the places along a dimension of space where they are, as it does
    where its window is one place wide there."""
    if not call.name.removeprefix("mkldnn_").startswith(("max_pool", "avg_pool")):
        return False
    kernel = call.args["kernel_size"]
    given = (kernel, call.args.get("stride") or kernel, call.args.get("padding", 0))
    width, step, pad = (
        value[dim if len(value) > 1 else 0] if isinstance(value, (list, tuple)) else value
        for value in given
    )
    return bool(width == 1 and step == 1 and pad == 0)


_POOLS = [
    name
    for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool",
                 "fractional_max_pool", "reflection_pad", "replication_pad", "upsample_nearest",
                 "_upsample_nearest_exact", "circular_pad", "mkldnn_max_pool",
                 "upsample_linear", "_adaptive_avg_pool", "mkldnn_adaptive_avg_pool")
    for dims in "123"
    for name in (f"{kind}{dims}d", f"{kind}{dims}d_with_indices", f"{kind}{dims}d_vec")
]  # fmt: skip
_SPACE = {
    "upsample_linear1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2,
    "upsample_trilinear3d": 3, "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2,
    "upsample_lanczos2d": 2, "_upsample_lanczos2d_aa": 2,
}  # fmt: skip


@rule(*_POOLS, *_SPACE)
def pooling(call: Call) -> list[Labels | None]:
    trailing = _SPACE.get(call.name) or int(next(c for c in call.name if c in "123"))
    return _spatial(call, call.of(call.arg("self", "input")), trailing)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(call: Call) -> list[Labels | None]:
    """The first dimension is the sampled tensor's and the grid's, place by place: heads that code
    puts there (deformable attention) go from both."""
    old, grid = call.of(call.args["input"]), call.of(call.args["grid"])
    call.join(old.dims[0], grid.dims[0])
    for vector in grid.dims[1:]:
        call.refuse(vector, "says where to sample")
    return _spatial(call, old, len(old.shape) - 2)


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(call: Call) -> list[Labels | None]:
    """Values go to the places that a pooling took others from, each channel within its own plane:
    its indices lose the channels that the values lose."""
    trailing = int(next(c for c in call.name if c in "123"))
    old, indices = call.of(call.args["self"]), call.of(call.args["indices"])
    lead = len(old.shape) - trailing
    for one, other in zip(old.dims[:lead], indices.dims[:lead], strict=True):
        call.join(one, other)
    for vector in indices.dims[lead:]:
        call.mix(vector)
    return _spatial(call, old, trailing)
