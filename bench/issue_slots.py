"""How many instructions a warp issues for each product on tensor cores, read in the machine code.

    python -m bench.issue_slots      # conv2d_fisher.cu: bench/results/static/issue_slots.{json,md}
    python -m bench.issue_slots --name NAME OBJECT...    # of .cubin or .o files: NAME.{json,md}

A scheduler issues one instruction of a warp a cycle, so a kernel can do no more products a second
than its loop over chunks of positions lets it issue, nor more than tensor cores do. That is a cap,
not a speed that was measured: no GPU has run these kernels. Counted is the cheapest way once round
the loop that multiplies a whole chunk and loads the next in the given manner; to it comes what ends
a span of positions, shared out over the span's chunks. A product is an mma.sync, 16×8×16 of half
types or 16×8×8 of TF32: 8 cycles of an A100's tensor core, 6.4 of an H100's, where wgmma takes 4.
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from bench.kernel_resources import demangled
from bench.markdown import table
from tests.helpers.gpu_compile import RECORD, ROOT, compile_cuda, cuobjdump, sass_of_functions

SOURCE = ROOT / "csrc" / "cuda" / "conv2d_fisher" / "conv2d_fisher.cu"

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*?);", re.M)
#: What a way around the loop has to meet, of a count of each.
MET = {
    "mma": r"HMMA\b",
    "vectors": r"(?:LDG|LDGSTS)\b.*\.128\b",
    "words": r"(?:LDG|LDGSTS)\b(?!.*\.(?:128|64)\b)",
    "ends": r"FADD\b",
    "arithmetic": r"(?:FFMA|FADD|FMUL)\b",
}
#: An A100 and an H100: multiprocessors of four schedulers, GHz, a tensor core's cycles for a
#: product by mma.sync. On Hopper that has about 0.62 of what wgmma reaches.
GPUS = {80: (108, 1.41, 8.0), 90: (132, 1.755, 6.4)}
FLOP = 2 * 16 * 8 * 16  # of half types
#: Of csrc/cuda/conv2d_fisher: bytes of a row in a chunk, threads of a block, chunks to a span.
CHUNK_BYTES, THREADS = 64, 256
SPAN_CHUNKS = {"bf16": 4, "f16": 2, "f32": 4}


class Block(NamedTuple):
    size: int
    met: Counter[str]
    next: tuple[int, ...]


def blocks_of(sass: str) -> dict[int, Block]:
    """Address of the first instruction -> basic block."""
    found = [
        (int(at, 16), guard, opcode, rest) for at, guard, opcode, rest in INSTRUCTION.findall(sass)
    ]
    leaders = {found[0][0]}
    for i, (_, _, opcode, rest) in enumerate(found[:-1]):
        if opcode.startswith(("BRA", "EXIT", "RET")):
            leaders.add(found[i + 1][0])
            leaders.update(int(t, 16) for t in re.findall(r"0x[0-9a-f]+", rest)[-1:])
    blocks, current = {}, None
    for i, (at, guard, opcode, rest) in enumerate(found):
        if at in leaders:
            current, size, met = at, 0, Counter[str]()
        size += opcode != "NOP"
        met.update(name for name, how in MET.items() if re.match(how, opcode))
        following = found[i + 1][0] if i + 1 < len(found) else None
        if following is not None and following not in leaders:
            continue
        after = [following] if following is not None else []
        if opcode.startswith("BRA"):
            target = int(re.findall(r"0x[0-9a-f]+", rest)[-1], 16)
            conditional = guard or re.match(r"\s*!?U?P\d", rest)
            after = [target, *after] if conditional else [target]
        elif opcode.startswith(("EXIT", "RET")) and not guard:
            after = []
        blocks[current] = Block(size, met, tuple(after))
    return blocks


def cheapest_round(blocks: dict[int, Block], wanted: dict[str, int]) -> int | None:
    """Instructions of the cheapest way from a block that has the first of what is wanted back to it
    that meets as many of each as are wanted, or more; None if there is none."""
    names = list(wanted)
    limit = tuple(wanted.values())
    best: int | None = None
    for start in (at for at, block in blocks.items() if block.met[names[0]]):
        queue = [(0, start, (0,) * len(names))]
        seen = set()
        while queue:
            cost, at, had = heapq.heappop(queue)
            if best is not None and cost >= best:
                break
            if at == start and cost and had == limit:
                best = cost
                break
            if (at, had) in seen:
                continue
            seen.add((at, had))
            block = blocks[at]
            now = tuple(
                min(n + block.met[name], most)
                for name, n, most in zip(names, had, limit, strict=True)
            )
            for after in block.next:
                heapq.heappush(queue, (cost + block.size, after, now))
    return best


class Loop(NamedTuple):
    """A tile kernel's loop over chunks of positions, for one way of loading."""

    kernel: str
    arch: int
    loads: str  # of 16 bytes, or shorter ones
    products: int  # that a warp does of a chunk
    slots: int  # instructions that it issues for a chunk
    span_slots: int  # and more where a span ends
    slots_per_product: float
    bytes_per_product: float  # that a warp's share of the block loads
    tflops_cap: float


