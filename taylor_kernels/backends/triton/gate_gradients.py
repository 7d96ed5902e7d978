"""gate_gradients in Triton: csrc/common/gate_gradients.h says what it computes.

Where a channel's positions are contiguous, a program sums some rows of them, or a segment of a long
one; else an example is a matrix [outer, channels * inner], and a program sums the columns of a
block of its rows. A second launch adds what came in parts, in a fixed order.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from taylor_kernels.backends.triton.moments import FINISH_TILE, TILES, WARPS
from taylor_kernels.layout import GateGradientsArgs

SEGMENT = 16 * 2048
#: Tile of a matrix, and its rows that a program takes.
MATRIX_TILE = (16, 128)
BLOCK_ROWS = 256
#: From this many contiguous positions on, a program sums rows even if `outer` splits a channel.
MIN_INNER = 32


@triton.jit
def _add(sums, y, dy, at, shift, r, rows, c, end, full):
    """sums + (y - shift)·dy of a tile; nothing is added beyond `rows` and `end`."""
    if full:
        a = tl.load(y + at).to(tl.float32)
        b = tl.load(dy + at).to(tl.float32)
        sums += (a - shift) * b
    else:
        mask = (r[:, None] < rows) & (c[None, :] < end)
        a = tl.load(y + at, mask=mask, other=0).to(tl.float32)
        b = tl.load(dy + at, mask=mask, other=0).to(tl.float32)
        sums += tl.where(mask, (a - shift) * b, 0)  # an infinite shift times no b
    return sums


# Only whether `length` is a multiple of 16 is worth a kernel of its own.
@triton.jit(do_not_specialize=["rows", "channels", "tiles"])
def rows_kernel(
    y, dy, bias, out, rows, length, channels, tiles, BIAS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """out[tile, row] = the sum over the tile's segment of the row."""
    block = tl.program_id(0).to(tl.int64)
    tile = block % tiles
    row = block // tiles * R
    r = row + tl.arange(0, R)
    begin = tile * SEGMENT
    end = tl.minimum(begin + SEGMENT, length)
    shift = tl.zeros((R,), tl.float32)
    if BIAS:
        shift = tl.load(bias + r % channels).to(tl.float32)
    sums = tl.zeros((R, C), tl.float32)
    for column in range(begin, end, C):
        c = column + tl.arange(0, C)
        at = r[:, None] * length + c[None, :]
        full = (row + R <= rows) & (column + C <= end)
        sums = _add(sums, y, dy, at, shift[:, None], r, rows, c, end, full)
    tl.store(out + tile * rows + r, tl.sum(sums, 1), mask=r < rows)


@triton.jit(do_not_specialize=["rows", "inner", "tiles", "row_blocks"])
def cols_kernel(
    y, dy, bias, out, rows, length, inner, tiles, row_blocks, BIAS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """out[example, row block, position] = the sum over the block's rows."""
    block = tl.program_id(0).to(tl.int64)
    column = block % tiles * C
    row_block = block // tiles % row_blocks
    example = block // tiles // row_blocks
    c = column + tl.arange(0, C)
    shift = tl.zeros((C,), tl.float32)
    if BIAS:
        shift = tl.load(bias + c // inner, mask=c < length, other=0).to(tl.float32)
    begin = row_block * BLOCK_ROWS
    sums = tl.zeros((R, C), tl.float32)
    for row in range(begin, tl.minimum(begin + BLOCK_ROWS, rows), R):
        r = row + tl.arange(0, R)
        at = (example * rows + r[:, None]) * length + c[None, :]
        full = (row + R <= rows) & (column + C <= length)
        sums = _add(sums, y, dy, at, shift[None, :], r, rows, c, length, full)
    part = example * row_blocks + row_block
    tl.store(out + part * length + c, tl.sum(sums, 0), mask=c < length)


@triton.jit(do_not_specialize=["tiles", "batch", "parts", "channels", "run"])
def finish_kernel(
    partials, out, tiles, batch, parts, channels, run, P: tl.constexpr, E: tl.constexpr
):
    """out[n, c] = the sum of partials[tile, n, part, c, i] over tile, part and i < run."""
    blocks = tl.cdiv(channels, E)
    n = tl.program_id(0).to(tl.int64) // blocks
    c = tl.program_id(0) % blocks * E + tl.arange(0, E)
    sums = tl.zeros((P, E), tl.float32)
    count = tiles * parts * run
    for start in range(0, count, P):
        i = start + tl.arange(0, P)
        part = i // run
        at = ((part // parts) * batch + n) * parts + part % parts
        at = (at[:, None] * channels + c[None, :]) * run + (i % run)[:, None]
        mask = (i < count)[:, None] & (c < channels)[None, :]
        sums += tl.load(partials + at, mask=mask, other=0)
    tl.store(out + n * channels + c, tl.sum(sums, 0), mask=c < channels)


def gate_gradients(args: GateGradientsArgs) -> None:
    """Write the gate gradients of one activation into `args.out`."""
    device = args.out.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if args.outer == 1 or args.inner >= MIN_INNER:
            _by_rows(args)
        else:
            _by_cols(args)


def _by_rows(args: GateGradientsArgs) -> None:
    rows = args.batch * args.outer * args.channels
    tile = next(tile for tile in TILES if args.inner > tile[2])
    tiles = triton.cdiv(args.inner, SEGMENT)
    in_parts = tiles > 1 or args.outer > 1
    to = args.out.new_empty((tiles, rows)) if in_parts else args.out
    programs = triton.cdiv(rows, tile[0]) * tiles
    sizes = (rows, args.inner, args.channels, tiles)
    _launch(rows_kernel, programs, args, to, *sizes, R=tile[0], C=tile[1], SEGMENT=SEGMENT)
    if in_parts:
        _finish(args, to, tiles, args.outer, 1)


def _by_cols(args: GateGradientsArgs) -> None:
    length = args.channels * args.inner
    tiles = triton.cdiv(length, MATRIX_TILE[1])
    row_blocks = triton.cdiv(args.outer, BLOCK_ROWS)
    in_parts = row_blocks > 1 or args.inner > 1
    to = args.out.new_empty((args.batch, row_blocks, length)) if in_parts else args.out
    programs = args.batch * row_blocks * tiles
    sizes = (args.outer, length, args.inner, tiles, row_blocks)
    tile = dict(zip("RC", MATRIX_TILE, strict=True))
    _launch(cols_kernel, programs, args, to, *sizes, **tile, BLOCK_ROWS=BLOCK_ROWS)
    if in_parts:
        _finish(args, to, 1, row_blocks, args.inner)


def _launch(
    kernel: triton.JITFunction,
    programs: int,
    args: GateGradientsArgs,
    to: torch.Tensor,
    *sizes: int,
    **constants: int,
) -> None:
    bias = args.output if args.bias is None else args.bias  # any pointer will do
    kernel[(programs,)](
        args.output,
        args.grad_output,
        bias,
        to,
        *sizes,
        BIAS=args.bias is not None,
        **constants,
        num_warps=WARPS,
    )


def _finish(args: GateGradientsArgs, partials: torch.Tensor, *counts: int) -> None:
    tiles, parts, run = counts
    finish_kernel[(args.batch * triton.cdiv(args.channels, FINISH_TILE[1]),)](
        partials,
        args.out,
        tiles,
        args.batch,
        parts,
        args.channels,
        run,
        *FINISH_TILE,
        num_warps=WARPS,
    )
