"""conv2d_fisher.cu on a CPU: see emulated.py."""

from __future__ import annotations

import ctypes
from enum import IntEnum

import emulated
import pytest
import torch
from cases import (
    DTYPES,
    TF32_C,
    FisherCase,
    assert_close,
    fisher_cases,
    fisher_reference64,
    random_fisher_inputs,
)
from emulated import CODES, poisoned, same_bits
from torch import Tensor

from taylor_kernels.layout import conv2d_fisher_args

ROOM = 64 << 20  # bytes of workspace
CASES = [case for case in fisher_cases() if 0 not in case.shape]  # the op answers for the empty


class Kernel(IntEnum):
    """FisherKernel in csrc/conv2d_fisher_plan.cuh."""

    TALL, WIDE, SMALL, DEPTHWISE, SQUARE, SQUARE64 = range(6)


def both_orders(case: FisherCase) -> list[FisherCase]:
    last = {"layout": "channels_last", "grad_layout": "channels_last"}
    return [case, case._replace(name=f"{case.name}_channels_last", **last)]


#: Shapes that cross a limit of csrc/conv2d_fisher_plan.cuh, and the kernel that they are for.
LIMITS = [
    (case, kernel)
    for kernel, wanted in {
        Kernel.TALL: [
            FisherCase("tall_tiles", (2, 190, 5, 5), (250, 190, 1, 1)),
            FisherCase("tall_vectors", (1, 128, 4, 8), (256, 128, 1, 1)),
            FisherCase("tall_spans", (1, 7, 19, 18), (128, 7, 3, 3), padding=(1, 1)),
        ],
        Kernel.WIDE: [
            FisherCase("wide_tiles", (1, 30, 4, 5), (180, 30, 3, 3), padding=(1, 1)),
            FisherCase("wide_vectors", (2, 16, 8, 8), (64, 16, 3, 3), padding=(1, 1)),
            FisherCase("wide_spans", (2, 13, 16, 32), (50, 13, 3, 3), padding=(1, 1)),
        ],
        Kernel.SMALL: [
            FisherCase("small_tiles", (2, 27, 6, 6), (70, 27, 3, 3)),
            FisherCase("small_vectors", (3, 128, 1, 17), (32, 128, 1, 1)),
            FisherCase("one_span", (2, 40, 16, 16), (9, 40, 1, 1)),
            FisherCase("spans", (3, 40, 23, 25), (9, 40, 1, 1)),
            FisherCase("chunk_less_one", (3, 40, 3, 5), (11, 40, 1, 1)),
            FisherCase("chunk", (3, 40, 4, 4), (11, 40, 1, 1)),
            FisherCase("chunk_and_one", (3, 40, 3, 11), (11, 40, 1, 1)),
            FisherCase("splits", (17, 40, 3, 3), (11, 40, 1, 1)),
            FisherCase("groups", (2, 68, 5, 5), (22, 34, 2, 3), groups=2),
        ],
        Kernel.DEPTHWISE: [
            FisherCase("lanes", (2, 5, 4, 4), (5, 1, 3, 3), padding=(1, 1), groups=5),
            FisherCase("warps", (2, 3, 33, 35), (3, 1, 3, 3), (1, 2), (1, 1), groups=3),
            FisherCase("team_spans", (1, 2, 70, 150), (2, 1, 3, 3), padding=(1, 1), groups=2),
            FisherCase("taps", (2, 40, 9, 9), (40, 1, 5, 5), padding=(2, 2), groups=40),
            FisherCase("team_splits", (20, 33, 3, 3), (33, 1, 3, 3), padding=(1, 1), groups=33),
        ],
        Kernel.SQUARE: [
            FisherCase("square", (3, 50, 7, 6), (60, 5, 1, 1), groups=10),
            FisherCase("square_warps", (2, 6, 20, 20), (9, 2, 2, 1), groups=3),
        ],
        Kernel.SQUARE64: [
            FisherCase("far_padding", (2, 6, 5, 5), (10, 3, 2, 2), (9_000, 8_000),
                       (40_000, 32_000), (1, 3), groups=2),
            FisherCase("far_padding_depthwise", (2, 6, 5, 5), (6, 1, 2, 2), (9_000, 9_000),
                       (45_000, 45_000), groups=6),
        ],
    }.items()
    for contiguous in wanted
    for case in both_orders(contiguous)
]  # fmt: skip
LIMIT_CASES = [case for case, _ in LIMITS]


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


def fisher(
    kernels: ctypes.CDLL,
    x: Tensor,
    dy: Tensor,
    case: FisherCase,
    weight: Tensor | None = None,
    tf32: bool = False,
) -> Tensor:
    out = torch.full(case.size if weight is None else case.size[:1], float("nan"))
    args = conv2d_fisher_args(x, dy, weight, case.size, *case.geometry, tf32, out)
    pointers = [
        0 if t is None else t.data_ptr()
        for t in (args.input, args.grad_output, args.weight, args.out)
    ]
    dtypes = [CODES[t.dtype] for t in (x, x if args.weight is None else args.weight)]
    packed = Args(*pointers, *args[4:14], *dtypes, *args[14:])
    _workspace, pointer = poisoned(kernels.fisher_workspace(ctypes.byref(packed)))
    kernels.fisher(ctypes.byref(packed), pointer)
    return out


