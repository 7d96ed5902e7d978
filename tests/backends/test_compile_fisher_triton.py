"""conv2d_fisher in Triton, compiled ahead of time as it would run, and the plan it runs by.

No GPU is needed: arguments are meta tensors, which have shapes and layouts.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taylor_kernels.layout import Conv2dFisherArgs, conv2d_fisher_args
from tests.helpers.fisher_cases import FisherCase
from tests.helpers.gpu_compile import (
    ARCHITECTURES,
    TYPE_NAMES,
    TritonKernel,
    compile_triton,
    uses_local_memory,
)

pytest.importorskip("triton", reason="Triton is not installed")

from taylor_kernels.backends.triton import conv2d_fisher_plan as plans
from taylor_kernels.backends.triton.conv2d_fisher import kernel_of

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)

#: dtype of x and dy, whether TF32 is allowed, and whether tensor cores must be used.
KINDS = {
    "bf16": (torch.bfloat16, True, True),
    "fp16": (torch.float16, False, True),
    "tf32": (torch.float32, True, True),
    "fp32": (torch.float32, False, False),
}
LAST = {"layout": "channels_last", "grad_layout": "channels_last"}
CONV = FisherCase("conv3x3_last", (64, 128, 28, 28), (128, 128, 3, 3), padding=(1, 1), **LAST)
#: Each kind of address, product and epilogue; names with a w have a weight.
CASES = [
    FisherCase("conv3x3", (64, 128, 28, 28), (128, 128, 3, 3), padding=(1, 1)),
    FisherCase("conv3x3_odd", (64, 512, 7, 7), (512, 512, 3, 3), padding=(1, 1)),
    FisherCase("conv1x1", (64, 512, 28, 28), (128, 512, 1, 1)),
    FisherCase("tokens_w", (8, 1024, 2048, 1), (1024, 1024, 1, 1), **LAST),
    FisherCase("one_position", (256, 2048, 1, 1), (1000, 2048, 1, 1)),
    FisherCase("stem_w", (64, 3, 224, 224), (64, 3, 7, 7), (2, 2), (3, 3), **LAST),
    FisherCase("resnext", (64, 128, 56, 56), (128, 4, 3, 3), padding=(1, 1), groups=32, **LAST),
    FisherCase("depthwise", (64, 144, 56, 56), (144, 1, 3, 3), padding=(1, 1), groups=144),
    FisherCase(
        "depthwise_last_w", (64, 144, 56, 56), (144, 1, 3, 3), padding=(1, 1), groups=144, **LAST
    ),
    FisherCase("wide", (1, 32, 2**26 + 8, 1), (64, 32, 1, 1), **LAST),
]
#: The least that GPUs since Ampere have for a block: 99 KiB, on those for graphics.
SHARED = 99 * 1024
TENSOR_CORES = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
COPY_16 = r"cp\.async\.cg\.shared\.global [^;]*, 0x10,"


def meta_args(
    case: FisherCase, dtype: torch.dtype, tf32: bool, weight: bool = False
) -> Conv2dFisherArgs:
    def meta(shape: tuple[int, ...], layout: str) -> Tensor:
        last = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=last)

    x, dy = meta(case.shape, case.layout), meta(case.grad_shape, case.grad_layout)
    out = torch.empty(case.size[:1] if weight else case.size, device="meta")
    of_weight = torch.empty(case.size, device="meta") if weight else None
    return conv2d_fisher_args(x, dy, of_weight, case.size, *case.geometry, tf32, out)


def compile_case(case: FisherCase, kind: str, arch: int) -> TritonKernel:
    dtype, tf32, _ = KINDS[kind]
    args = meta_args(case, dtype, tf32, case.name.endswith("_w"))
    tile = plans.choose_tile(args)
    tensors = dict.fromkeys(("x", "dy"), TYPE_NAMES[dtype])
    arguments = {**tensors, **dict.fromkeys(("weight", "to"), "*fp32")}
    arguments |= dict.fromkeys(plans.INTEGERS, "i32")
    return compile_triton(
        kernel_of(tile),
        arguments,
        plans.constants(args, tile),
        arch,
        warps=tile.warps,
        stages=tile.stages,
    )


def check(compiled: TritonKernel, kind: str, arch: int, folder: Path, *, products: bool) -> None:
    assert not uses_local_memory(compiled.cubin, arch, folder)
    assert compiled.shared <= SHARED
    tensor_cores = re.findall(TENSOR_CORES, compiled.ptx)
    assert bool(tensor_cores) == (products and KINDS[kind][2])
    assert ("tf32" in compiled.ptx) == (products and kind == "tf32")


#: fp16 is compiled as bf16 is, and products without tensor cores by rules older than sm_80.
COPIED = [
    *((kind, arch) for kind in ("bf16", "tf32") for arch in ARCHITECTURES),
    *(("fp32", 80), ("fp16", 90), ("fp32", 100)),
]


@pytest.mark.sample(5)
@pytest.mark.parametrize(("kind", "arch"), COPIED)
def test_channels_last_loads_16_bytes(kind: str, arch: int, tmp_path: Path) -> None:
    compiled = compile_case(CONV, kind, arch)
    check(compiled, kind, arch, tmp_path, products=True)
    wide = len(re.findall(COPY_16, compiled.ptx))
    copies = compiled.ptx.count("cp.async.c") - compiled.ptx.count("cp.async.commit")
    # From sm_90 on TF32 factors are read with positions innermost, so copies transpose them.
    assert wide == (0 if kind == "tf32" and arch > 80 else copies)
    assert not re.search(r"ld\.global[.\w:]*\.b(?:16|32)\b", compiled.ptx)


#: Cases and kinds take turns with the architectures.
TURNS = [
    (case, kind, ARCHITECTURES[(i + j) % 3])
    for i, case in enumerate(CASES)
    for j, kind in enumerate(("bf16", "tf32", "fp32"))
]


@pytest.mark.sample
@pytest.mark.parametrize(
    ("case", "kind", "arch"),
    TURNS,
    ids=[f"{case.name}-{kind}-{arch}" for case, kind, arch in TURNS],
)
def test_compiles_without_spills(case: FisherCase, kind: str, arch: int, tmp_path: Path) -> None:
    compiled = compile_case(case, kind, arch)
    outer = case.name == "one_position" and kind == "fp32"
    products = not case.name.startswith("depthwise") and not outer
    check(compiled, kind, arch, tmp_path, products=products)
    if case.name == "conv1x1" or (case.name == "tokens_w" and kind != "tf32"):
        assert re.search(COPY_16, compiled.ptx)
    if case.name == "depthwise_last_w":
        assert len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", compiled.ptx)) >= 2


def test_tensors_that_start_anywhere_are_not_loaded_by_16_bytes() -> None:
    shape = (4, 64, 16, 16)
    base = torch.empty(math.prod(shape) + 1, dtype=torch.bfloat16)
    dy, out = base[:-1].view(shape), torch.empty(64, 64, 1, 1)
    for start in (0, 1):
        x = base[start:][: dy.numel()].view(shape)
        geometry = [1, 1], [0, 0], [1, 1], 1
        args = conv2d_fisher_args(x, dy, None, out.shape, *geometry, True, out)
        assert plans.constants(args, plans.choose_tile(args))["X_VECTOR"] == 8 - 7 * start


EXTENT = st.integers(1, 5000)


@given(
    batch=st.integers(1, 5000),
    groups=st.integers(1, 300),
    extents=st.tuples(EXTENT, EXTENT),
    image=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    kernel=st.integers(1, 7),
    last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tf32=st.booleans(),
    weight=st.booleans(),
)
@settings(max_examples=150)
def test_plan_covers_everything_once(
    batch, groups, extents, image, kernel, last, dtype, tf32, weight
) -> None:
    filters, channels = extents
    case = FisherCase(
        "any",
        (batch, groups * channels, *image),
        (groups * filters, channels, kernel, kernel),
        padding=(kernel, kernel),
        groups=groups,
        **(LAST if last else {}),
    )
    args = meta_args(case, dtype, tf32, weight)
    tile = plans.choose_tile(args)
    grid = plans.make_grid(args, tile)
    assert (grid.splits - 1) * grid.share < batch <= grid.splits * grid.share
    rows_of_group = groups * filters if tile.direct else filters
    row_tiles = math.ceil(rows_of_group / tile.rows) * (1 if tile.direct else groups)
    assert grid.row_tiles == row_tiles
    assert (grid.col_tiles - 1) * tile.columns < channels * kernel**2
    assert grid.col_tiles * tile.columns >= channels * kernel**2
    assert grid.parts == grid.splits * (grid.col_tiles if weight else 1)
    assert grid.splits == 1 or 4 * grid.parts * args.out.numel() <= plans.WORKSPACE
    if not tile.direct:
        assert min(tile.rows, tile.columns) >= 16
        assert tile.positions >= 16 or tile.positions == 1
    # Enough programs, if there are examples for them; not many more than wanted but for the sake
    # of accuracy.
    programs = grid.row_tiles * grid.col_tiles * grid.splits
    if grid.share > 1 and 4 * 2 * grid.parts * args.out.numel() < plans.WORKSPACE:
        assert programs >= plans.PROGRAMS / 2
    assert grid.splits == 1 or programs < 2 * plans.PROGRAMS or grid.share > plans.EXAMPLES / 2
