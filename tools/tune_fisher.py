"""Which tiles conv2d_fisher in Triton should take: every layer timed by many of them, on a GPU.

    python -m tools.tune_fisher --dry-run     # what would be timed; needs no GPU
    python -m tools.tune_fisher               # one call; $OUT/tune_fisher.json, or --out

Layers come in the order of their work. For each, extents of tiles and warps are tried around the
plan's own choice, then chunks and stages around the best of them, then numbers of programs. A step
times its candidates in turns with the plan's choice and PyTorch's weight gradient (cuDNN's or
cuBLAS's), the floor. Answers are checked against float64 first; what does not fit is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bench.bench_conv2d_fisher import GRADIENT, OURS, PRECISIONS, inputs, products, providers
from bench.harness import Provider, Result, measure
from bench.models import resnet50
from bench.shapes import Layer, layers_of, transformer_layers
from taylor_kernels.backends.triton.conv2d_fisher import run
from taylor_kernels.backends.triton.conv2d_fisher_plan import (
    LEAST_SIDE,
    PROGRAMS,
    Tile,
    choose_tile,
    make_grid,
)
from taylor_kernels.layout import Conv2dFisherArgs, conv2d_fisher_args

NETWORKS: dict[str, Callable[[], list[Layer]]] = {
    "resnet50": lambda: layers_of(resnet50(), (64, 3, 224, 224)),
    "transformer": transformer_layers,
    # To see that it runs, on a CPU too, in Triton's interpreter.
    "small": lambda: [Layer("conv", (2, 4, 4, 4), (4, 4, 3, 3), padding=1)],
}
#: Extents are tried at half, once and twice the best so far.
FACTORS = (0.5, 1, 2)
#: Entries of a tile for each thread: more would not fit its registers twice.
ENTRIES = (4, 64)
STAGES = (2, 3, 4)
#: Bytes of shared memory that a block can have on the largest GPUs.
SHARED = 227 * 1024


class Choice(NamedTuple):
    """What is tuned."""

    tile: Tile
    programs: int = PROGRAMS

    def __str__(self) -> str:
        _, rows, columns, positions, warps, stages = self.tile
        return f"{rows}x{columns}x{positions} {warps} warps {stages} stages {self.programs}"


def tiles(args: Conv2dFisherArgs, best: Choice) -> list[Choice]:
    """Other extents of filters and columns, and warps for them."""
    found = []
    for of_rows, of_columns, warps in product(FACTORS, FACTORS, (4, 8)):
        rows, columns = int(best.tile.rows * of_rows), int(best.tile.columns * of_columns)
        entries = rows * columns / (32 * warps)
        if min(rows, columns) >= LEAST_SIDE and ENTRIES[0] <= entries <= ENTRIES[1]:
            tile = best.tile._replace(rows=rows, columns=columns, warps=warps)
            found.append(best._replace(tile=tile))
    return found


def depths(args: Conv2dFisherArgs, best: Choice) -> list[Choice]:
    """Other numbers of positions, and stages of copies in flight."""
    now = best.tile.positions
    # Tensor cores multiply no fewer than 16; one is an outer product.
    chunks = (1, 16) if now == 1 else {max(16, int(now * factor)) for factor in FACTORS}
    position_bytes = (best.tile.rows + best.tile.columns) * args.input.element_size()
    found = []
    for positions, stages in product(sorted(chunks), STAGES):
        if positions * position_bytes * stages <= SHARED:
            tile = best.tile._replace(positions=positions, stages=stages)
            found.append(best._replace(tile=tile))
    return found


def programs(args: Conv2dFisherArgs, best: Choice) -> list[Choice]:
    """Other numbers of programs, where they are others."""
    grids = {make_grid(args, best.tile, count): count for count in (256, 512, 1024)}
    return [best._replace(programs=count) for count in grids.values()]


STEPS = (tiles, depths, programs)


def arguments(layer: Layer, x: Tensor, dy: Tensor, w: Tensor, tf32: bool) -> Conv2dFisherArgs:
    """As the public functions describe the layer."""
    if w.dim() == 2:
        x, dy = (t.reshape(len(t), -1, t.size(-1)).mT.unsqueeze(-1) for t in (x, dy))
        w = w[:, :, None, None]
    geometry = [layer.stride] * 2, [layer.padding] * 2, [1, 1], 1
    out = w.new_empty(w.size(0), dtype=torch.float32)
    return conv2d_fisher_args(x, dy, w, w.shape, *geometry, tf32, out)


def candidate(args: Conv2dFisherArgs, choice: Choice, check: Callable[[Tensor], float]) -> Provider:
    grid = make_grid(args, choice.tile, choice.programs)

    def answer() -> Tensor:
        run(args, choice.tile, grid)
        return args.out

    def poison() -> None:
        args.out.fill_(float("nan"))

    return Provider(str(choice), answer, check, "extra", before=poison)


def tune(
    layer: Layer, precision: str, device: torch.device, rounds: int, until: float
) -> dict[str, Any]:
    """The plan's choice, the best found, all that were tried, and the floor; in seconds."""
    dtype, tf32 = PRECISIONS["cuda"][precision]
    with products(tf32):
        gradient, ours = providers(layer, dtype, tf32, device)[:2]
        assert (gradient.label, ours.label) == (GRADIENT, OURS)
        args = arguments(layer, *inputs(layer, dtype, device), tf32)
        default = best = Choice(choose_tile(args))
        tried: dict[str, dict[str, Any]] = {}
        floor = None
        for step in STEPS:
            if tried and time.monotonic() > until:
                break
            choices = {str(choice): choice for choice in (default, best, *step(args, best))}
            candidates = [candidate(args, choice, ours.check) for choice in choices.values()]
            title = f"{layer.name} {precision} {step.__name__}"
            results = measure(title, [gradient, *candidates], rounds, device, memory=False)
            found = results.pop(GRADIENT)
            floor = None if found.unavailable else found.median
            last = {label: record(result) for label, result in results.items()}
            tried |= last
            able = [label for label in last if "seconds" in last[label]]
            if not able:
                break
            best = choices[min(able, key=lambda label: last[label]["seconds"])]
    return {
        "layer": asdict(layer),
        "precision": precision,
        "floor": floor,
        "default": described(default) | last[str(default)],
        "best": described(best) | last[str(best)],
        "tried": tried,
    }


def described(choice: Choice) -> dict[str, Any]:
    return {"choice": str(choice), "programs": choice.programs, **choice.tile._asdict()}


def record(result: Result) -> dict[str, Any]:
    if result.unavailable:
        return {"unavailable": result.unavailable}
    return {"seconds": result.median, "least": min(result.samples), "error": result.error}


def row(found: dict[str, Any]) -> str:
    """A line of the table: times in microseconds."""
    layer = Layer(**found["layer"])
    default, best = (found[which].get("seconds", float("nan")) for which in ("default", "best"))
    floor = found["floor"] or float("nan")
    return (
        f"{layer.name:<20} x{layer.count:<2} {found['precision']}  {default * 1e6:8.1f}  "
        f"{best * 1e6:8.1f}  {floor * 1e6:8.1f}  {layer.flops / best / 1e12:6.1f} TFLOP/s  "
        f"{default / floor:5.2f}  {best / floor:5.2f}  {found['best']['choice']}"
    )


def plan(cases: list[tuple[str, Layer, str]]) -> None:
    """Say what would be timed: by how many choices at first, since each step builds on the last."""
    for network, layer, precision in cases:
        dtype, tf32 = PRECISIONS["cuda"][precision]
        args = arguments(layer, *inputs(layer, dtype, torch.device("meta")), tf32)
        choice = Choice(choose_tile(args))
        grid = make_grid(args, choice.tile)
        counts = ", ".join(f"{len(step(args, choice))} {step.__name__}" for step in STEPS)
        print(
            f"{network:<12} {layer.name:<20} x{layer.count:<2} {layer.flops / 1e9:7.1f} GFLOP  "
            f"{precision}  {choice}: {grid.row_tiles * grid.col_tiles * grid.splits}; {counts}"
        )


def main(arguments_: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", default="resnet50,transformer", help=", ".join(NETWORKS))
    parser.add_argument("--precisions", default="bf16,tf32", help=", ".join(PRECISIONS["cuda"]))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=540, help="start nothing after these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be timed")
    options = parser.parse_args(arguments_)

    layers = [(name, layer) for name in options.networks.split(",") for layer in NETWORKS[name]()]
    layers.sort(key=lambda pair: -pair[1].flops * pair[1].count)
    cases = [(*pair, precision) for precision in options.precisions.split(",") for pair in layers]
    if options.dry_run:
        plan(cases)
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("tune_fisher: PyTorch sees no GPU; --dry-run says what would be timed")
        return 2
    out = options.out or Path(os.environ.get("OUT", "bench/results")) / "tune_fisher.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + options.seconds
    report: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "found": []}
    if device.type == "cuda":
        report |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    print(
        "layer, its count, precision; plan, best, floor in µs; best's speed; plan and best / floor"
    )
    for network, layer, precision in cases:
        if time.monotonic() > until:
            break
        found = {"network": network, **tune(layer, precision, device, options.rounds, until)}
        report["found"].append(found)
        print(row(found), flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    done, wanted = len(report["found"]), len(cases)
    print(f"{done} of {wanted} cases; {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
