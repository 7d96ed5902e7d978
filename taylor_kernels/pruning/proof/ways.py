"""Which way the code of a model takes in a run.

Code may ask how many rows an example has, how large its images are, or which type its numbers have,
and do something else then. A proof that runs a smaller example, a repeated one, or one in double
precision has tried nothing of what the model does with the user's. So the instructions that
branching code runs are written down, and compared.
"""

from __future__ import annotations

import gc
import os
import sys
import sysconfig
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from taylor_kernels.tracing.model.branches import branches, names_at

#: Code of these folders is none of a model's.
_OTHERS = tuple(
    f"{folder}{os.sep}"
    for folder in (
        Path(torch.__file__).parent,
        *(Path(__file__).parents[2] / room for room in ("tracing", "pruning")),
        sysconfig.get_path("stdlib"),
    )
)
#: Of these folders within the last of those, packages are others' again.
_PACKAGES = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))

#: Where norms are run again on what masks have left.
_AGAIN = str(Path(__file__).parents[1] / "masks") + os.sep

#: What code calls to draw random numbers.
_DRAWS = frozenset(
    {"rand", "rand_like", "bernoulli", "bernoulli_", "uniform_", "randperm", "random"}
)

#: Methods that are given names, and no examples: those of configs are called all the time.
_ATTRIBUTES = frozenset({"__getattr__", "__getattribute__", "__setattr__", "__getitem__"})


class Ways:
    """Watches this thread: what a debugger has set to watch it is set again afterwards.

    Attributes:
        taken: for each call of code with branches the code, and the places of the instructions in
            it that have run, however often: a loop may have more rounds in another run.
    """

    def __init__(self) -> None:
        self.taken: list[tuple[CodeType, set[int]]] = []
        self._codes: set[CodeType] = set()
        self._before: Any = None
        self._collects = False
        self._again = False  # inside what masks run once more

    def __enter__(self) -> Ways:
        # What the collector of garbage calls, now and then, is no code of the model's.
        self._collects = gc.isenabled()
        gc.disable()
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(self._before)
        if self._collects:
            gc.enable()

    @property
    def may_differ(self) -> bool:
        """Whether another example may lead this code another way: some branch depends on what is no
        constant of the model's."""
        seen = [branches(code) for code in self._codes if code.co_name not in _ATTRIBUTES]
        # A property may ask for any attribute that code has set.
        sets = any(one.stored for one in seen)
        return any(one.open or (sets and one.attributes) for one in seen)

    @property
    def may_train_otherwise(self) -> bool:
        """Whether code asks if it trains, and some branch may depend on that, in code that says
        nothing of chance by its names."""
        known = [code for code in self._codes if not _is_chance(_words(code))]
        asks = any("training" in code.co_names for code in known)
        seen = [branches(code) for code in known] if asks else []
        return any(one.open or "training" in one.attributes for one in seen)

    def trains_otherwise(self, trained: Ways) -> bool:
        """Whether train mode is another way for more than chance: what code drops or draws there,
        and says by its names, is what a trace has seen."""
        if [code for code, _ in self.taken] == [code for code, _ in trained.taken]:
            pairs = zip(self.taken, trained.taken, strict=True)
            return any(
                mine != its and not _is_chance(names_at(code, mine ^ its))
                for (code, mine), (_, its) in pairs
            )
        mine, its = (
            [one for one in way.taken if not _is_chance(_words(one[0]))] for way in (self, trained)
        )
        return mine != its

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ways) and self.taken == other.taken

    __hash__ = None  # type: ignore[assignment]

    def _called(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if self._again or not _is_models(code):
            return None
        if (caller := frame.f_back) and caller.f_code.co_filename.startswith(_AGAIN):
            self._again = True
            frame.f_trace_lines = False
            return self._ran_again
        self._codes.add(code)
        if code.co_name in _ATTRIBUTES or not branches(code).any:
            return None
        places: set[int] = set()
        self.taken.append((code, places))
        frame.f_trace_lines, frame.f_trace_opcodes = False, True

        def stepped(frame: FrameType, event: str, _: Any) -> Any:
            if event == "opcode":
                places.add(frame.f_lasti)
            return stepped

        return stepped

    def _ran_again(self, _: FrameType, event: str, __: Any) -> Any:
        if event == "return":
            self._again = False
        return self._ran_again


def _words(code: CodeType) -> set[str]:
    """The names that code speaks of, those among them that it asks for by `getattr`."""
    strings = (value for value in code.co_consts if isinstance(value, str) and value.isidentifier())
    return {*code.co_names, *strings}


def _is_chance(names: Iterable[str]) -> bool:
    """Or of what saves memory in train mode."""
    words = ("drop", "checkpoint")
    return any(name in _DRAWS or any(word in name.lower() for word in words) for name in names)


@lru_cache(maxsize=4096)
def _is_models(code: CodeType) -> bool:
    """Whether it is no code of Python, PyTorch or this package."""
    file = code.co_filename
    if file.startswith("<frozen") or file.startswith(_OTHERS[:-1]):
        return False
    return not file.startswith(_OTHERS[-1]) or any(part in file for part in _PACKAGES)
