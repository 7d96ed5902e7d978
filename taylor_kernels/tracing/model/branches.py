"""Branches of Python code: which of them runs on other examples may take another way.

Bytecode says what a condition is made of: constants, names of a Python module, attributes of `self`
and whether something is None are the same for every example, as long as the code in front has gone
the same way. All else may follow the sizes, the type or the values of an example. A branch that
only raises an error, as that of an assertion, is no way of a run that comes to its end.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable
from functools import lru_cache
from types import CodeType, FrameType
from typing import NamedTuple

#: Instructions that a condition may have, and that do not depend on an example.
_FIXED = {
    "CACHE", "NOP", "TO_BOOL", "EXTENDED_ARG", "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL",
    "PUSH_NULL", "COMPARE_OP", "IS_OP", "CONTAINS_OP", "UNARY_NOT",
}  # fmt: skip
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD"}
#: With them a statement has ended, and nothing in front is part of a condition.
_ENDS = ("STORE_", "DELETE_", "POP_TOP", "RESUME", "RETURN_", "GEN_START", "RERAISE", "FOR_ITER")
#: Behind them there is one of two values (`a if b else c`), or one that has been stored just now.
_HALVES = {"JUMP_FORWARD", "STORE_FAST_LOAD_FAST"}
#: What is in front of a store if the value goes on to be used: `(n := len(x))`.
_COPIES = {"COPY", "DUP_TOP"}
#: Instructions between a value and a jump that takes nothing but a truth of it.
_ON_THE_WAY = {"CACHE", "NOP", "TO_BOOL", "EXTENDED_ARG", "LOAD_CONST", "LOAD_SMALL_INT",
               "COMPARE_OP", "UNARY_NOT"}  # fmt: skip
_BLOCKS = {"SETUP_FINALLY", "SETUP_WITH", "SETUP_ASYNC_WITH"}
#: Methods whose errors Python itself takes for an answer: that there is nothing more, or no such
#: thing.
_ANSWERS = {"__next__", "__getitem__", "__getattr__", "__getattribute__"}


class Branches(NamedTuple):
    """What is known of the branches of code, but for those that only raise.

    Attributes:
        any: there are some.
        open: some may depend on the example.
        attributes: what others depend on, besides constants.
        stored: attributes that it gives values.
    """

    any: bool
    open: bool
    attributes: frozenset[str]
    stored: frozenset[str]


@lru_cache(maxsize=4096)
def branches(code: CodeType) -> Branches:
    """The branches of code, without that of functions that are defined in it."""
    instructions = _instructions(code)
    stored = frozenset(i.argval for i in instructions if i.opname == "STORE_ATTR")
    found, unknown, attributes = False, False, set[str]()
    for place, one in enumerate(instructions):
        if not _is_conditional(one) or _has_a_raising_side(code, place):
            continue
        found = True
        missing = "NONE" in one.opname
        depends = frozenset[str]() if missing else _condition(instructions, place)
        if depends is None:
            unknown = True
        else:
            attributes |= depends
    names = [i.opname for i in instructions]
    if "SETUP_FINALLY" in names or names.count("PUSH_EXC_INFO") > names.count("WITH_EXCEPT_START"):
        found = unknown = True  # an error that a size leads to may be caught
    unknown |= "STORE_GLOBAL" in names or ("STORE_DEREF" in names and found)
    if "setattr" in code.co_names:
        stored |= {"setattr"}
    return Branches(found, unknown, frozenset(attributes), stored)


def only_asserts(frame: FrameType, around: Iterable[FrameType]) -> bool:
    """Whether the truth that the code of a frame asks for just now decides on nothing else than
    whether it raises an error, which no code around it catches.

    Args:
        around: the frames of the model's code that have called it.
    """
    instructions, places = _instructions(frame.f_code), _places(frame.f_code)
    if any(_catches(outer.f_code) for outer in around):
        return False
    place = places.get(frame.f_lasti, len(instructions))
    for number, one in enumerate(instructions[place:], place):
        if _is_conditional(one):
            return one.opname.startswith("POP_") and _has_a_raising_side(frame.f_code, number)
        if number > place and (one.is_jump_target or one.opname not in _ON_THE_WAY):
            break
    return False


def names_at(code: CodeType, places: Iterable[int]) -> set[str]:
    """The names that instructions at these places of code speak of."""
    known, instructions = _places(code), _instructions(code)
    found = (instructions[known[place]].argval for place in places if place in known)
    return {name for name in found if isinstance(name, str)}


@lru_cache(maxsize=4096)
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))


@lru_cache(maxsize=4096)
def _places(code: CodeType) -> dict[int, int]:
    return {one.offset: place for place, one in enumerate(_instructions(code))}


def _is_conditional(one: dis.Instruction) -> bool:
    return "JUMP" in one.opname and "IF_" in one.opname


def _condition(instructions: list[dis.Instruction], place: int) -> frozenset[str] | None:
    """The attributes that a jump depends on; None where it may depend on the example."""
    found: set[str] = set()
    for number in range(place - 1, -1, -1):
        name = instructions[number].opname
        if name in _HALVES:
            return None
        if name.startswith(_ENDS) or "JUMP" in name:
            stored = name.startswith("STORE_") and number
            if stored and instructions[number - 1].opname in _COPIES:
                return None
            break
        if name in _ATTRIBUTES:
            found.add(instructions[number].argval)
        elif not (
            name in _FIXED
            or (name.startswith("LOAD_FAST") and instructions[number].argval == "self")
        ):
            return None
    return frozenset(found)


def _has_a_raising_side(code: CodeType, place: int) -> bool:
    """Whether one side of a conditional jump does nothing but raise, which nothing here catches."""
    if _catches(code) or code.co_name in _ANSWERS:
        return False
    instructions = _instructions(code)
    target = _places(code).get(instructions[place].argval, len(instructions))
    return any(_only_raises(instructions[begin:]) for begin in (place + 1, target))


@lru_cache(maxsize=4096)
def _catches(code: CodeType) -> bool:
    """Whether it may catch an error that is raised in it or below it."""
    return bool(getattr(code, "co_exceptiontable", b"")) or any(
        one.opname in _BLOCKS for one in _instructions(code)
    )


def _only_raises(instructions: list[dis.Instruction]) -> bool:
    for one in instructions:
        name = one.opname
        if name == "RAISE_VARARGS":
            return True
        if "JUMP" in name or name.startswith(("RETURN_", "YIELD_", "FOR_ITER", "STORE_", "SEND")):
            return False
    return False
