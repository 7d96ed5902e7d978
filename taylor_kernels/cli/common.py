"""What commands share: options, how results are printed, and how a mistake is told in one line."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from taylor_kernels.studies.progress import ProgressLog
    from taylor_kernels.studies.report import Table
    from taylor_kernels.studies.settings import StudySettings

USER_ERROR = 2
STOPPED = 130

ModelPath = Annotated[
    str | None,
    typer.Option("--model", help="Yours: package.module:name of a Module, or of what makes one."),
]
DataPath = Annotated[
    str | None, typer.Option("--data", help="The same of a loader, or of what makes one.")
]
LossPath = Annotated[
    str | None,
    typer.Option("--loss", help="The same of loss(outputs, targets).  [default: cross_entropy]"),
]
ForwardPath = Annotated[
    str | None,
    typer.Option("--forward", help="The same of forward(model, batch), which gives the loss."),
]
CriterionName = Annotated[str, typer.Option("--criterion", help="What filters are scored by.")]
Batches = Annotated[int, typer.Option(help="How many minibatches the scores are of.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn at random.")]
Amp = Annotated[
    bool, typer.Option("--amp", help="Compute in bfloat16, or float16, where that is safe.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the checkpoint in --out, if one is there.")
]
SaveEvery = Annotated[float, typer.Option(help="Seconds between two checkpoints.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
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


def conduct(
    command: str,
    run: Callable[[Any, ProgressLog], tuple[dict[str, Any], Sequence[Table]]],
    settings: StudySettings,
    *,
    as_json: bool = False,
) -> None:
    """Run a study and print its tables, or its result as JSON; a mistake ends the command."""
    from taylor_kernels.studies.options import Mistake
    from taylor_kernels.studies.own.processes import check_alone
    from taylor_kernels.studies.progress import ProgressLog

    try:
        check_alone(command)
        result, tables = run(settings, ProgressLog())
    except Mistake as error:
        fail(str(error))
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        show(tables, settings.out / "report.html", settings.out / "result.json")


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
