"""Systems of linear equations: one for each place of the dimensions in front of the matrices."""

from __future__ import annotations

from taylor_kernels.tracing.notes.labels import Labels
from taylor_kernels.tracing.rules.elementwise import merged_vector
from taylor_kernels.tracing.run.calls import Call, rule


@rule("linalg_solve_triangular", "linalg_solve_ex")
def solved(call: Call) -> list[Labels | None] | None:
    """X of A X = B, or of X A = B: its columns, or rows, are those of B, one by one.

    Where a masked place leaves zeros in A there is no solution, unless A's diagonal counts as ones.
    """
    matrix, right = call.of(call.arg("self", "A")), call.of(call.args["B"])
    count = len(right.shape)
    if len(matrix.shape) != count or matrix.shape[:-2] != right.shape[:-2]:
        call.refuse_all("is broadcast to other systems of equations")
        return None
    mixed, free = (-2, -1) if call.args.get("left", True) else (-1, -2)
    result = Labels.fixed(right.shape)
    for vector in (*matrix.dims[-2:], right.dims[mixed]):
        call.mix(vector)
    result.dims[free], result.zero[free] = right.dims[free], right.is_zero(free)
    ones = bool(call.args.get("unitriangular"))
    for dim in range(count - 2):
        if matrix.is_zero(dim) and not ones:
            call.refuse(matrix.dims[dim], "leaves a system of equations without a solution")
        result.dims[dim] = merged_vector(call, [matrix.dims[dim], right.dims[dim]])
        result.zero[dim] = right.is_zero(dim)
    return [result, *(None for _ in call.outs[1:])]
