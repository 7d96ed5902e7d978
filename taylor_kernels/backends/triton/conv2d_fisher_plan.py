"""Tiles and splits of conv2d_fisher in Triton.

Bits depend on them, so they follow from shapes, layouts and whether tensors start at a 16-byte
address; nothing is tuned at run time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from taylor_kernels.layout import Conv2dFisherArgs

#: Programs wanted: about four for each multiprocessor of a large GPU.
PROGRAMS = 512
#: Examples that a program may square and add before their roundings are too many.
EXAMPLES = 1024
#: Bytes of partial results between the launches.
WORKSPACE = 64 * 2**20
#: Longest side of a product's tile; the short one where values are loaded one by one, or multiplied
#: without tensor cores: then addresses, or factors, take registers too.
SIDE, SHORT_SIDE = 128, 64
#: Tensor cores multiply no less than the first. A tile is halved for the sake of more programs, but
#: not below the second.
LEAST_SIDE, LEAST_TILE = 16, 32 * 32
#: Most positions multiplied at once: 128 bytes of each filter and column; less without tensor
#: cores, where all of them are in registers.
CHUNK = {"half": 64, "tf32": 32, "ieee": 16}
#: Positions whose products are summed at once: tensor cores cut off what does not fit, so that a
#: long sum of one sign would lose a little with every step. csrc/cuda/conv2d_fisher/launch_plan.cuh
#: says how much; without tensor cores a sum is rounded, and may be longer.
SPAN = {"bfloat16": 128, "float16": 64, "tf32": 64, "ieee": 256}
#: More padding than this share of the positions is worth a smaller chunk.
PADDING = 0.15
#: Groups of at most this many filters times channels are multiplied element by element: a tile of a
#: product would be nearly all padding.
DIRECT = 4
#: Their tile is [filters, columns, positions]. The most of each, and of filters times positions:
#: 16 or 32 elements for each thread.
DIRECT_ROWS, DIRECT_COLUMNS, DIRECT_POSITIONS, DIRECT_PRODUCTS = 64, 16, 128, 256

#: Offsets in an example that need 64 bits; tiles reach a bit beyond the last.
WIDE = 2**31 - 2**10

#: What both kernels are told, in the order of their arguments.
INTEGERS = (
    "batch", "groups", "filters", "channels", "height", "width", "out_width", "positions", "taps",
    "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "row_tiles",
    "col_tiles", "share",
)  # fmt: skip


class Tile(NamedTuple):
    """What a program takes at once."""

    direct: bool  # element by element, without tl.dot
    rows: int
    columns: int
    positions: int
    warps: int
    stages: int = 3


class Grid(NamedTuple):
    """The programs: tiles of rows of all groups, times tiles of columns, times splits."""

    row_tiles: int
    col_tiles: int
    splits: int
    share: int  # examples in a split
    parts: int  # partial results for each of the op's


def choose_tile(args: Conv2dFisherArgs) -> Tile:
    """The tile by which `conv2d_fisher` runs."""
    kind, positions, columns = _kind(args), math.prod(args.out_image), _columns(args)
    x_last, dy_last, x_vector, dy_vector = _layouts(args)
    if _is_direct(args):
        if x_last:
            rows = min(DIRECT_ROWS, triton.next_power_of_2(args.groups * args.filters))
        else:
            rows = DIRECT_PRODUCTS // min(DIRECT_POSITIONS, triton.next_power_of_2(positions))
        width = min(DIRECT_COLUMNS, triton.next_power_of_2(columns))
        return Tile(True, rows, width, DIRECT_PRODUCTS // rows, 4 if x_vector > 1 else 8)
    rows, width = (
        max(LEAST_SIDE, min(SHORT_SIDE if kind == "ieee" or vector == 1 else SIDE, extent))
        for vector, extent in (
            (dy_vector, triton.next_power_of_2(args.filters)),
            (x_vector, triton.next_power_of_2(columns)),
        )
    )
    if positions > _span(args) and rows * width == SIDE * SIDE and not (x_last and dy_last):
        width = SHORT_SIDE  # a third tile of sums, and addresses of rows, would not fit registers
    tile = Tile(False, rows, width, _chunk(positions, kind), 4)
    while tile.rows * tile.columns > LEAST_TILE:
        row_tiles, col_tiles = _tiles(args, tile)
        if 2 * row_tiles * col_tiles * args.batch >= PROGRAMS:
            break
        if tile.rows >= tile.columns:
            tile = tile._replace(rows=tile.rows // 2)
        else:
            tile = tile._replace(columns=tile.columns // 2)
    few = SHORT_SIDE if min(x_vector, dy_vector) > 1 else SHORT_SIDE // 2
    return tile._replace(warps=8 if max(tile.rows, tile.columns) > few else 4)


def make_grid(args: Conv2dFisherArgs, tile: Tile, programs: int = PROGRAMS) -> Grid:
    """About as many programs as wanted, if there are examples and workspace enough."""
    row_tiles, col_tiles = _tiles(args, tile)
    results = args.out.numel() * (1 if args.weight is None else col_tiles)
    wanted = max(triton.cdiv(programs, row_tiles * col_tiles), triton.cdiv(args.batch, EXAMPLES))
    possible = min(args.batch, max(1, WORKSPACE // (4 * results)))
    share = triton.cdiv(args.batch, min(wanted, possible))
    splits = triton.cdiv(args.batch, share)
    return Grid(row_tiles, col_tiles, splits, share, splits * results // args.out.numel())


def norm_grid(args: Conv2dFisherArgs, tile: Tile) -> Grid:
    """The programs for the norms of examples: each is a split, and each tile has a part of it."""
    row_tiles, col_tiles = _tiles(args, tile)
    return Grid(row_tiles, col_tiles, args.batch, 1, row_tiles * col_tiles)


def norm_share(args: Conv2dFisherArgs, tile: Tile) -> int:
    """Examples whose parts of norms fit the workspace."""
    return max(1, WORKSPACE // (4 * math.prod(_tiles(args, tile))))


def integers(args: Conv2dFisherArgs, grid: Grid) -> dict[str, int]:
    """The kernels' integers by name, in order."""
    values = (
        args.batch, args.groups, args.filters, args.channels, *args.image, args.out_image[1],
        math.prod(args.out_image), math.prod(args.kernel), args.kernel[1], *args.stride,
        *args.padding, *args.dilation, grid.row_tiles, grid.col_tiles, grid.share,
    )  # fmt: skip
    return dict(zip(INTEGERS, values, strict=True))


