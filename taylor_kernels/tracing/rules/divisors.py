"""Operations that are not finite at zero: parameters and buffers there are masked with ones."""

from __future__ import annotations

from torch import Tensor

from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.rules.elementwise import elementwise
from taylor_kernels.tracing.run.calls import Call, rule

#: Operations -> the arguments that must not be zero.
_NOT_ZERO = {
    **dict.fromkeys(("div", "floor_divide", "remainder", "fmod", "xlogy"), "other"),
    **dict.fromkeys(("log", "log2", "log10", "reciprocal", "rsqrt", "lgamma", "digamma"), "self"),
    "addcdiv": "tensor2",
    "special_xlogy": "other",
    "pow": "self",
}


@rule(*_NOT_ZERO)
def not_finite_at_zero(call: Call) -> Labels | list[Labels | None]:
    """Place by place. x / s is no number where both are masked with zeros, as the vector of scales
    that a model holds would be: s is one there, as is all that is computed of it by a root, a power
    or a product of such."""
    operand = call.arg(_NOT_ZERO[call.name])
    if isinstance(operand, Tensor) and not (call.name == "pow" and not _is_negative(call)):
        mask_with_ones(call, call.of(operand))
    return elementwise(call)


def _is_negative(call: Call) -> bool:
    exponent = call.args.get("exponent")
    return isinstance(exponent, (int, float)) and exponent < 0


def mask_with_ones(call: Call, labels: Labels) -> None:
    """Let a parameter or buffer that is zero where it is masked, or that this is computed of place
    by place, be one there: the trace is made again, in which nothing takes it for zero."""
    zero = [labels.is_zero(dim) for dim, vector in enumerate(labels.dims) if vector is not None]
    if labels.name and any(zero):
        own = ((name, dim) for _, name, dim, _ in call.record.starts if name == labels.name)
        call.record.divisors.update(own)
