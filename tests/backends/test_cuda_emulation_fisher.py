"""conv2d_fisher.cu on a CPU: see emulated.py."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from taylor_kernels.layout import conv2d_fisher_args
from tests.helpers import emulated
from tests.helpers.cases import (
    DTYPES,
    TF32_C,
    FisherCase,
    assert_close,
    fisher_cases,
    fisher_reference64,
    random_fisher_inputs,
    same_bits,
)
from tests.helpers.emulated import CODES, poisoned
from tests.helpers.fisher_limits import LAYERS, LIMIT_CASES, LIMITS, Kernel, both_orders

ROOM = 64 << 20  # bytes of workspace
CASES = [case for case in fisher_cases() if 0 not in case.shape]  # the op answers for the empty


class Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "groups", "channels", "filters")),
        *((name, 2 * ctypes.c_int64) for name in ("image", "out_image", "kernel")),
        *((name, 2 * ctypes.c_int64) for name in ("stride", "padding", "dilation")),
        *((name, ctypes.c_int32) for name in ("dtype", "weight_dtype")),
        *((name, ctypes.c_int32) for name in ("x_last", "dy_last", "tf32")),
    ]


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulated.kernels()


def planned(kernels: ctypes.CDLL, args: Args, room: int) -> tuple[Kernel, int, int]:
    """The kernel, its splits of the examples, the bytes that it takes of a workspace."""
    found = (3 * ctypes.c_int64)()
    kernels.fisher_plan(ctypes.byref(args), ctypes.c_int64(room), found)
    return Kernel(found[0]), found[1], found[2]


def fisher(
    kernels: ctypes.CDLL,
    x: Tensor,
    dy: Tensor,
    case: FisherCase,
    weight: Tensor | None = None,
    tf32: bool = False,
    room: int = ROOM,
) -> Tensor:
    out = torch.full(case.size if weight is None else case.size[:1], float("nan"))
    args = conv2d_fisher_args(x, dy, weight, case.size, *case.geometry, tf32, out)
    pointers = [
        0 if t is None else t.data_ptr()
        for t in (args.input, args.grad_output, args.weight, args.out)
    ]
    dtypes = [CODES[t.dtype] for t in (x, x if args.weight is None else args.weight)]
    packed = Args(*pointers, *args[4:14], *dtypes, *args[14:])
    _workspace, pointer = poisoned(planned(kernels, packed, room)[2])
    assert kernels.fisher(ctypes.byref(packed), ctypes.c_int64(room), pointer) == 0
    return out


def plan(
    kernels: ctypes.CDLL,
    case: FisherCase,
    dtype: torch.dtype,
    weighted: bool = False,
    room: int = ROOM,
) -> tuple[Kernel, int, int]:
    """The same for tensors that nobody reads."""
    nothing = torch.empty(1, dtype=dtype)
    x, dy = (nothing.expand(shape) for shape in (case.shape, case.grad_shape))
    args = Args(16, 16, 16 if weighted else 0, 16, x.size(0), case.groups, case.size[1],
                case.size[0] // case.groups, x.shape[2:], dy.shape[2:], case.size[2:],
                case.stride, case.padding, case.dilation, CODES[dtype], 0,
                case.layout == "channels_last", case.grad_layout == "channels_last", 1)  # fmt: skip
    return planned(kernels, args, room)


def nearest_tf32(tensor: Tensor) -> Tensor:
    """float32 with 10 bits of fraction, ties away from zero."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def moved(tensor: Tensor, elements: int) -> Tensor:
    """The same values in the same order, so many elements past an aligned address."""
    base = tensor.new_empty(tensor.numel() + 32)
    start = -base.data_ptr() % 64 // base.element_size() + elements
    return base[start:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LIMIT_CASES], ids=lambda case: case.name)
def test_matches_float64(kernels: ctypes.CDLL, case: FisherCase, dtype: torch.dtype) -> None:
    x, dy, weight = random_fisher_inputs(case, dtype)
    for scaled in (None, weight):
        got = fisher(kernels, x, dy, case, scaled)
        assert_close(got, *fisher_reference64(x, dy, case, scaled))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", Kernel)
def test_weight_of_the_inputs_dtype(
    kernels: ctypes.CDLL, kernel: Kernel, dtype: torch.dtype
) -> None:
    case = next(case for case, met in LIMITS if met == kernel)
    x, dy, weight = (t.to(dtype) for t in random_fisher_inputs(case, dtype))
    got = fisher(kernels, x, dy, case, weight)
    assert_close(got, *fisher_reference64(x, dy, case, weight))


