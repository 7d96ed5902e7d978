"""Inner loops as compiled: how many instructions an element takes, and that sums stay in registers.

Timings depend on the machine; these do not. A compiler, or an edit, that puts accumulators on the
stack costs a factor of three on AVX2 and changes no result: only this sees it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from taylor_kernels.backends.native import _native
from tests.helpers import machine_code
from tests.helpers.machine_code import Loop

pytestmark = pytest.mark.slow  # compiles the kernels where they were not built here
ISAS = machine_code.SETS if machine_code.X86 else ("neon",)
#: What a register of elements takes in a kernel's inner loop, in instructions, addresses and the
#: loop itself included (of short rows, also what adds up their lanes and writes them); along
#: memory, prefetches and one instruction for their addresses are left out: (its functions,
#: multiplications in it without and with FMA, instructions at most in each of SETS, 0 where it is
#: not compiled).
#: Both axes take pairs of rows.
FIVE = "FilterMoments<0, 1, 2, 3, 4>"
BOUNDS = {
    "filter_moments rows": (
        f"sum_rows<.*{FIVE}, float",
        (4, 4),
        (16, 11, 13, 12),
    ),
    "filter_moments rows together": (
        f"sum_rows_together<.*{FIVE}, float",
        (4, 4),
        (0, 11, 13, 0),
    ),
    "filter_moments both": (
        f"sum_strip<.*{FIVE}, true, 2, float",
        (4, 7),
        (33, 23, 23, 26),
    ),
    "filter_moments columns": (
        f"sum_strip<.*{FIVE}, false, 2, float",
        (4, 4),
        (23, 16, 18, 17),
    ),
    "filter_moments bfloat16": (
        f"sum_rows<.*{FIVE}, .*BFloat16",
        (4, 4),
        (20, 13, 14, 17),
    ),
    "filter_moments float16": (
        f"sum_rows<.*{FIVE}, .*Half",
        (12, 4),
        (120, 11, 12, 15),
    ),
    "filter_moments one of rows": ("sum_rows<.*FilterMoments<1>, float", (2, 2), (0, 5, 6, 6)),
    "filter_moments one of both": (
        "sum_strip<.*FilterMoments<1>, true, 2, float",
        (2, 3),
        (0, 7, 9, 17),
    ),
    "filter_moments rows of four": (
        f"sum_short_rows<.*{FIVE}, 1, false, float",
        (4, 4),
        (0, 46, 54, 0),
    ),
    "filter_moments rows of nine": (
        f"sum_short_rows<.*{FIVE}, 3, true, float",
        (4, 4),
        (0, 37, 53, 0),
    ),
    "second_order_moments rows": ("sum_rows<.*SecondOrderMoments, float", (3, 3), (11, 7, 8, 9)),
    "hutchinson_moments rows": ("sum_rows<.*HutchinsonMoments, float", (2, 2), (22, 17, 18, 19)),
    "gate_gradients rows": ("sum_runs<false, float", (1, 1), (5, 3, 3, 4)),
    "gate_gradients channels": ("sum_channels<[48], false, float", (1, 1), (6, 4, 4, 5)),
}


@pytest.fixture(scope="module")
def build() -> None:
    machine_code.configure()


@pytest.fixture(scope="module", params=ISAS)
def objects(request: pytest.FixtureRequest, build: None) -> tuple[str, dict[str, Path]]:
    """An instruction set, and its kernels as compiled."""
    isa = request.param
    if machine_code.crossed(isa) and not shutil.which(f"{machine_code.ARM64}g++"):
        pytest.skip("no compiler for arm64: apt-get install g++-aarch64-linux-gnu")
    return isa, machine_code.compiled(isa)


@pytest.fixture(scope="module")
def loops(objects: tuple[str, dict[str, Path]]) -> tuple[str, list[Loop]]:
    """An instruction set, and all inner loops of its kernels."""
    isa, found = objects
    return isa, [loop for o in found.values() for loop in machine_code.inner_loops(o, isa)]


def of_one_kernel(loops: list[Loop], pattern: str) -> list[Loop]:
    found = [loop for loop in loops if re.search(pattern, loop.function)]
    assert found, f"no inner loop of {pattern}"
    return found


@pytest.mark.parametrize(
    ("objects", "kernel"),
    [
        (isa, kernel)
        for isa in ISAS
        for kernel in BOUNDS
        if kernel.split()[0] in machine_code.sources_of(isa)
    ],
    indirect=["objects"],
)
def test_instructions_of_an_element(kernel, loops):
    isa, every = loops
    pattern, products, bounds = BOUNDS[kernel]
    bound = bounds[machine_code.SETS.index(isa)]
    if not bound:
        assert not [loop for loop in every if re.search(pattern, loop.function)]
        return
    for loop in of_one_kernel(every, pattern):
        registers = loop.products / products[isa != "baseline"]
        assert registers >= 1, loop.text
        # Down columns, prefetches are within the bounds.
        ahead = len(loop.prefetches) if re.search("sum_(rows|run)", pattern) else 0
        each = (len(loop.instructions) - ahead - (ahead > 0)) / registers
        assert each <= bound, f"{each:.1f} of {bound} instructions a register:\n{loop.text}"


def test_loops_along_memory_ask_for_each_line_once(loops):
    """float32: a prefetch for sixteen elements of each operand, 64 bytes, in the first pass; gates,
    for the lines of sixty-four elements of whatever dtype."""
    isa, every = loops
    sources = machine_code.sources_of(isa)
    if "gate_gradients" in sources:
        for dtype, lines in (("float", 4), ("Half", 2), ("BFloat16", 2), ("double", 8)):
            found = of_one_kernel(every, rf"sum_runs<(true|false), (\w+::)*{dtype}>")
            assert {len(loop.prefetches) for loop in found} | {0} == {0, 2 * lines}
    operands_of = {
        "filter_moments": ("FilterMoments", 2),
        "second_order_moments": ("SecondOrder", 3),
    }
    together = BOUNDS["filter_moments rows together"][-1][machine_code.SETS.index(isa)]
    of_floats = [loop for loop in every if "float" in loop.function]
    for kernel, operands in (operands_of[stem] for stem in sources if stem in operands_of):
        for function in ("sum_rows", *(["sum_rows_together"] if together else [])):
            found = of_one_kernel(of_floats, f"{function}<.*{kernel}")
            assert operands in {len(loop.prefetches) for loop in found}
            assert {len(loop.prefetches) for loop in found} <= {0, operands}


#: References to the stack in a loop of the baseline, whose products are not fused: they, two rows
#: of sums and what they are added to are more than sixteen registers.
SPILLED = 8
#: The same of one turn for several short rows, on the others: masks, and what waits to be added up.
SPILLED_OF_SHORT_ROWS = 6


def test_sums_stay_in_registers(loops):
    """float32 and bfloat16: what a loop keeps on the stack it stores and loads again each time."""
    isa, every = loops
    checked = 0
    for loop in every:
        if not re.search(r"float|BFloat16", loop.function.split("(")[0]):
            continue
        checked += 1
        most = SPILLED_OF_SHORT_ROWS if "sum_short_rows<" in loop.function else 0
        if isa == "baseline":
            most = SPILLED
        assert len(loop.vectors_on_stack) <= most, f"{loop.function}\n{loop.text}"
    assert checked >= 3 * len(machine_code.sources_of(isa))


#: So many cases of each kernel that is run.
CASES = {"filter_moments": 68, "gate_gradients": 48}
#: Of the sets that fuse, case by case: the first that ran says what bits the others give.
BITS: dict[tuple[str, int], str] = {}


def test_kernels_run_without_python_and_fused_sets_give_the_same_bits(objects):
    """Beside test_instruction_sets.py this runs arm64, under an emulator."""
    isa, found = objects
    emulated = machine_code.crossed(isa)
    if emulated and not shutil.which("qemu-aarch64"):
        pytest.skip("nothing emulates arm64: apt-get install qemu-user")
    if not emulated and isa not in _native.cpu_isas():
        pytest.skip(f"this processor has no {isa}")
    program = machine_code.program(found, isa, Path(__file__).parent / "run_kernels.cpp")
    words = [*(["qemu-aarch64"] if emulated else []), str(program)]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    ran: Counter[str] = Counter()
    for line in lines:
        name, error, bits = line.split()
        kernel = name.partition("-")[0]
        case = kernel, ran[kernel]
        ran[kernel] += 1
        assert float(error) <= 16, f"{name} is off by {error} roundings"
        if isa != "baseline":
            assert BITS.setdefault(case, bits) == bits, f"case {case}: {name}"
    assert ran == {kernel: count for kernel, count in CASES.items() if kernel in found}
