"""Which source files decide a figure: those of the functions that compute it, and of all that these
import from this package, one through another.

Imports are read from the source, not from what is loaded: the package's `__init__` loads every
module there is, needed or not. Imports under `if TYPE_CHECKING:` run nothing, so they do not count.
"""

from __future__ import annotations

import ast
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache, partial
from importlib.util import resolve_name
from pathlib import Path

from torch import nn

import taylor_kernels
from taylor_kernels.studies.digest import digest_files

#: The package's folder. The tests put a copy here, of which they change a file.
ROOT = Path(taylor_kernels.__file__).parent
_PACKAGE = taylor_kernels.__name__
_FOR_TYPES = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def code_digest(*objects: object) -> str:
    """Stands for the code of functions and classes, and of the parts of an `nn.Module`."""
    return digest_files(deciding_files(*objects))


def deciding_files(*objects: object) -> set[Path]:
    """The files that `code_digest` reads.

    A user's file brings those that it imports, one through another. Of installed packages a file
    stands for itself. PyTorch's files are left out: its version stands for them, and belongs to the
    settings of whatever is kept.
    """
    return module_files({name for thing in objects for name in _module_names(thing)})


def module_files(names: Iterable[str]) -> set[Path]:
    """The files that decide what these modules, which are loaded, do; as `deciding_files`."""
    files: set[Path] = set()
    for name in names:
        top = name.partition(".")[0]
        if top == _PACKAGE:
            files |= imported_files(name)
        elif top != "torch" and (file := getattr(sys.modules.get(name), "__file__", None)):
            files |= _users_files(name, Path(file))
    return files


def _users_files(name: str, file: Path) -> set[Path]:
    """A module's file, and those of the user that it imports, of the modules that are loaded."""
    files: set[Path] = set()
    todo = [(name, file)]
    while todo:
        name, file = todo.pop()
        if file in files:
            continue
        files.add(file)
        if file.suffix != ".py" or _is_installed(file):
            continue
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for imported in _imported_names(file, package):
            if _is_ours(imported):
                files |= imported_files(imported)
                continue
            parts = imported.split(".")  # the packages around a module are run too
            for i in range(1, len(parts) + 1):
                inner = ".".join(parts[:i])
                path = getattr(sys.modules.get(inner), "__file__", None)
                if path and not _is_installed(Path(path)):
                    todo.append((inner, Path(path)))
    return files


def _is_installed(file: Path) -> bool:
    """Whether a file is of the standard library or of an installed package."""
    folders = {Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib")}
    return not {"site-packages", "dist-packages"}.isdisjoint(file.parts) or any(
        folder in file.parents for folder in folders
    )


@cache
def imported_files(module: str) -> frozenset[Path]:
    """The files of a module of this package and of all modules of the package that it imports."""
    files: set[Path] = set()
    todo = [module]
    while todo:
        file = _file_of(todo.pop())
        if file is not None and file not in files:
            files.add(file)
            todo += _imports(file)
    return frozenset(files)


def _module_names(thing: object) -> Iterator[str]:
    if isinstance(thing, partial):
        for part in (thing.func, *thing.args, *thing.keywords.values()):
            yield from _module_names(part)
        return
    owners: Iterable[object] = thing.modules() if isinstance(thing, nn.Module) else [thing]
    for owner in owners:
        named = owner if inspect.isfunction(owner) or inspect.isclass(owner) else type(owner)
        yield named.__module__


def _file_of(module: str) -> Path | None:
    """Where a module of this package lies, Python or compiled; None if there is none."""
    path = ROOT.joinpath(*module.split(".")[1:])
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    return next(iter(sorted(path.parent.glob(f"{path.name}.*.so"))), None)


@cache
def _imports(file: Path) -> frozenset[str]:
    """The modules of this package that a file imports, anywhere in it."""
    if file.suffix != ".py":
        return frozenset()
    inside = file.relative_to(ROOT).with_suffix("").parts
    package = ".".join((_PACKAGE, *inside[:-1]))  # of a package's __init__ too: it is itself
    found = _imported_names(file, package)
    return frozenset(
        # Of a package, a submodule is meant where there is one of that name.
        name if _file_of(name) else name.rpartition(".")[0]
        for name in found
        if _is_ours(name)
    )


def _imported_names(file: Path, package: str) -> set[str]:
    """What a file imports: modules, and "module.name" for a name out of one."""
    found: set[str] = set()
    for node in _that_run(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and "import_module" in ast.dump(node.func):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.add(name.value)
    return found


def _that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a file, without those that only type checkers see."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in _FOR_TYPES:
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE
