"""The map in CONTRIBUTING.md is that of the imports, and no room reaches where it must not."""

from __future__ import annotations

import re

import pytest

from tests.helpers import ROOT
from tools import room_map

#: Folder of csrc -> folders that its files must not include.
CLOSED = {
    "common": {"cpu", "cuda", "bindings"},
    "cpu": {"cuda", "bindings"},
    "cuda": {"cpu", "bindings"},
}
#: Folder of the package -> its rooms: each may import those before it as it is loaded.
ORDER = {
    "tracing": ("model", "notes", "run", "rules", "resolving", "answer"),
    "pruning": ("choosing", "removing", "masks", "scores", "proof", "saving"),
}


def test_the_map_is_that_of_the_imports():
    """Drawing it also raises if rooms import each other in a ring."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"{room_map.BEGIN}\n{room_map.block()}\n{room_map.END}" in text, (
        "python tools/room_map.py draws it anew"
    )


def test_a_ring_of_rooms_is_found():
    assert room_map.circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert room_map.circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("folder", CLOSED)
def test_csrc_includes_keep_their_order(folder: str):
    files = [path for path in (ROOT / "csrc" / folder).rglob("*") if path.is_file()]
    assert files
    for path in files:
        included = re.findall(r'^#include "(\w+)/', path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not CLOSED[folder].intersection(included), path


@pytest.mark.parametrize(
    ("folder", "room"), [(folder, room) for folder, rooms in ORDER.items() for room in rooms]
)
def test_rooms_of_a_folder_keep_their_order(folder: str, room: str):
    later = ORDER[folder][ORDER[folder].index(room) + 1 :]
    files = list((ROOT / "taylor_kernels" / folder / room).glob("*.py"))
    assert len(files) > 1
    for path in files:
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(rf"^from taylor_kernels\.{folder}\.(\w+)", text, re.MULTILINE)
        assert not set(later).intersection(loaded), path


@pytest.mark.parametrize("folder", ORDER)
def test_every_room_of_a_folder_has_its_place(folder: str):
    rooms = {path.parent.name for path in (ROOT / "taylor_kernels" / folder).glob("*/__init__.py")}
    assert rooms == set(ORDER[folder])
