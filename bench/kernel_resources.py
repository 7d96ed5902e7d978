"""What the compilers say of the CUDA kernels, without a GPU: registers, occupancy, instructions.

    python -m bench.kernel_resources      # writes bench/results/static/cuda.{json,md}

Compiles csrc/*.cu for every architecture and reads ptxas and the machine code. Occupancy is the
share of a multiprocessor's warps that registers and static shared memory allow; shared memory that
a launch asks for comes on top. It says what a kernel could do, not how fast it is.

The tests compile a source for each architecture too where it is not the one that is recorded here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.markdown import table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tests.helpers.gpu_compile import (  # noqa: E402
    ARCHITECTURES,
    RECORD,
    SOURCES,
    compile_cuda,
    cuobjdump,
    sass_of_functions,
    text_digest,
)

#: Of a multiprocessor, by architecture: warps, bytes of shared memory. All have 64 K registers.
MULTIPROCESSOR = {80: (64, 164 << 10), 90: (64, 228 << 10), 100: (64, 228 << 10)}
REGISTERS = 1 << 16
#: Machine instructions that tell how memory is read and what multiplies.
INSTRUCTIONS = {
    "loads of 16 bytes": r"\bLDG\.E(?:\.\w+)*\.128\b|\bLDGSTS\.E(?:\.\w+)*\.128\b",
    "of 8": r"\bLDG\.E(?:\.\w+)*\.64\b|\bLDGSTS\.E(?:\.\w+)*\.64\b",
    "shorter": r"\bLDG\.E(?!\S*\.(?:128|64))\b|\bLDGSTS\.E(?!\S*\.(?:128|64))\b",
    "tensor core": r"\b(?:HMMA|HGMMA|UTCHMMA)\b",
    "spills": r"\b(?:LDL|STL)\b",
}


class Kernel(NamedTuple):
    source: str
    name: str
    arch: int
    registers: int
    shared: int
    threads: int
    occupancy: float
    instructions: dict[str, int]


def occupancy(arch: int, threads: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's warps; registers go to warps in units of 256."""
    warps = threads // 32
    most, memory = MULTIPROCESSOR[arch]
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(most // warps, REGISTERS // (per_warp * warps), 32)
    if shared:
        blocks = min(blocks, memory // (shared + 1024))
    return blocks * warps / most


def kernels_of(source: Path, folder: Path) -> list[Kernel]:
    """Every kernel of a source, for every architecture.

    Raises:
        RuntimeError: there is no cuobjdump.
    """
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump is neither on PATH nor in Triton's wheel")
    binary, resources = compile_cuda(source, folder)
    details = {arch: _details(binary, arch, tool) for arch in ARCHITECTURES}
    machine_code = {arch: sass_of_functions(binary, arch, tool) for arch in ARCHITECTURES}
    names = demangled([r.kernel for r in resources])
    found = []
    for r in resources:
        shared, threads = details[r.arch][r.kernel]
        sass = machine_code[r.arch][r.kernel]
        counts = {what: len(re.findall(how, sass)) for what, how in INSTRUCTIONS.items()}
        share = occupancy(r.arch, threads, r.registers, shared)
        found.append(
            Kernel(
                source.stem, names[r.kernel], r.arch, r.registers, shared, threads, share, counts
            )
        )
    return found


def _details(binary: Path, arch: int, tool: str) -> dict[str, tuple[int, int]]:
    """Kernel -> bytes of static shared memory, and the threads it is compiled for."""
    elf = subprocess.run(
        [tool, "-elf", "-arch", f"sm_{arch}", str(binary)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    usage = subprocess.run(
        [tool, "-res-usage", "-arch", f"sm_{arch}", str(binary)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    shared = dict(re.findall(r"Function (\w+):.*?SHARED:(\d+)", usage, re.DOTALL))
    threads = dict(
        re.findall(r"\.nv\.info\.(\w+)\n(?:(?!\.nv\.info\.).)*?EIATTR_MAX_THREADS"
                   r".*?Value:\s*(0x[0-9a-f]+)", elf, re.DOTALL)
    )  # fmt: skip
    return {name: (int(size), int(threads.get(name, "0x400"), 16)) for name, size in shared.items()}


def demangled(names: list[str]) -> dict[str, str]:
    """Mangled name -> a short one, as the tables have it."""
    done = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True)
    shorter = re.sub(r"tk::|\(anonymous namespace\)::|^void ", "", done.stdout, flags=re.MULTILINE)
    for code, dtype in enumerate(("f32", "f16", "bf16", "f64")):  # csrc/common/dtype.h
        shorter = shorter.replace(f"(DType){code}", dtype)
    return dict(zip(names, shorter.splitlines(), strict=True))


def markdown(kernels: list[Kernel]) -> str:
    """A table per source, a row per kernel; figures that differ stand side by side."""
    head = ["kernel", "registers", "occupancy", *INSTRUCTIONS]
    per_arch = "Figures by architecture, where they differ: " + ", ".join(
        f"sm_{arch}" for arch in ARCHITECTURES
    )
    lines = ["# CUDA kernels as compiled", "", *(__doc__ or "").strip().splitlines()[4:7]]
    lines += [f"{per_arch}.", ""]
    for source in dict.fromkeys(k.source for k in kernels):
        rows = []
        for name in sorted({k.name for k in kernels if k.source == source}):
            each = sorted((k for k in kernels if k.name == name), key=lambda k: k.arch)
            figures = [[k.registers, f"{k.occupancy:.0%}", *k.instructions.values()] for k in each]
            columns = zip(*figures, strict=True)
            rows.append([f"`{name}`", *(_side_by_side(column) for column in columns)])
        lines += [f"## {source}", "", table(head, rows), ""]
    return "\n".join(lines)


def _side_by_side(figures: Sequence[object]) -> str:
    return " ".join(map(str, figures if len(set(figures)) > 1 else figures[:1]))


def main() -> None:
    if not shutil.which("nvcc"):
        sys.exit("error: nvcc is not on PATH")
    kernels: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            print(f"compiling {source.name}", file=sys.stderr)
            kernels += kernels_of(source, Path(folder))
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "sources": {source.stem: text_digest(source) for source in SOURCES},
        "kernels": [kernel._asdict() for kernel in kernels],
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    page = RECORD.with_suffix(".md")
    page.write_text(markdown(kernels))
    print(page)


if __name__ == "__main__":
    main()
