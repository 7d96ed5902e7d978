"""What commands share: options, how results are printed, and how a mistake is told in one line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from taylor_kernels.studies.report import Table

USER_ERROR = 2

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Force = Annotated[bool, typer.Option("--force", help="Forget what is finished.")]


def show(tables: Sequence[Table], *files: Path) -> None:
    """Print the results, and where they are."""
    from rich.console import Console

    from taylor_kernels.studies.report import print_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)  # a file has no edge to wrap at
    for table in tables:
        print_table(table, console)
    for file in files:
        console.print(str(file), highlight=False, markup=False, soft_wrap=True)


def require(extra: str, *modules: str) -> None:
    """End the command if one of the modules, which an extra of the package brings, is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{', '.join(missing)} not installed; pip install 'taylor-kernels[{extra}]'")


def fail(message: str) -> NoReturn:
    """End the command over a mistake of the user's."""
    raise typer.Exit(complain(message))


def complain(message: str) -> int:
    """Say what is wrong; the exit code for it."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR
