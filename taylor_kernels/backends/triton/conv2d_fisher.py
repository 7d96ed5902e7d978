"""conv2d_fisher in Triton: csrc/common/conv2d_fisher.h says what it computes.

The weight gradient of one example is a matrix product over its output positions: filters of a group
times columns, a column being an input channel at a tap of the kernel. A program has a tile of that
matrix and a share of the examples. It gathers columns from the image as it goes, and adds the
square of each finished product to a second tile of registers, so no gradient leaves them. A second
launch adds the shares in order.

Sums over an example are in two levels, of spans of 64 to 256 positions and of spans. Spans are
added one after another, and each addition is rounded: 128 of them (2^13 positions of tf32, 2^14 of
bfloat16) keep the bound of 16 units (tests/helpers/cases.py) even where all terms are of one sign,
with an error of 3 units root mean square; it grows with the root of the positions.

Groups too small for a matrix product, such as those of a depthwise layer, are multiplied element by
element. Bits depend on shapes, layouts and on whether tensors start at a 16-byte address.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from taylor_kernels.backends.triton.conv2d_fisher_plan import (
    INTEGERS,
    Grid,
    Tile,
    choose_tile,
    constants,
    integers,
    make_grid,
    norm_grid,
    norm_share,
)
from taylor_kernels.backends.triton.gate_gradients import finish_kernel
from taylor_kernels.backends.triton.moments import FINISH_TILE, WARPS
from taylor_kernels.layout import Conv2dFisherArgs

#: The second launch adds up [parts, results] at once: where results are weights, there are many.
FINISH_WEIGHTS = (4, 512)
#: Tiles of rows that run side by side, so that what they read together stays in the L2 cache.
BAND = tl.constexpr(8)
#: The interpreter multiplies bfloat16 as if it were integers.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _program(row_tiles, col_tiles, share, batch):
    """Tile of rows, tile of columns, split, and the examples from `first` to before `last`."""
    block = tl.program_id(0).to(tl.int64)
    split = block // row_tiles // col_tiles
    tile = block % (row_tiles * col_tiles)
    top = tile // (BAND * col_tiles) * BAND
    band = tl.minimum(row_tiles - top, BAND)
    place = tile % (BAND * col_tiles)
    first = split * share
    return top + place % band, place // band, split, first, tl.minimum(first + share, batch)


@triton.jit
def _taps(k, columns, channels, height, taps, kernel_w, pad_h, dilation_h, dilation_w, LAST):
    """Channel of columns k, place in the weight, and offset in the image from the first tap's.

    Where channels are innermost in memory they are so among the columns, else they are as in the
    weight. Columns beyond the last lie below the image.
    """
    if LAST:
        channel = k % channels
        tap = k // channels
    else:
        channel = k // taps
        tap = k % taps
    down = tl.where(k < columns, tap // kernel_w * dilation_h, height + pad_h)
    return channel, channel * taps + tap, down, tap % kernel_w * dilation_w


@triton.jit
def _corners(p, positions, height, out_width, stride_h, stride_w, pad_h, pad_w):
    """Where in the image the first tap of output positions p is; beyond the last, below it."""
    h = tl.where(p < positions, p // out_width * stride_h - pad_h, height)
    return h, p % out_width * stride_w - pad_w


@triton.jit
def _store(
    fisher, weight, to, split, splits, row_tile, col_tile, col_tiles, row, rows, at, columns,
    row_fits, at_fits, WEIGHT: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """A tile, or the sums of its rows under the weight, to its place in the split's part; or its
    sum, where a split is an example.
    """
    fits = row_fits[:, None] & at_fits[None, :]
    to_tile = row[:, None] * columns + at[None, :]
    if NORMS:
        part = row_tile * col_tiles + col_tile
        tl.store(to + part * splits + split, tl.sum(tl.sum(tl.where(fits, fisher, 0), 1), 0))
    elif WEIGHT:
        w = tl.load(weight + to_tile, mask=fits, other=0).to(tl.float32)
        terms = tl.where(fits, w * w * fisher, 0)  # an infinite filter is NaN beyond its columns
        part = split * col_tiles + col_tile
        tl.store(to + part * rows + row, tl.sum(terms, 1), mask=row_fits)
    else:
        tl.store(to + split * rows * columns + to_tile, fisher, mask=fits)


@triton.jit(do_not_specialize=INTEGERS)
def product_kernel(
    x, dy, weight, to, batch, groups, filters, channels, height, width, out_width, positions, taps,
    kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, row_tiles, col_tiles, share,
    X_LAST: tl.constexpr, DY_LAST: tl.constexpr, X_VECTOR: tl.constexpr, DY_VECTOR: tl.constexpr,
    POINTWISE: tl.constexpr, WEIGHT: tl.constexpr, NORMS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """R filters of a group times C columns, P positions at a time.

    Sums of at most SPAN positions are added to that of an example; 0: it has no more.
    """
    row_tile, col_tile, split, first, last = _program(row_tiles, col_tiles, share, batch)
    tiles = tl.cdiv(filters, R)
    group = row_tile // tiles
    # The compiler takes from these products how addresses are aligned.
    channels = channels // X_VECTOR * X_VECTOR if X_LAST else channels
    filters = filters // DY_VECTOR * DY_VECTOR if DY_LAST else filters
    if not DY_LAST:
        positions = positions // DY_VECTOR * DY_VECTOR
    if POINTWISE and not X_LAST:
        positions = positions // X_VECTOR * X_VECTOR
    columns = channels * taps
    pixels = positions.to(INDEX) if POINTWISE else height.to(INDEX) * width
    x_channel = 1 if X_LAST else pixels
    x_pixel = groups * channels if X_LAST else 1
    dy_filter = 1 if DY_LAST else positions
    dy_position = groups * filters if DY_LAST else 1

    row = (row_tile % tiles * R).to(INDEX) + tl.arange(0, R)
    k = (col_tile * C).to(INDEX) + tl.arange(0, C)
    channel, at, down, right = _taps(
        k, columns, channels, height, taps, kernel_w, pad_h, dilation_h, dilation_w, X_LAST
    )
    col = channel * x_channel
    if not POINTWISE:
        col += (down * width + right) * x_pixel
    x += group * channels * x_channel
    dy += group * filters * dy_filter

    fisher = tl.zeros((R, C), tl.float32)
    gradient = tl.zeros((R, C), tl.float32)
    product = tl.zeros((R, C), tl.float32)
    n = first
    start = tl.full((), 0, INDEX)
    # One loop over all positions of all examples, so that loads run ahead from one into the next.
    for _ in tl.range((last - first) * tl.cdiv(positions, P)):
        x_n = x + n * groups * channels * pixels
        dy_n = dy + n * groups * filters * positions
        p = start + tl.arange(0, P)
        a_at = dy_n + row[:, None] * dy_filter + (p * dy_position)[None, :]
        a = tl.load(a_at, mask=(row < filters)[:, None] & (p < positions)[None, :], other=0)
        if POINTWISE:
            b_at = x_n + (p * x_pixel)[:, None] + col[None, :]
            b = tl.load(b_at, mask=(p < positions)[:, None] & (k < columns)[None, :], other=0)
        else:
            top, left = _corners(p, positions, height, out_width, stride_h, stride_w, pad_h, pad_w)
            b_at = x_n + ((top * width + left) * x_pixel)[:, None] + col[None, :]
            h = top[:, None] + down[None, :]
            w = left[:, None] + right[None, :]
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            b = tl.load(b_at, mask=inside, other=0)
        if INTERPRETED or P == 1:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if P == 1:
            product += a * b
        else:
            product = tl.dot(a, b, product, input_precision=PRECISION)
        start += P
        ends = start >= positions
        if SPAN and start % SPAN == 0:
            gradient += product
            product = tl.zeros((R, C), tl.float32)
        if ends:
            if SPAN:
                product += gradient
                gradient = tl.zeros((R, C), tl.float32)
            fisher += product * product
            product = tl.zeros((R, C), tl.float32)
        # Not in the branch, which waits for the product: the next loads need it now.
        n += ends.to(tl.int64)
        start = tl.where(ends, 0, start)
    _store(
        fisher, weight, to, split, batch, row_tile, col_tile, col_tiles, group * filters + row,
        groups * filters, at, columns, row < filters, k < columns, WEIGHT, NORMS,
    )  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def direct_kernel(
    x, dy, weight, to, batch, groups, filters, channels, height, width, out_width, positions, taps,
    kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, row_tiles, col_tiles, share,
    X_LAST: tl.constexpr, DY_LAST: tl.constexpr, X_VECTOR: tl.constexpr, DY_VECTOR: tl.constexpr,
    FILTERS: tl.constexpr, CHANNELS: tl.constexpr, WEIGHT: tl.constexpr, NORMS: tl.constexpr,
    INDEX: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """R filters, counted through the groups, times C columns, P positions at a time."""
    row_tile, col_tile, split, first, last = _program(row_tiles, col_tiles, share, batch)
    rows = groups * FILTERS
    if DY_LAST:
        rows = rows // DY_VECTOR * DY_VECTOR
    else:
        positions = positions // DY_VECTOR * DY_VECTOR
    columns = CHANNELS * taps
    channels = groups * CHANNELS // X_VECTOR * X_VECTOR if X_LAST else groups * CHANNELS
    pixels = height.to(INDEX) * width
    x_channel = 1 if X_LAST else pixels
    x_pixel = channels if X_LAST else 1
    dy_filter = 1 if DY_LAST else positions
    dy_position = rows if DY_LAST else 1

    row = (row_tile * R).to(INDEX) + tl.arange(0, R)
    k = (col_tile * C).to(INDEX) + tl.arange(0, C)
    channel, at, down, right = _taps(
        k, columns, CHANNELS, height, taps, kernel_w, pad_h, dilation_h, dilation_w, X_LAST
    )
    a_row = dy + (row * dy_filter)[:, None, None]
    b_row = x + (row // FILTERS * CHANNELS * x_channel)[:, None, None]
    col = (down * width + right) * x_pixel + channel * x_channel

    fisher = tl.zeros((R, C), tl.float32)
    for n in range(first, last):
        a_n = a_row + n * rows * positions
        b_n = b_row + n * channels * pixels
        products = tl.zeros((R, C, P), tl.float32)
        for start in range(0, positions, P):
            p = start + tl.arange(0, P).to(INDEX)
            a_fits = (row < rows)[:, None, None] & (p < positions)[None, None, :]
            a = tl.load(a_n + (p * dy_position)[None, None, :], mask=a_fits, other=0)
            top, left = _corners(p, positions, height, out_width, stride_h, stride_w, pad_h, pad_w)
            h = top[None, :] + down[:, None]
            w = left[None, :] + right[:, None]
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            b_at = ((top * width + left) * x_pixel)[None, :] + col[:, None]
            b_fits = (row < rows)[:, None, None] & inside[None, :, :]
            b = tl.load(b_n + b_at[None, :, :], mask=b_fits, other=0)
            products += a.to(tl.float32) * b.to(tl.float32)
        gradient = tl.sum(products, 2)
        fisher += gradient * gradient
    _store(
        fisher, weight, to, split, batch, row_tile, col_tile, col_tiles, row.to(tl.int64), rows,
        at, columns, row < rows, k < columns, WEIGHT, NORMS,
    )  # fmt: skip


def conv2d_fisher(args: Conv2dFisherArgs) -> None:
    """Write Σ_n of squared per-example weight gradients, or its filters' sums, into `args.out`."""
    tile = choose_tile(args)
    run(args, tile, make_grid(args, tile))


