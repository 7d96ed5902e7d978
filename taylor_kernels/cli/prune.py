"""`taylor-kernels prune`."""

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
    "Example: taylor-kernels prune --model mymodels:resnet --data mymodels:loader --flops 0.5 "
    "--epochs 2 --finetune 2 --lr 0.02"
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
    forward: ForwardPath = None,
    criterion: CriterionName = "taylor_fo_bn",
    flops: Annotated[float | None, typer.Option(help="Fraction of the FLOPs to keep.")] = None,
    params: Annotated[float | None, typer.Option(help="Of the parameters.")] = None,
    filters: Annotated[float | None, typer.Option(help="Of the filters.")] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Spread the pruning over so many.  [default: as --per-step takes]"),
    ] = None,
    finetune: Annotated[int, typer.Option(help="Epochs of training after it.")] = 1,
    steps: Annotated[
        int | None, typer.Option(help="Minibatches of an epoch, at most.  [default: all]")
    ] = None,
    every: Annotated[int, typer.Option(help="Minibatches between two prunings.")] = 10,
    per_step: Annotated[
        float, typer.Option(help="Filters that go at a pruning: a fraction, or a count.")
    ] = 0.02,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate.  [default: 0.01 of SGD; else the optimizer's own]"),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="package.module:name of a class, such as torch.optim:AdamW, or of a function "
            "that makes one for the model.  [default: momentum SGD]"
        ),
    ] = None,
    round_to: Annotated[int, typer.Option(help="Widths stay multiples of this.")] = 1,
    min_filters: Annotated[int, typer.Option(help="Every layer keeps so many.")] = 1,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="A layer that keeps its filters (* and ? match); repeat for more."),
    ] = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Whole residual blocks may go too.")
    ] = False,
    batches: Batches = 20,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, layer by layer; write nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the pruned model and the report.")] = Path(
        "runs/prune"
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
    """Prune your model while it trains on your data, then fine-tune it.

    Writes the pruned model as safetensors, as a torch.export program and as ONNX, its scores,
    result.json, report.html and its pictures. Ctrl-C leaves a checkpoint. A minibatch is a pair
    (inputs, targets), a dict that the model takes by name and returns the loss of, or whatever
    --forward turns into a loss.
    """
    require("demo", "matplotlib", "safetensors")
    from taylor_kernels.studies.own.run import run_prune
    from taylor_kernels.studies.own.settings import PruneSettings

    model, data = check_named(model, data)
    settings = PruneSettings(
        model=model, data=data, val=val, loss=loss, forward=forward, criterion=criterion,
        flops=flops, params=params, filters=filters, epochs=epochs, finetune=finetune, steps=steps,
        every=every, per_step=per_step, lr=lr, optimizer=optimizer, round_to=round_to,
        min_filters=min_filters, ignore=tuple(ignore or ()), blocks=blocks, batches=batches,
        dry_run=dry_run, out=out, seed=seed, device=device, amp=amp, resume=resume, force=force,
        save_every=save_every,
    )  # fmt: skip
    run_job(run_prune, settings, as_json=as_json)