@pytest.mark.parametrize("case", LIMIT_CASES, ids=lambda case: case.name)
def test_tf32_rounds_factors_and_nothing_else(kernels: ctypes.CDLL, case: FisherCase) -> None:
    x, dy, _ = random_fisher_inputs(case, torch.float32)
    got = fisher(kernels, x, dy, case, tf32=True)
    assert_close(got, *fisher_reference64(x, dy, case), c=TF32_C)
    kernel, _, _ = plan(kernels, case, torch.float32)
    if kernel <= Kernel.SMALL:
        x, dy = nearest_tf32(x), nearest_tf32(dy)
    assert_close(got, *fisher_reference64(x, dy, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LIMIT_CASES, ids=lambda case: case.name)
def test_bits_do_not_depend_on_alignment(
    kernels: ctypes.CDLL, case: FisherCase, dtype: torch.dtype
) -> None:
    x, dy, _ = random_fisher_inputs(case, dtype)
    got = fisher(kernels, moved(x, 0), moved(dy, 0), case)
    for shifts in ((0, 0), (1, 2), (2, 1)):
        assert same_bits(got, fisher(kernels, moved(x, shifts[0]), moved(dy, shifts[1]), case))


@pytest.mark.parametrize(("case", "kernel"), LIMITS, ids=lambda value: getattr(value, "name", None))
def test_limits_meet_the_kernel_they_are_for(
    kernels: ctypes.CDLL, case: FisherCase, kernel: Kernel
) -> None:
    found, splits, _ = plan(kernels, case, torch.bfloat16)
    assert found == kernel
    assert splits > 1 or "splits" not in case.name
    assert plan(kernels, case, torch.bfloat16, room=1)[1:] == (1, 0)


@pytest.mark.parametrize(("case", "kernel"), LAYERS.items(), ids=lambda value: value.name)
def test_layers_get_their_kernel(kernels: ctypes.CDLL, case: FisherCase, kernel: Kernel) -> None:
    for layer in both_orders(case):
        for weighted in (False, True):
            found, _, workspace = plan(kernels, layer, torch.bfloat16, weighted)
            assert found == kernel
            assert workspace <= ROOM


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("image", [(60, 70), (140, 251)], ids=str)
def test_sums_of_one_sign_stay_exact(
    kernels: ctypes.CDLL, image: tuple[int, int], dtype: torch.dtype
) -> None:
    """Tensor cores cut off: a sum of all positions in one go would be off by dozens of units."""
    case = FisherCase("long", (2, 17, *image), (8, 17, 1, 1))
    x, dy, _ = random_fisher_inputs(case, dtype)
    x, dy = x.abs(), dy.abs()
    assert_close(fisher(kernels, x, dy, case, room=1), *fisher_reference64(x, dy, case))


@pytest.mark.parametrize("case", LIMIT_CASES, ids=lambda case: case.name)
def test_one_block_takes_all_examples(kernels: ctypes.CDLL, case: FisherCase) -> None:
    x, dy, _ = random_fisher_inputs(case, torch.bfloat16)
    assert_close(fisher(kernels, x, dy, case, room=1), *fisher_reference64(x, dy, case))


@pytest.mark.parametrize("batch", [256, 600])
def test_runs_of_examples(kernels: ctypes.CDLL, batch: int) -> None:
    case = FisherCase("runs", (batch, 40, 1, 1), (9, 40, 1, 1))
    for dtype in DTYPES:
        x, dy, _ = random_fisher_inputs(case, dtype)
        assert_close(fisher(kernels, x, dy, case, room=1), *fisher_reference64(x, dy, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_values_reach_their_filter_and_no_other(
    kernels: ctypes.CDLL, dtype: torch.dtype
) -> None:
    for case in CASES:
        if case.size[0] < 8:
            continue
        x, dy, weight = random_fisher_inputs(case, dtype)
        dy[0, 3, -1, -1] = float("inf")
        dy[-1, 7, 0, 0] = float("nan")
        for scaled in (None, weight):
            bad = ~fisher(kernels, x, dy, case, scaled).view(dy.size(1), -1).isfinite().all(1)
            assert bad.nonzero().flatten().tolist() == [3, 7], case.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_finite_pixels_reach_what_reads_them(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    for case in CASES:
        x, dy, _ = random_fisher_inputs(case, dtype)
        x[0, 0, -1, -1] = float("inf")  # next to what lies beyond the last position
        x[-1, -1, 0, -1] = float("nan")
        assert_close(fisher(kernels, x, dy, case), *fisher_reference64(x, dy, case))
