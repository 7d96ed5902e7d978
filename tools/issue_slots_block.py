"""What docs/kernels.md quotes of `python -m bench.issue_slots`: the machine code before and now."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bench.markdown import table

#: Relative to the repository.
NOW = Path("bench/results/static/issue_slots.json")
BEFORE = Path("bench/results/static/issue_slots_before.json")

#: A row: what it is called; dtype, channels inside and loads before; the same and the tile now.
ROWS = (
    ("float16, channels_last", ("f16", True, "16 bytes"), "block", ("f16", True)),
    ("float16, contiguous, 3×3, turned first", ("f16", False, "x by elements"), "block",
     ("f16", True)),
    ("float16, contiguous, 1×1", ("f16", False, "16 bytes"), "block", ("f16", False)),
    ("float16, channels_last, at most 64 filters", ("f16", True, "16 bytes"), "half_block",
     ("f16", True)),
    ("bfloat16, channels_last", ("bf16", True, "16 bytes"), "block", ("bf16", True)),
    ("TF32, channels_last", ("f32", True, "16 bytes"), "block", ("f32", True)),
    ("TF32, contiguous, 1×1", ("f32", False, "16 bytes"), "block", ("f32", False)),
)  # fmt: skip
TILES = {"block": (128, 128), "half_block": (64, 128)}


def issue_slots_block(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """The best tile of 64 filters and more before, and the pipelined kernel's now, on sm_90."""
    rows = []
    for name, (dtype, inside, loads), tile, (new_dtype, new_inside) in ROWS:
        olds = [
            loop
            for loop in before
            if _is(loop, dtype, inside, loads) and _sides(loop)[0] == TILES[tile][0]
        ]
        old = min(olds, key=lambda loop: loop["slots_per_product"])
        new = next(
            loop
            for loop in now
            if "pipelined" in loop["kernel"]
            and _is(loop, new_dtype, new_inside, "16 bytes")
            and _sides(loop) == TILES[tile]
        )
        rows.append([name, *(f for loop in (old, new) for f in _figures(loop))])
    head = ["on sm_90", "tile before", "issue slots a product", "bytes a product", "cap, TFLOP/s"]
    head += ["tile now", *head[2:]]
    return "\n\n".join(
        (
            table(head, rows),
            "Counted in machine code of nvcc 13, not measured: no GPU has run it. Sources: "
            f"`{BEFORE}`, `{NOW}`, written by `python -m bench.issue_slots`.",
        )
    )


def _is(loop: dict[str, Any], dtype: str, inside: bool, loads: str) -> bool:
    form = f"Mma<{dtype}, {str(inside).lower()}>"
    return loop["arch"] == 90 and loop["loads"] == loads and form in loop["kernel"]


def _sides(loop: dict[str, Any]) -> tuple[int, int]:
    """Filters and columns of the tile, as csrc/cuda/conv2d_fisher/fisher_task.cuh has them."""
    found = re.search(r"Tile<([\d, ]+)>", loop["kernel"])
    assert found is not None
    down, across, *lane = (int(n) for n in found[1].split(","))
    filters = lane[0] if len(lane) == 2 else 4
    return 8 * filters * down, 4 * lane[-1] * across


def _figures(loop: dict[str, Any]) -> list[str]:
    return [
        "{}×{}".format(*_sides(loop)),
        f"{loop['slots_per_product']:.1f}",
        f"{loop['bytes_per_product']:g}",
        str(loop["tflops_cap"]),
    ]
