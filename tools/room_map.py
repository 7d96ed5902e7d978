"""Draws the rooms of the package and who imports whom, read from the imports themselves.

    python tools/room_map.py            # writes the map into CONTRIBUTING.md
    python tools/room_map.py --check    # exits 1 if the map there is out of date

A room is a folder or a file of taylor_kernels; folders in it are listed with it. An arrow goes from
a room to one that it imports when it is loaded; what a function imports as it runs is a dotted
arrow. Arrows that other arrows imply are left out of the drawing, as in a transitive reduction.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "taylor_kernels"
BEGIN, END = "<!-- map:begin -->", "<!-- map:end -->"
Arrows = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package -> its file."""
    found = {}
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(module or module.name imported from the package, whether a function imports it)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node in inside
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield alias.name, node in inside


def arrows() -> tuple[Arrows, Arrows]:
    """Room -> rooms that it imports on loading, and rooms that it imports as it runs."""
    known = modules()
    on_loading: Arrows = {_room(name): set() for name in known}
    running: Arrows = {room: set() for room in on_loading}
    for name, file in known.items():
        for target, late in imports(file):
            while target not in known:  # a name inside a module
                target = target.rpartition(".")[0]
            one, other = _room(name), _room(target)
            if one != other:
                (running if late else on_loading)[one].add(other)
    for room, targets in running.items():
        targets -= on_loading[room]
    return on_loading, running


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def circle(graph: Arrows) -> list[str]:
    """Rooms that import each other in a ring, or []."""
    done: set[str] = set()

    def visit(room: str, way: list[str]) -> list[str]:
        if room in way:
            return way[way.index(room) :]
        if room in done:
            return []
        for target in sorted(graph[room]):
            if ring := visit(target, [*way, room]):
                return ring
        done.add(room)
        return []

    return next((ring for room in sorted(graph) if (ring := visit(room, []))), [])


def reduced(graph: Arrows) -> Arrows:
    """The arrows that no longer way of arrows implies; the graph has no ring."""

    def reached(room: str) -> set[str]:
        return graph[room].union(*(reached(target) for target in graph[room]))

    return {
        room: {t for t in targets if not any(t in reached(other) for other in targets - {t})}
        for room, targets in graph.items()
    }


def purpose(room: str) -> str:
    """The first sentence of the room's docstring, without the room's own name before it."""
    folder = ROOT / PACKAGE / room
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=\.)\s", " ".join(text.split()))[0].rstrip(".")
    title, colon, rest = sentence.partition(": ")
    return rest if colon and " " not in title else sentence


def block() -> str:
    """The map in Markdown: a drawing, and what each room is for.

    Raises:
        ValueError: rooms import each other in a ring.
    """
    on_loading, running = arrows()
    face = on_loading.pop(PACKAGE)
    running.pop(PACKAGE)
    for targets in on_loading.values():
        targets.discard(PACKAGE)  # `import taylor_kernels as tk`: the public names
    if ring := circle(on_loading):
        raise ValueError(f"rooms import each other in a ring: {' -> '.join([*ring, ring[0]])}")
    lines = ["```mermaid", "graph TD"]
    for room, targets in sorted(reduced(on_loading).items()):
        lines += [f"  {room} --> {target}" for target in sorted(targets)]
    for room, targets in sorted(running.items()):
        lines += [f"  {room} -.-> {target}" for target in sorted(targets - {PACKAGE})]
    lines += ["```", "", "| room | what is in it |", "|---|---|"]
    for room in sorted(on_loading, key=lambda room: (_height(room, on_loading), room)):
        shown = f"`{room}/`" if (ROOT / PACKAGE / room).is_dir() else f"`{room}.py`"
        lines.append(f"| {shown} | {purpose(room)} |")
        for folder in sorted((ROOT / PACKAGE / room).glob("*/__init__.py")):
            inner = f"{room}/{folder.parent.name}"
            lines.append(f"| `{inner}/` | {purpose(inner)} |")
    names = ", ".join(sorted(face))
    return "\n".join([*lines, "", f"`taylor_kernels/__init__.py` hands on names of {names}."])


def _height(room: str, graph: Arrows) -> int:
    return 1 + max((_height(target, graph) for target in graph[room]), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    file = ROOT / "CONTRIBUTING.md"
    text = file.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{block()}\n{END}{after}"
    if options.check:
        if new != text:
            print("the map is out of date; python tools/room_map.py draws it anew")
        return new != text
    file.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
