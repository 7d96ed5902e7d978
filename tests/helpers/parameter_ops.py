"""The ops over lists of parameters, as their tests see them, and the promises that all make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import taylor_kernels as tk
from taylor_kernels.ops.second_order_moments import second_order_sums
from tests.helpers import probes
from tests.helpers.cases import (
    DTYPES,
    MomentsCase,
    assert_close,
    filter_moments_cases,
    random_like_case,
    sums64,
)

#: The probes' in all tests that need but one.
SEED = 2**63 + 11

#: Larger than the CPU can emulate: every segment, block and tile of both backends' plans.
GPU_CASES = [
    *filter_moments_cases(),
    MomentsCase("long_vector", (3_000_001,)),
    MomentsCase("many_segments", (1, 20_000_003)),
    MomentsCase("resnet_conv", (512, 512, 3, 3)),
    MomentsCase("resnet_conv_channels_last", (256, 256, 3, 3), layout="channels_last"),
    MomentsCase("resnext", (128, 4, 3, 3), groups=32),
    MomentsCase("patches", (192, 3, 16, 16)),
    MomentsCase("wide", (8, 70_000)),
    MomentsCase("few_vectors", (100_000, 64)),
    MomentsCase("tall", (70_000, 24)),
    MomentsCase("attention", (1024, 3072)),
    MomentsCase("misaligned", (1024, 776), layout="misaligned"),
]


class ParameterOp(NamedTuple):
    """One of the ops; `call(lists, streams, **keywords)` is the function under test."""

    name: str
    lists: int  # of tensors that it takes: weights, gradients, ...
    sums: int
    call: Callable[..., Any]
    #: Of float64 tensors, and of the signs that it draws, made if asked for.
    terms: Callable[[Sequence[Tensor], Callable[[], Tensor]], Sequence[Tensor]]
    draws: bool = False

    def direct(self, lists: Sequence[Sequence[Tensor]], backend: str | None = None) -> Any:
        """The op that PyTorch knows, and its arguments for ungrouped tensors and both axes."""
        count = len(lists[0])
        drawn = (SEED - 2**64, list(range(count))) if self.draws else ()
        op = getattr(torch.ops.taylor_kernels, self.name).default
        return op, (*lists, [1] * count, True, True, *drawn, backend)

    def reference64(
        self, tensors: Sequence[Tensor], dim: int, groups: int = 1, stream: int = 0
    ) -> tuple[Tensor, Tensor]:
        """[F, sums] in float64 by other code, and its bound."""

        def signs() -> Tensor:
            return probes.signs(tensors[0], SEED, stream).to(tensors[0].device)

        return sums64(self.terms([t.double() for t in tensors], signs), dim, groups)

    def check(
        self, tensors: Sequence[Tensor], dim: int | tuple[int, int], groups: int = 1, *where: Any
    ) -> None:
        """One parameter against float64; `where` are a backend and a stream, as in run()."""
        for table, ref, bound in self.beside_float64(tensors, dim, groups, *where):
            assert_close(table, ref, bound)

    def check_float64(self, case: MomentsCase, backend: str) -> None:
        """float64 is summed in float64."""
        tensors = random_like_case(case, torch.float64, count=self.lists)
        for dim in case.dims:
            for table, ref, bound in self.beside_float64(tensors, dim, case.groups, backend):
                assert table.dtype == torch.float64
                # Two float64 sums of the same terms in different orders.
                scale = bound.clamp_min(torch.finfo(torch.float64).tiny)
                torch.testing.assert_close(table / scale, ref / scale, rtol=0, atol=1e-13)

    def beside_float64(
        self, tensors: Sequence[Tensor], dim: int | tuple[int, int], groups: int, *where: Any
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each dim a table, that in float64 and its bound."""
        got = self.run(tensors, dim, groups, *where)
        stream = where[1] if len(where) > 1 else 0
        for axis, table in zip(axes_of(dim), got, strict=True):
            yield table, *self.reference64(tensors, axis, groups, stream)

    def run(
        self,
        tensors: Sequence[Tensor],
        dim: int | tuple[int, int],
        groups: int = 1,
        backend: str | None = None,
        stream: int = 0,
    ) -> tuple[Tensor, ...]:
        """A [F, sums] table for each dim."""
        got = self.call(tensors, [stream], dim=dim, groups=groups, backend=backend)
        tables = got if isinstance(got, tuple) else (got,)
        return tuple(table.view(len(table), self.sums) for table in tables)