def constants(args: Conv2dFisherArgs, tile: Tile, norms: bool = False) -> dict[str, object]:
    """What a kernel is compiled for."""
    x_last, dy_last, x_vector, dy_vector = _layouts(args)
    # An offset into the image has two parts, of a first tap and of a tap; padding lengthens both.
    rows = args.image[0] + 2 * args.padding[0]
    padded = args.groups * args.channels * (rows * (args.image[1] + 2 * args.padding[1]))
    offsets = max(padded, args.grad_output.numel() // args.batch)
    result: dict[str, object] = {
        "X_LAST": x_last,
        "DY_LAST": dy_last,
        "X_VECTOR": x_vector,
        "DY_VECTOR": dy_vector,
        "WEIGHT": args.weight is not None,
        "NORMS": norms,
        "INDEX": tl.int64 if max(offsets, _columns(args)) > WIDE else tl.int32,
        "R": tile.rows,
        "C": tile.columns,
        "P": tile.positions,
    }
    if tile.direct:
        return result | {"FILTERS": args.filters, "CHANNELS": args.channels}
    span = _span(args)
    return result | {
        "POINTWISE": _is_pointwise(args),
        "PRECISION": "tf32" if args.tf32 else "ieee",
        "SPAN": span if math.prod(args.out_image) > span else 0,
    }


def _chunk(positions: int, kind: str) -> int:
    """The largest that pads little, else the largest that pads least."""
    if positions == 1 and kind == "ieee":
        return 1
    padded = {s: triton.cdiv(positions, s) * s for s in (64, 32, 16) if s <= CHUNK[kind]}
    allowed = max((1 + PADDING) * positions, min(padded.values()))
    return next(size for size, length in padded.items() if length <= allowed)


def _kind(args: Conv2dFisherArgs) -> str:
    if args.input.dtype != torch.float32:
        return "half"
    return "tf32" if args.tf32 else "ieee"


def _span(args: Conv2dFisherArgs) -> int:
    kind = _kind(args)
    return SPAN[str(args.input.dtype).removeprefix("torch.") if kind == "half" else kind]


def _columns(args: Conv2dFisherArgs) -> int:
    return args.channels * math.prod(args.kernel)


def _tiles(args: Conv2dFisherArgs, tile: Tile) -> tuple[int, int]:
    """Of rows, through all groups, and of columns."""
    if tile.direct:
        row_tiles = triton.cdiv(args.groups * args.filters, tile.rows)
    else:
        row_tiles = args.groups * triton.cdiv(args.filters, tile.rows)
    return row_tiles, triton.cdiv(_columns(args), tile.columns)


def _is_direct(args: Conv2dFisherArgs) -> bool:
    return args.groups > 1 and args.filters * args.channels <= DIRECT


def _is_pointwise(args: Conv2dFisherArgs) -> bool:
    """Whether output positions are the image's, as a linear layer's are."""
    return math.prod(args.kernel) == 1 and args.stride == (1, 1) and args.padding == (0, 0)


def _layouts(args: Conv2dFisherArgs) -> tuple[bool, bool, int, int]:
    """Whether channels of x and of dy lie innermost; how many values of each one load can take."""
    positions = math.prod(args.out_image)
    x_last = args.input_channels_last or math.prod(args.image) == 1
    dy_last = args.grad_channels_last or positions == 1
    adjacent = args.groups if _is_direct(args) else 1  # groups in one tile
    x_run = adjacent * args.channels if x_last else positions if _is_pointwise(args) else 1
    dy_run = adjacent * args.filters if dy_last else positions
    return x_last, dy_last, _vector(args.input, x_run), _vector(args.grad_output, dy_run)


def _vector(tensor: Tensor, run: int) -> int:
    """Values in a load of at most 16 bytes, out of runs of this length."""
    return math.gcd(run, 16 // tensor.element_size()) if tensor.data_ptr() % 16 == 0 else 1
