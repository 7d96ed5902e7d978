"""Compiles the GPU kernels without a GPU, and reads what the compilers say of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.helpers import ROOT, samples
from tests.helpers.kept import KEPT, digest, included, kept

ARCHITECTURES = (80, 90, 100)
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
#: These sources take nvcc about as long as all others.
PART = ("conv2d_fisher", "device_check", "hutchinson_moments", "second_order_moments")
#: What became of the sources as they were compiled last for every architecture: written by
#: `python -m bench.kernel_resources`.
RECORD = ROOT / "bench" / "results" / "static" / "cuda.json"
#: Loads and stores of it in machine code: registers that were spilled.
LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b")
TYPE_NAMES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Resources(NamedTuple):
    """What ptxas says of one kernel for one architecture."""

    kernel: str
    arch: int
    registers: int
    stack: int
    spills: int  # bytes stored and loaded


def turns(values: Iterable[object]) -> list[tuple[object, int]]:
    """Values with the architecture that each is compiled for in this run: all architectures in
    turns, which each run deals anew (tests/helpers/samples.py), as to compile everything for each
    takes minutes."""
    every = list(values)
    if samples.choose() == samples.ALL:
        return [(value, arch) for value in every for arch in ARCHITECTURES]
    order = samples.stream(f"{len(every)} turns").sample(range(len(every)), len(every))
    return [
        (value, ARCHITECTURES[at % len(ARCHITECTURES)])
        for value, at in zip(every, order, strict=True)
    ]


def architectures_of(source: Path) -> tuple[int, ...]:
    """Those that a source is compiled for in this run: all where it, or a file that it includes, is
    not what it was when the record was made of it. Of sources that are, each run draws a part, and
    an architecture for each of them."""
    if json.loads(RECORD.read_text())["sources"].get(source.stem) != text_digest(source):
        return ARCHITECTURES
    sides = samples.some([True, False], 1)
    drawn = turns(each for each in SOURCES if (each.stem in PART) in sides)
    return tuple(arch for each, arch in drawn if each == source)


def text_digest(source: Path) -> str:
    """Of a source and all that it includes."""
    return digest(included(source))


def kept_cuda(source: Path) -> tuple[Path, list[Resources]]:
    """`compile_cuda` for the architectures of this run, once for as long as its source, what it
    includes and the compiler stay the same."""
    nvcc = nvcc_path()
    version = subprocess.check_output([nvcc, "--version"], text=True)
    architectures = architectures_of(source)

    def build(folder: Path) -> None:
        _, resources = compile_cuda(source, folder, architectures)
        (folder / "resources.json").write_text(json.dumps(resources))

    words = (version, *command(source, architectures))
    name = "-".join(map(str, ("cuda", source.stem, *architectures)))
    folder = kept(name, included(source), words, build)
    resources = json.loads((folder / "resources.json").read_text())
    return folder / f"{source.stem}.o", [Resources(*each) for each in resources]


def nvcc_path() -> str:
    nvcc = shutil.which("nvcc")
    assert nvcc, "nvcc is not on PATH"
    return nvcc


def command(source: Path, architectures: Sequence[int]) -> list[str]:
    """How a source is compiled for these architectures; what follows says where to."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    flags = [f"-I{ROOT / 'csrc'}", "-std=c++17", "-O3", "-Xptxas", "-v", "-t", "2", *codes]
    return [nvcc_path(), *flags, "-c", str(source)]


def compile_cuda(
    source: Path, folder: Path, architectures: Sequence[int] = ARCHITECTURES
) -> tuple[Path, list[Resources]]:
    """The object file with machine code for these architectures, and each kernel's resources."""
    target = folder / f"{source.stem}.o"
    words = [*command(source, architectures), "-o", str(target)]
    done = subprocess.run(words, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, f"{source.name} does not compile:\n{log[-4000:]}"
    assert "warning" not in log, log[-4000:]
    return target, parse_ptxas(log)


def parse_ptxas(log: str) -> list[Resources]:
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        log,
        re.DOTALL,
    )
    return [
        Resources(name, int(arch), int(registers), int(stack), int(stores) + int(loads))
        for name, arch, stack, stores, loads, registers in found
    ]


def cuobjdump() -> str | None:
    """From PATH, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


def sass_of_functions(binary: Path, arch: int, tool: str) -> dict[str, str]:
    """Function name -> disassembly."""
    done = subprocess.run(
        [tool, "-sass", "-arch", f"sm_{arch}", str(binary)],
        capture_output=True,
        text=True,
        check=True,
    )
    parts = re.split(r"Function : (\w+)", done.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


class TritonKernel(NamedTuple):
    """What became of a `@triton.jit` function."""

    ptx: str
    cubin: bytes
    shared: int  # bytes of shared memory


def compile_triton(
    kernel: object,
    arguments: dict[str, str],
    constants: dict[str, object],
    arch: int,
    *,
    warps: int = 4,
    stages: int = 3,
) -> TritonKernel:
    """Compile a `@triton.jit` function, or take what an earlier run compiled.

    Triton knows that by a hash of the function, of all that it calls, of its arguments and options
    and of its own code: what has changed is compiled.

    `arguments` maps a name to a type such as "*fp32" or "i64"; pointers are taken to be aligned and
    integers written "i32:16" to be multiples of 16, as Triton's own launcher finds out.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: kind.split(":")[0] for name, kind in arguments.items()}
    names = list(kernel.arg_names)
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in arguments.items()
        if kind.startswith("*") or kind.endswith(":16")
    }
    signature = {name: signature.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    with knobs.cache.scope():
        knobs.cache.dir = str(KEPT / "triton")
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return TritonKernel(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)


def uses_local_memory(cubin: bytes, arch: int, folder: Path) -> bool | None:
    """Whether machine code spills registers; None without a tool to look with."""
    tool = cuobjdump()
    if tool is None:
        return None
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return any(LOCAL_MEMORY.search(sass) for sass in sass_of_functions(path, arch, tool).values())