def axes_of(dim: int | tuple[int, int]) -> tuple[int, ...]:
    return dim if isinstance(dim, tuple) else (dim,)


def _filter_terms(tensors: Sequence[Tensor], signs: Callable[[], Tensor]) -> Sequence[Tensor]:
    w, g = tensors
    gw = g * w
    return gw, gw * gw, gw.abs(), w * w, g * g


def _second_order_terms(tensors: Sequence[Tensor], signs: Callable[[], Tensor]) -> Sequence[Tensor]:
    w, g, h = tensors
    q = w * (g - h / 2)
    return q, q * q


def _hutchinson(lists: Sequence[Any], streams: Sequence[int], **keywords: Any) -> Any:
    return tk.hutchinson_moments(*lists, seed=SEED, streams=streams, **keywords)


FILTER = ParameterOp(
    "filter_moments",
    2,
    5,
    lambda lists, streams, **keywords: tk.filter_moments(*lists, **keywords),
    _filter_terms,
)
SECOND_ORDER = ParameterOp(
    "second_order_moments",
    3,
    2,
    lambda lists, streams, **keywords: second_order_sums(*lists, **keywords),
    _second_order_terms,
)
HUTCHINSON = ParameterOp(
    "hutchinson_moments",
    2,
    1,
    _hutchinson,
    lambda tensors, signs: [tensors[0] ** 2 * signs() * tensors[1]],
    draws=True,
)
EVERY_OP = (FILTER, SECOND_ORDER, HUTCHINSON)


def model_like_lists(count: int) -> tuple[list[list[Tensor]], list[int]]:
    """`count` lists of parameters of every kind, dtypes mixed, and their groups."""
    chosen = [case for case in filter_moments_cases() if len(case.shape) > 1]
    each = [
        random_like_case(case, DTYPES[i % len(DTYPES)], count=count)
        for i, case in enumerate(chosen)
    ]
    large = tuple(torch.randn(count, 300, 3000))  # enough for several tasks and threads
    lists = [list(tensors) for tensors in zip(large, *each, strict=True)]
    return lists, [1, *(case.groups for case in chosen)]


def assert_bits_do_not_depend_on_the_list(
    run: Callable[[Sequence[int]], Any], shapes: Sequence[tuple[int, ...]]
) -> None:
    """run(places) hands those parameters over in that order; a table for each, or a pair."""

    def tables(order: Sequence[int]) -> list[dict[int, Tensor]]:
        found = run(order)
        per_axis = found if isinstance(found, tuple) else (found,)
        return [dict(zip(order, axis, strict=True)) for axis in per_axis]

    n = len(shapes)
    whole = tables(range(n))
    for order in (range(n), range(n - 1, -1, -1), *([i] for i in range(n))):
        for axis, others in zip(whole, tables(order), strict=True):
            for i, table in others.items():
                assert table.equal(axis[i]), f"tensor {i} of shape {shapes[i]}"


_W = torch.randn(4, 6, 3, 3)
#: What no op that takes hvps takes for tensors of shape [4, 6, 3, 3]: other arguments, the error.
BAD_HVPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": (dict(hvps=_W[:3]), ValueError, r"hvps: shape \(3, 6, 3, 3\).*weights"),
    "dtype": (dict(hvps=_W.half()), ValueError, "hvps: dtype torch.float16 does not match"),
    "none": (dict(hvps=None), TypeError, "hvps: expected a torch.Tensor like weights"),
    "dim": (dict(dim=2), ValueError, "dim: 2 is not one of"),
    "groups": (dict(dim=1, groups=3), ValueError, "groups: 3 does not divide"),
    "backend": (dict(backend="cuda"), ValueError, "does not run on cpu"),
}
ONE_FOR_TWO = "hvps: 1 Hessian-vector products for 2 weights"
