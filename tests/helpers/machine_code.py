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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.helpers import ROOT
from tests.helpers.kept import included, kept
from tests.helpers.samples import some

SOURCES = ("filter_moments", "second_order_moments", "hutchinson_moments", "gate_gradients")
#: Two parts of them that take about as long to compile.
PARTS = (SOURCES[:1], SOURCES[1:])
X86 = platform.machine() in ("x86_64", "AMD64")
#: Where an editable install compiles (setup.py).
BUILD = ROOT / "build" / "cmake"
#: The instruction sets of CMakeLists.txt.
SETS = ("baseline", "avx2", "avx512", "neon")
#: Prefix of the tools that make code for arm64 elsewhere.
ARM64 = "aarch64-linux-gnu-"
#: Functions that hold inner loops; csrc/cpu keeps the compiler from inlining them.
LOOPS = (
    "sum_rows",
    "sum_rows_together",
    "sum_short_rows",
    "sum_strip",
    "sum_runs",
    "sum_channels",
)

_JUMP = re.compile(r"j[a-z]+$|b(\.[a-z]+)?$|cbn?z$|tbn?z$")
_LEAVES = re.compile(r"j[a-z]+|b|b\.[a-z]+|cbn?z|tbn?z|call[a-z]*|blr?|ret[a-z]*")
_PRODUCT = re.compile(r"v?f?n?m(ul|add|sub|la|ls)(p[sd])?|v?fn?m(add|sub)\d+p[sd]")
_VECTOR = re.compile(r"%[xyz]mm|\bv\d+\.[0-9]")
_STACK = re.compile(r"\(%[er][sb]p|\[sp")
_STACK_POINTER = re.compile(r"\(%[er]sp|\[sp")


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
        # A base register that the loop moves holds no frame: the compiler has it for any pointer.
        moved = any(i.operands.endswith("%rbp") for i in self.instructions)
        stack = _STACK_POINTER if moved else _STACK
        on_stack = (i for i in self.instructions if stack.search(i.operands))
        return [i for i in on_stack if _VECTOR.search(i.operands)]

    @property
    def prefetches(self) -> list[Instruction]:
        return [each for each in self.instructions if each.name.startswith(("prefetch", "prfm"))]

    @property
    def products(self) -> int:
        """Multiplications of vectors, fused or not."""
        return sum(_multiplies(i) for i in self.instructions)

    @property
    def text(self) -> str:
        return "\n".join(f"{i.name} {i.operands}" for i in self.instructions)


def crossed(isa: str) -> bool:
    """Whether it takes a cross compiler, and an emulator to run."""
    return isa == "neon" and X86


def sources_of(isa: str) -> tuple[str, ...]:
    """Those that this run reads the code of, for a set: the package's own build has compiled all
    of them, but a cross compiler takes a minute, and has one part to do."""
    if not crossed(isa):
        return SOURCES
    return tuple(stem for part in some(PARTS, 1) for stem in part)


def compile_commands(isa: str) -> dict[str, tuple[Path, list[str]]]:
    """The stem of a source -> the object that CMake makes of it for a set, and how."""
    found = json.loads((BUILD / "compile_commands.json").read_text())
    each = {}
    for entry in found:
        words = shlex.split(entry["command"])
        if f"-DTK_ISA={isa}" in words:
            each[Path(entry["file"]).stem] = BUILD / entry["output"], words
    return each


def configure() -> None:
    """Let CMake bring its commands up to date, or write them where nothing was built yet."""
    import pybind11

    if not (BUILD / "build.ninja").exists():
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PYBIND11_FINDPYTHON": "ON",
            "TAYLOR_KERNELS_CUDA": "off",
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        _cmake("-S", ROOT, "-B", BUILD, "-G", "Ninja", *defines)
    _cmake("--build", BUILD, "--target", "build.ninja")


def _cmake(*arguments: object) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    cmake = shutil.which("cmake", path=path)
    assert cmake, "no cmake: pip install cmake"
    _run([cmake, *arguments], PATH=path)


def compiled(isa: str) -> dict[str, Path]:
    """Objects of `sources_of` a set: those of the package's own build, compiled if they are not up
    to date, or what a cross compiler made of them (`kept`)."""
    stems, cross = sources_of(isa), crossed(isa)
    jobs = compile_commands("baseline" if cross else isa)
    if not cross:
        objects = {stem: jobs[stem][0] for stem in stems}
        bring_up_to_date(objects.values())
        return objects
    compiler = f"{ARM64}g++"
    commands = {stem: [compiler, *jobs[stem][1][1:]] for stem in stems}
    for words in commands.values():
        words[words.index("-DTK_ISA=baseline")] = f"-DTK_ISA={isa}"

    def build(folder: Path) -> None:
        def one(stem: str) -> None:
            words = commands[stem]
            words[words.index("-o") + 1] = str(folder / f"{stem}.o")
            _run(words)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, stems))

    version = _run([compiler, "--version"])
    all_words = (version, *(word for words in commands.values() for word in words))
    files = included(*(Path(words[-1]) for words in commands.values()))
    folder = kept("-".join(("kernels", isa, *stems)), files, all_words, build)
    return {stem: folder / f"{stem}.o" for stem in stems}


def bring_up_to_date(objects: Iterable[Path]) -> None:
    """Compile what is not there, or has changed since, of the package's own build."""
    _cmake("--build", BUILD, "--target", *(path.relative_to(BUILD) for path in objects))


def flags(isa: str) -> list[str]:
    """The instructions that a set's sources may use, as the compiler is told it."""
    _, words = compile_commands(isa)["filter_moments"]
    return [word for word in words if word.startswith("-m")]


def program(
    objects: Mapping[str, Path], isa: str, main: Path, instructions: Sequence[str] = ()
) -> Path:
    """A program of these kernels and a main(), which may use these instructions (`flags`); `kept`
    while all of it is the same. The macro TK_HAS_... says of each kernel that it is there."""
    cross = crossed(isa)
    compiler = f"{ARM64}g++" if cross else "g++"
    options = ["-std=c++20", "-O1", "-Wno-psabi", "-pthread", *(["-static"] if cross else [])]
    defines = (f"-DTK_ISA={isa}", *(f"-DTK_HAS_{stem}" for stem in objects))
    words = [compiler, *options, *instructions, *defines, "-I", ROOT / "csrc"]
    sources = [main, ROOT / "csrc/cpu/parallel.cpp"]

    def link(folder: Path) -> None:
        _run([*words, *sources, *objects.values(), "-ldl", "-o", folder / main.stem])

    files = included(*sources).union(objects.values())
    all_words = (_run([compiler, "--version"]), *words)
    return kept("-".join((main.stem, isa, *objects)), files, all_words, link) / main.stem


def inner_loops(object_file: Path, isa: str) -> Iterator[Loop]:
    """The inner loops of the functions of LOOPS."""
    tool = f"{ARM64}objdump" if crossed(isa) else "objdump"
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


def _run(words: Sequence[object], **environment: str) -> str:
    done = subprocess.run(
        [str(w) for w in words], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