def plan(
    kernels: ctypes.CDLL, case: FisherCase, dtype: torch.dtype, weighted: bool, room: int
) -> tuple[Kernel, int]:
    """The kernel and the splits for tensors that nobody reads."""
    nothing = torch.empty(1, dtype=dtype)
    x, dy = (nothing.expand(shape) for shape in (case.shape, case.grad_shape))
    args = Args(16, 16, 16 if weighted else 0, 16, x.size(0), case.groups, case.size[1],
                case.size[0] // case.groups, x.shape[2:], dy.shape[2:], case.size[2:],
                case.stride, case.padding, case.dilation, CODES[dtype], 0,
                case.layout == "channels_last", case.grad_layout == "channels_last", 1)  # fmt: skip
    found = (2 * ctypes.c_int64)()
    kernels.fisher_plan(ctypes.byref(args), ctypes.c_int64(room), found)
    return Kernel(found[0]), found[1]


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
    weight = weight.to(dtype) if len(case.name) % 2 else weight
    for scaled in (None, weight):
        got = fisher(kernels, x, dy, case, scaled)
        assert_close(got, *fisher_reference64(x, dy, case, scaled))


@pytest.mark.parametrize("case", LIMIT_CASES, ids=lambda case: case.name)
def test_tf32_rounds_factors_and_nothing_else(kernels: ctypes.CDLL, case: FisherCase) -> None:
    x, dy, _ = random_fisher_inputs(case, torch.float32)
    got = fisher(kernels, x, dy, case, tf32=True)
    assert_close(got, *fisher_reference64(x, dy, case), c=TF32_C)
    kernel, _ = plan(kernels, case, torch.float32, False, ROOM)
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
    assert same_bits(got, fisher(kernels, moved(x, 0), moved(dy, 0), case))
    assert same_bits(got, fisher(kernels, moved(x, 1), moved(dy, 0), case))
    assert same_bits(got, fisher(kernels, moved(x, 0), moved(dy, 1), case))


@pytest.mark.parametrize(("case", "kernel"), LIMITS, ids=lambda value: getattr(value, "name", None))
def test_limits_meet_the_kernel_they_are_for(
    kernels: ctypes.CDLL, case: FisherCase, kernel: Kernel
) -> None:
    found, splits = plan(kernels, case, torch.bfloat16, False, ROOM)
    assert found == kernel
    assert splits > 1 or "splits" not in case.name
    _, splits = plan(kernels, case, torch.bfloat16, False, 1)  # a byte of workspace
    assert splits == 1


#: Layers of ResNet-50, ResNeXt-50, MobileNet v2, a ViT and its head, with many examples.
LAYERS = {
    FisherCase("stem", (256, 3, 224, 224), (64, 3, 7, 7), (2, 2), (3, 3)): Kernel.WIDE,
    FisherCase("layer1", (256, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1)): Kernel.WIDE,
    FisherCase("layer4", (256, 512, 7, 7), (512, 512, 3, 3), padding=(1, 1)): Kernel.TALL,
    FisherCase("expand", (256, 512, 7, 7), (2048, 512, 1, 1)): Kernel.TALL,
    FisherCase("resnext", (256, 128, 56, 56), (128, 4, 3, 3), groups=32): Kernel.SMALL,
    FisherCase("depthwise", (256, 96, 56, 56), (96, 1, 3, 3), groups=96): Kernel.DEPTHWISE,
    FisherCase("tokens", (256, 768, 197, 1), (3072, 768, 1, 1)): Kernel.TALL,
    FisherCase("head", (4096, 2048, 1, 1), (10, 2048, 1, 1)): Kernel.SMALL,
    FisherCase("wide_head", (4096, 25_088, 1, 1), (4096, 25_088, 1, 1)): Kernel.TALL,
    FisherCase("huge_example", (2, 4096, 2**19, 1), (4096, 4096, 1, 1)): Kernel.SQUARE64,
}


@pytest.mark.parametrize(("case", "kernel"), LAYERS.items(), ids=lambda value: value.name)
def test_layers_get_their_kernel(kernels: ctypes.CDLL, case: FisherCase, kernel: Kernel) -> None:
    for layer in both_orders(case):
        for weighted in (False, True):
            found, splits = plan(kernels, layer, torch.bfloat16, weighted, ROOM)
            assert found == kernel
            rows, columns = case.size[0], case.size[1] * case.size[2] * case.size[3]
            assert splits == 1 or splits * 4 * rows * (1 if weighted else columns) <= ROOM


def test_sums_of_one_sign_stay_exact(kernels: ctypes.CDLL) -> None:
    """Tensor cores cut off: a sum of all positions in one go would be off by dozens of units."""
    for case in both_orders(FisherCase("long", (1, 40, 60, 70), (9, 40, 1, 1))):
        for dtype in DTYPES:
            x, dy, _ = random_fisher_inputs(case, dtype)
            x, dy = x.abs(), dy.abs()
            assert_close(fisher(kernels, x, dy, case), *fisher_reference64(x, dy, case))


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
