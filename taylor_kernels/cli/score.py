"""`taylor-kernels score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taylor_kernels.cli.common import (
    Amp,
    AsJson,
    Batches,
    CriterionName,
    DataPath,
    Device,
    Force,
    ForwardPath,
    LossPath,
    ModelPath,
    Resume,
    SaveEvery,
    Seed,
    require,
)
from taylor_kernels.cli.config import Config
from taylor_kernels.cli.jobs import check_named, run_job

EXAMPLE = (
    "Example: taylor-kernels score --model mymodels:resnet --data mymodels:loader "
    "--criterion taylor_fo_gate --batches 10"
)


def command(
    model: ModelPath = None,
    data: DataPath = None,
    loss: LossPath = None,
    forward: ForwardPath = None,
    criterion: CriterionName = "taylor_fo_bn",
    batches: Batches = 20,
    out: Annotated[Path, typer.Option(help="Folder for the scores and the report.")] = Path(
        "runs/score"
    ),
    seed: Seed = 0,
    device: Device = "auto",
    amp: Amp = False,
    config: Config = None,
    resume: Resume = False,
    force: Force = False,
    save_every: SaveEvery = 60.0,
    as_json: AsJson = False,
) -> None:
    """Score every filter of your model over minibatches of your data, in eval mode.

    Writes scores.safetensors, result.json, report.html and its picture. A minibatch is a pair
    (inputs, targets), a dict that the model takes by name and returns the loss of, or whatever
    --forward turns into a loss.
    """
    require("demo", "matplotlib", "safetensors")
    from taylor_kernels.studies.own.run import run_score
    from taylor_kernels.studies.own.settings import ScoreSettings

    model, data = check_named(model, data)
    settings = ScoreSettings(
        model=model, data=data, loss=loss, forward=forward, criterion=criterion, batches=batches,
        out=out, seed=seed, device=device, amp=amp, resume=resume, force=force,
        save_every=save_every,
    )  # fmt: skip
    run_job(run_score, settings, as_json=as_json)
