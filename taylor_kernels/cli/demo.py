"""`taylor-kernels demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taylor_kernels.cli.common import Device, Force, fail, require, show

EXAMPLE = "Example: taylor-kernels demo --quick --flops 0.3 --criteria taylor_fo --criteria random"


def command(
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
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Train a small ResNet on real digits, prune it by several criteria, write a report."""
    require("demo", "sklearn", "matplotlib", "safetensors")
    from taylor_kernels.studies.options import Mistake
    from taylor_kernels.studies.own.processes import check_alone
    from taylor_kernels.studies.progress import ProgressLog
    from taylor_kernels.studies.pruning.run import run
    from taylor_kernels.studies.pruning.settings import (
        DEFAULT_CRITERIA,
        FULL,
        QUICK,
        PruningSettings,
    )

    settings = PruningSettings(
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
        check_alone("demo")
        _, table = run(settings, ProgressLog())
    except Mistake as error:
        fail(str(error))
    show([table], *(out / name for name in ("report.html", "result.json", "pruned.pt2")))
