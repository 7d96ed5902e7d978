"""The CPU kernels as the compiler makes them: what their inner loops consist of."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.helpers import ROOT

SOURCES = ("filter_moments", "second_order_moments", "hutchinson_moments", "gate_gradients")
X86 = platform.machine() in ("x86_64", "AMD64")
#: Prefix of the tools that make code for arm64 elsewhere.
ARM64 = "aarch64-linux-gnu-"
#: Functions that hold inner loops; csrc/cpu keeps the compiler from inlining them.
LOOPS = ("sum_rows", "sum_strip", "sum_run", "sum_channels")

_JUMP = re.compile(r"j[a-z]+$|b(\.[a-z]+)?$|cbn?z$|tbn?z$")
_LEAVES = re.compile(r"j[a-z]+|b|b\.[a-z]+|cbn?z|tbn?z|call[a-z]*|blr?|ret[a-z]*")
_PRODUCT = re.compile(r"v?f?n?m(ul|add|sub|la|ls)(p[sd])?|v?fn?m(add|sub)\d+p[sd]")
_VECTOR = re.compile(r"%[xyz]mm|\bv\d+\.[0-9]")
_STACK = re.compile(r"\(%[er][sb]p|\[sp")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


class Loop(NamedTuple):
    """An inner loop: a straight run of instructions that multiplies vectors and jumps back."""

    function: str
    instructions: list[Instruction]

    @property
    def vectors_on_stack(self) -> list[Instruction]:
        """Those that store a vector to the stack, or load one from it."""
        on_stack = (i for i in self.instructions if _STACK.search(i.operands))
        return [i for i in on_stack if _VECTOR.search(i.operands)]

    @property
    def products(self) -> int:
        """Multiplications of vectors, fused or not."""
        return sum(_multiplies(i) for i in self.instructions)

    @property
    def text(self) -> str:
        return "\n".join(f"{i.name} {i.operands}" for i in self.instructions)


def commands(folder: Path, isa: str) -> dict[Path, list[str]]:
    """Source -> how CMake compiles it for a set; `neon` by a cross compiler."""
    found = json.loads((folder / "compile_commands.json").read_text())
    here = "baseline" if isa == "neon" and X86 else isa
    each = {}
    for entry in found:
        words = shlex.split(entry["command"])
        if f"-DTK_ISA={here}" not in words:
            continue
        if here != isa:
            words = [f"{ARM64}g++", *words[1:]]
            words[words.index(f"-DTK_ISA={here}")] = f"-DTK_ISA={isa}"
        each[Path(entry["file"])] = words
    return each


def configure(folder: Path) -> None:
    """Let CMake write its commands into `folder`."""
    import pybind11

    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "PYBIND11_FINDPYTHON": "ON",
        "TAYLOR_KERNELS_CUDA": "off",
    }
    defines = [f"-D{key}={value}" for key, value in options.items()]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    cmake = shutil.which("cmake", path=path)
    assert cmake, "no cmake: pip install cmake"
    _run([cmake, "-S", ROOT, "-B", folder, *defines])


def compiled(folder: Path, isa: str, stems: Sequence[str] = SOURCES) -> dict[str, Path]:
    """Objects of these sources, two compilers at a time."""
    jobs = {s.stem: words for s, words in commands(folder, isa).items() if s.stem in stems}
    assert jobs.keys() == set(stems)
    objects = {stem: folder / f"{stem}.{isa}.o" for stem in jobs}

    def build(stem: str) -> None:
        words = jobs[stem]
        words[words.index("-o") + 1] = str(objects[stem])
        _run(words)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, stems))
    return objects


def linked(objects: Mapping[str, Path], isa: str, main: Path, folder: Path) -> Path:
    """A program of these kernels and a main()."""
    cross = isa == "neon" and X86
    needed = [objects[stem] for stem in ("filter_moments", "gate_gradients")]
    options = ["-std=c++20", "-O2", "-Wno-psabi", "-pthread", *(["-static"] if cross else [])]
    words = [f"{ARM64}g++" if cross else "g++", *options, f"-DTK_ISA={isa}", "-I", ROOT / "csrc"]
    program = folder / f"{main.stem}.{isa}"
    _run([*words, main, ROOT / "csrc/cpu/parallel.cpp", *needed, "-ldl", "-o", program])
    return program


def inner_loops(object_file: Path, isa: str) -> Iterator[Loop]:
    """The inner loops of the functions of LOOPS."""
    tool = f"{ARM64}objdump" if isa == "neon" and X86 else "objdump"
    text = _run([tool, "-dC", "--no-show-raw-insn", object_file])
    for function, body in _functions(text):
        if not re.search(rf"\b({'|'.join(LOOPS)})<", function):
            continue
        at = {instruction.address: i for i, instruction in enumerate(body)}
        for end, instruction in enumerate(body):
            target = re.search(r"([0-9a-f]+) <", instruction.operands)
            if not _JUMP.match(instruction.name) or not target:
                continue
            start = at.get(int(target[1], 16), end + 1)
            run = body[start : end + 1]
            straight = not any(_LEAVES.fullmatch(i.name) for i in run[:-1])
            if straight and any(_multiplies(i) for i in run):
                yield Loop(function, run)


def _multiplies(instruction: Instruction) -> bool:
    return bool(_PRODUCT.fullmatch(instruction.name) and _VECTOR.search(instruction.operands))


def _functions(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    for block in re.split(r"\n(?=[0-9a-f]+ <)", text):
        head, _, rest = block.partition("\n")
        lines = re.findall(r"^\s+([0-9a-f]+):\s+(\S+)[ \t]*(.*)$", rest, re.MULTILINE)
        name = head.replace("(anonymous namespace)::", "")
        yield name, [Instruction(int(at, 16), *words) for at, *words in lines]


def _run(words: Sequence[object]) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