def conv2d_example_norms(args: Conv2dFisherArgs) -> None:
    """Write Σ of squared weight gradients of each example into `args.out`."""
    tile = choose_tile(args)
    share = norm_share(args, tile)
    for first in range(0, args.batch, share):
        x, dy, out = (t[first : first + share] for t in (args.input, args.grad_output, args.out))
        some = args._replace(input=x, grad_output=dy, out=out, batch=len(out))
        run(some, tile, norm_grid(some, tile), norms=True)


def run(args: Conv2dFisherArgs, tile: Tile, grid: Grid, norms: bool = False) -> None:
    """The same by any tile and grid."""
    device, results = args.out.device, args.out.numel()
    to = args.out if grid.parts == 1 else args.out.new_empty((grid.parts, results))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel_of(tile)[(grid.row_tiles * grid.col_tiles * grid.splits,)](
            args.input,
            args.grad_output,
            to if args.weight is None else args.weight,
            to,
            *integers(args, grid).values(),
            **constants(args, tile, norms),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if grid.parts > 1:
            finish = FINISH_WEIGHTS if args.weight is None else FINISH_TILE
            finish_kernel[(triton.cdiv(results, finish[1]),)](
                to, args.out, grid.parts, 1, 1, results, 1, *finish, num_warps=WARPS
            )


def kernel_of(tile: Tile) -> triton.JITFunction:
    """The kernel of the first launch."""
    return direct_kernel if tile.direct else product_kernel