def loops_of(kernel: str, arch: int, sass: str) -> list[Loop]:
    """Of a kernel of conv2d_fisher that multiplies on tensor cores; else nothing."""
    found = re.search(r"Mma<(\w+), (\w+)>, Tile<([\d, ]+)>", kernel)
    if not found:
        return []
    dtype, sizes = found[1], [int(n) for n in found[3].split(",")]
    down, across, lane_columns = sizes[0], sizes[1], sizes[-1]
    lane_filters = sizes[2] if len(sizes) == 4 else 4
    sides = (8 * lane_filters * down, 4 * lane_columns * across)
    blocks = blocks_of(sass)
    products = sum(block.met["mma"] for block in blocks.values())
    vectors = [max(1, rows * CHUNK_BYTES // 16 // THREADS) for rows in sides]
    words = [rows * CHUNK_BYTES // 4 // THREADS for rows in sides]
    halves = 1 if dtype == "f32" else 2
    ways = {"16 bytes": {"vectors": sum(vectors)}}
    if "pipelined" in kernel:
        ways["4 bytes"] = {"words": sum(words)}
    elif found[2] == "false":
        ways["x by elements"] = {"vectors": vectors[0], "words": halves * words[1]}
    loops = []
    for way, loads in ways.items():
        wanted = {"mma": products, **loads}
        slots = cheapest_round(blocks, wanted)
        ended = cheapest_round(blocks, {**wanted, "ends": lane_filters * lane_columns})
        assert slots is not None, f"{kernel} for sm_{arch}: no loop that loads {way}"
        assert ended is not None, f"{kernel} for sm_{arch}: no end of a span"
        each = (slots + (ended - slots) / SPAN_CHUNKS[dtype]) / products
        processors, clock, cycles = GPUS[arch]
        rate = processors * 4 * clock / 1e3 / max(each, cycles)
        loops.append(
            Loop(kernel, arch, way, products, slots, ended - slots, round(each, 2),
                 round(sum(sides) * CHUNK_BYTES / 8 / products, 1),
                 round(rate * FLOP * halves / 2))
        )  # fmt: skip
    return loops


def loops_in(binary: Path, tool: str) -> list[Loop]:
    loops = []
    for arch in GPUS:
        functions = sass_of_functions(binary, arch, tool)
        names = demangled(list(functions)) if functions else {}
        for function, sass in functions.items():
            if f"EF_CUDA_SM{arch} " in sass:  # of a .cubin, all is shown whatever is asked for
                loops += loops_of(names[function], arch, sass)
    return sorted(loops, key=lambda loop: (loop.kernel, loop.loads, loop.arch))


def markdown(loops: list[Loop]) -> str:
    head = ["kernel", "loads", "sm", "mma", "slots", "at a span's end"]
    head += ["slots a mma", "bytes a mma", "cap, TFLOP/s"]
    rows = [
        [f"`{loop.kernel}`", loop.loads, *map(str, (loop.arch, *loop[3:6])),
         f"{loop.slots_per_product:.2f}", f"{loop.bytes_per_product:g}", str(loop.tflops_cap)]
        for loop in loops
    ]  # fmt: skip
    about = (__doc__ or "").strip().splitlines()[5:]
    return "\n".join(["# Issue slots of conv2d_fisher", "", *about, "", table(head, rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", default="issue_slots", help="of the files")
    parser.add_argument("objects", nargs="*", type=Path, help="instead of compiling what is here")
    options = parser.parse_args()
    tool = cuobjdump()
    if tool is None or not (options.objects or shutil.which("nvcc")):
        sys.exit("error: nvcc and cuobjdump are needed; cuobjdump is in Triton's wheel, too")
    with tempfile.TemporaryDirectory() as folder:
        objects = options.objects or [compile_cuda(SOURCE, Path(folder))[0]]
        loops = [loop for binary in objects for loop in loops_in(binary, tool)]
    loops.sort(key=lambda loop: (loop.kernel, loop.loads, loop.arch))
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    rows = [loop._asdict() for loop in loops]
    (RECORD.parent / f"{options.name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RECORD.parent / f"{options.name}.md").write_text(markdown(loops))
    print(RECORD.parent / f"{options.name}.md")


if __name__ == "__main__":
    main()
