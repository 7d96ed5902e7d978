"""`taylor-kernels compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taylor_kernels.cli.common import (
    DataPath,
    Device,
    Force,
    LossPath,
    ModelPath,
    conduct,
    require,
)

EXAMPLE = (
    "Example: taylor-kernels compare --model mymodels:resnet --data mymodels:loader "
    "--batches 40 --sample 200"
)


def command(
    out: Annotated[Path, typer.Option(help="Folder for the report and what is finished.")] = Path(
        "runs/compare"
    ),
    model: ModelPath = None,
    data: DataPath = None,
    loss: LossPath = None,
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
    device: Device = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Digits: one network, one seed.")] = False,
    force: Force = False,
) -> None:
    """Compare every criterion with the oracle, which removes each filter and measures the loss.

    Of your model, or, without --model, of networks trained on digits: correlation, pruning curves,
    runtimes. A run that was stopped goes on where it was.
    """
    require("demo", "scipy", "sklearn", "matplotlib", "safetensors")
    from taylor_kernels.studies.oracle.run import run
    from taylor_kernels.studies.oracle.settings import OracleSettings

    settings = OracleSettings(
        out=out, model=model, data=data, loss=loss, sample=sample, batches=batches, budget=budget,
        criteria=tuple(dict.fromkeys(criteria)) if criteria else None,
        seed=seed, device=device, quick=quick, force=force,
    )  # fmt: skip
    conduct("compare", run, settings)
