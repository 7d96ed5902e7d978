"""The command line. Heavy imports happen inside the commands, so that `--help` is quick."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from taylor_kernels.report import Table

app = typer.Typer(
    help="Taylor importance of filters in fused kernels, and pruning with it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

USER_ERROR = 2
STOPPED = 130


@app.callback()
def _commands() -> None:
    """Taylor importance of filters in fused kernels, and pruning with it."""


@app.command(
    epilog="Example: taylor-kernels demo --quick --flops 0.3 --criteria taylor_fo --criteria random"
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the pruned model.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer epochs, one seed.")] = False,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[
        int | None, typer.Option(help="How many seeds to run.  [default: 3; 1 with --quick]")
    ] = None,
    flops: Annotated[float, typer.Option(help="Fraction of the FLOPs to keep.")] = 0.5,
    criteria: Annotated[
        list[str] | None,
        typer.Option(
            help="A criterion to prune by; repeat for more. The first one's network is exported.  "
            "[default: taylor_fo_bn, magnitude_l2, random]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Train the dense networks again, cached or not.")
    ] = False,
) -> None:
    """Train a small ResNet on real digits, prune it by several criteria, write a report."""
    _require("demo", "sklearn", "matplotlib", "safetensors")
    from taylor_kernels.progress import ProgressLog
    from taylor_kernels.studies.pruning.run import run
    from taylor_kernels.studies.pruning.settings import DEFAULT_CRITERIA, FULL, QUICK, Settings

    settings = Settings(
        out=out,
        seed=seed,
        seeds=(1 if quick else 3) if seeds is None else seeds,
        flops=flops,
        criteria=tuple(dict.fromkeys(criteria or DEFAULT_CRITERIA)),
        device=device,
        force=force,
        recipe=QUICK if quick else FULL,
    )
    try:
        settings.check()
    except ValueError as error:
        _fail(str(error))
    _, table = run(settings, ProgressLog())
    _show([table], *(out / name for name in ("report.html", "result.json", "pruned.pt2")))


@app.command(
    epilog="Example: taylor-kernels compare --model mymodels:resnet --data mymodels:loader "
    "--batches 40 --sample 200"
)
def compare(
    out: Annotated[Path, typer.Option(help="Folder for the report and what is finished.")] = Path(
        "runs/compare"
    ),
    model: Annotated[
        str | None,
        typer.Option(help="Yours: package.module:name of a Module, or of what makes one."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="The same of a loader of (inputs, targets), or of what makes one."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="The same of loss(outputs, targets).  [default: cross_entropy]"),
    ] = None,
    criteria: Annotated[
        list[str] | None,
        typer.Option(help="A criterion; repeat for more.  [default: all that apply]"),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(help="How many filters to remove.  [default: all that fit the budget]"),
    ] = None,
    batches: Annotated[int, typer.Option(help="How many minibatches to take from --data.")] = 20,
    budget: Annotated[
        float, typer.Option(help="Seconds for the oracle, and again for pruning curves.")
    ] = 600,
    seed: Annotated[int, typer.Option(help="Of the sample; of the digits study, the first.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Digits: one network, one seed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Forget what is finished.")] = False,
) -> None:
    """Compare every criterion with the oracle, which removes each filter and measures the loss.

    Of your model, or, without --model, of networks trained on digits: correlation, pruning curves,
    runtimes. A run that was stopped goes on where it was.
    """
    _require("demo", "scipy", "sklearn", "matplotlib", "safetensors")
    from taylor_kernels.options import Mistake
    from taylor_kernels.progress import ProgressLog
    from taylor_kernels.studies.oracle.run import run
    from taylor_kernels.studies.oracle.settings import Settings

    settings = Settings(
        out=out,
        model=model,
        data=data,
        loss=loss,
        criteria=tuple(dict.fromkeys(criteria)) if criteria else None,
        sample=sample,
        batches=batches,
        budget=budget,
        seed=seed,
        device=device,
        quick=quick,
        force=force,
    )
    try:
        _, tables = run(settings, ProgressLog())
    except Mistake as error:
        _fail(str(error))
    _show(tables, out / "report.html", out / "result.json")


@app.command(epilog="Example: taylor-kernels info --json")
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Print versions, devices and backends, and why a backend is missing."""
    from taylor_kernels.system import describe

    facts = describe()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for title, entries in facts.items():
        console.print(title, style="bold")
        for name, value in entries.items():
            shown = value["detail"] if isinstance(value, dict) else value
            console.print(f"  {name:<16} {shown}", markup=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """The console script: runs a command; a user's mistake is one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(args=arguments or ["--help"], prog_name="taylor-kernels", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = STOPPED
    except Exception as error:
        # Usage errors are click's or typer's own, by version; what they share is this method.
        if not hasattr(error, "format_message"):
            raise
        code = _complain(error.format_message())
    if code == STOPPED:  # typer, by version, raises or returns it
        print("stopped", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _show(tables: list[Table], *files: Path) -> None:
    """The results on standard output, and where they are."""
    from rich.console import Console

    from taylor_kernels.report import print_table

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)  # a file has no edge to wrap at
    for table in tables:
        print_table(table, console)
    for file in files:
        console.print(str(file), highlight=False, markup=False, soft_wrap=True)


def _require(extra: str, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        _fail(f"{', '.join(missing)} not installed; pip install 'taylor-kernels[{extra}]'")


def _fail(message: str) -> NoReturn:
    raise typer.Exit(_complain(message))


def _complain(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    main()
