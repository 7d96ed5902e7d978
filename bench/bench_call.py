"""What a call on a list of parameters takes beside its sums: tiny tensors, 54 of them and 2,000.

"kernel alone" is the native function on a plan of the call that was made before. The others show
what a method of PyTorch on every tensor of both lists takes, and a view of a packed table for every
parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import taylor_kernels as tk
from bench import reference
from bench.harness import Provider
from taylor_kernels.backends.native import _native, plans_calls

SHAPE = (8, 4)
COUNTS = (54, 2000)
PACKED, LISTED, KERNEL = "ours, packed", "ours", "kernel alone"
TOUCH, VIEWS = "is_neg() of every tensor", "a view for every parameter"
ROUNDS = 300


def providers(count: int) -> list[Provider]:
    torch.manual_seed(0)
    weights, grads = ([torch.randn(SHAPE) for _ in range(count)] for _ in range(2))
    expected = reference.moments(weights, grads)

    def check(tables: Sequence[Tensor]) -> float:
        return reference.check(
            {
                f"rows.{moment}": [table[:, i] for table in tables]
                for i, moment in enumerate(tk.MOMENTS)
            },
            expected,
        )

    counts = [SHAPE[0]] * count
    packed = torch.empty(sum(counts), len(tk.MOMENTS))

    def views() -> Sequence[Tensor]:
        return torch.unsafe_split_with_sizes(packed, counts)

    found = [
        Provider(LISTED, lambda: tk.filter_moments(weights, grads), check, "ours"),
        Provider(
            PACKED,
            lambda: tk.filter_moments(weights, grads, packed=True),
            lambda table: check(table.split(counts)),
            "extra",
        ),
        Provider(TOUCH, lambda: [*map(Tensor.is_neg, weights), *map(Tensor.is_neg, grads)]),
    ]
    if _native is not None and plans_calls:
        plan, *_ = _native.call_filter_moments(  # on no threads: it is left to run
            weights, grads, None, 1, None, True, False, len(tk.MOMENTS), 0, 2**32 - 1, 0, True
        )
        plan.set_tables(packed, None, packed[0].nbytes)
        kernel: Callable[[], None] = lambda: _native.filter_moments_cpu(plan, 1)  # noqa: E731
        kernel()  # fills what the views show
        found += [Provider(KERNEL, kernel, role="floor"), Provider(VIEWS, views, check)]
    return found


@pytest.mark.quick(count=[54])
@pytest.mark.parametrize("provider", [LISTED, PACKED, KERNEL, TOUCH, VIEWS])
@pytest.mark.parametrize("on", ["cpu"])
@pytest.mark.parametrize("count", COUNTS)
def bench_call(count, on, provider, measured, record, rounds, one_thread) -> None:
    case = ("call", f"{count} parameters")
    record(case, measured.get(case, lambda: providers(count), rounds(ROUNDS)), provider)
