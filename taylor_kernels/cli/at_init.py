"""`taylor-kernels at-init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taylor_kernels.cli.common import (
    AsJson,
    DataPath,
    Device,
    Force,
    LossPath,
    ModelPath,
    conduct,
    require,
)
from taylor_kernels.cli.config import Config

EXAMPLE = (
    "Example: taylor-kernels at-init --model mymodels:resnet --data mymodels:loader "
    "--val mymodels:val --method SynFlow --method SNIP --sparsity 0.9 --epochs 2 --steps 8"
)


def command(
    model: ModelPath = None,
    data: DataPath = None,
    val: Annotated[
        str | None,
        typer.Option(
            help="The same of a loader to judge on.  [default: the first minibatches of --data]"
        ),
    ] = None,
    loss: LossPath = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="SNIP, GraSP, SynFlow, random, 'magnitude at initialization', 'lottery ticket' or "
            "'lottery ticket, rewound'; repeat for more.  [default: all but the last]"
        ),
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            help="Fraction of the weights that go; repeat for more.  [default: 7 from 0.5 to 0.995]"
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of every training.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate, which falls to 0 by a cosine.")] = 0.05,
    early: Annotated[
        int, typer.Option(help="The epoch that a rewound lottery ticket goes back to.")
    ] = 1,
    batches: Annotated[int, typer.Option(help="Minibatches that masks are made from.")] = 4,
    steps: Annotated[
        int | None, typer.Option(help="Minibatches of an epoch, at most.  [default: all]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and what is finished.")] = Path(
        "runs/at-init"
    ),
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(help="How many seeds to run.")] = 1,
    device: Device = "auto",
    config: Config = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Prune an untrained network by every method, train what is left, draw accuracy over sparsity.

    Of your model, or, without --model, of a CNN on digits (some minutes). Each method is run with
    its mask shuffled within layers and with new weights, too. A run that was stopped goes on where
    it was. A minibatch is a pair (inputs, targets).
    """
    require("demo", "sklearn", "matplotlib")
    from taylor_kernels.studies.at_init.run import run
    from taylor_kernels.studies.at_init.settings import (
        DEFAULT_METHODS,
        SPARSITIES,
        AtInitSettings,
    )

    settings = AtInitSettings(
        out=out, model=model, data=data, val=val, loss=loss,
        method=tuple(dict.fromkeys(method or DEFAULT_METHODS)),
        sparsity=tuple(sorted(set(sparsity or SPARSITIES))),
        epochs=epochs, lr=lr, early=early, batches=batches, steps=steps, seed=seed, seeds=seeds,
        device=device, force=force,
    )  # fmt: skip
    conduct("at-init", run, settings, as_json=as_json)
