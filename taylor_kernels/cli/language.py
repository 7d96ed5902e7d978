"""`taylor-kernels language`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taylor_kernels.cli.common import AsJson, Device, Force, conduct, require

EXAMPLE = (
    "Example: taylor-kernels language --quick --kinds heads --kinds blocks --fractions 0.5 "
    "--criteria taylor_fo --criteria random"
)


def command(
    out: Annotated[Path, typer.Option(help="Folder for the report and what is finished.")] = Path(
        "runs/language"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A small model, in some minutes.")] = False,
    criteria: Annotated[
        list[str] | None,
        typer.Option(
            help="A criterion to prune by; repeat for more. The first one's models are timed.  "
            "[default: taylor_fo, taylor_fo_gate, magnitude_l2, random]"
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            help="feed-forward, heads, width, blocks or all, which is these together; repeat for "
            "more.  [default: each]"
        ),
    ] = None,
    fractions: Annotated[
        list[float] | None,
        typer.Option(help="Fraction that goes; repeat for more.  [default: 0.2, 0.3, 0.5]"),
    ] = None,
    draws: Annotated[int, typer.Option(help="How often `random` is drawn.")] = 3,
    seed: Annotated[
        int, typer.Option(help="Of the model's start, the order of the text and the draws.")
    ] = 0,
    device: Device = "auto",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a small Llama on Python's standard library, prune it, measure what is left.

    Feed-forward neurons, heads, width and whole branches, alone and together; perplexity before and
    after training on, parameters, tokens a second, memory. An hour on one core; a run that was
    stopped goes on where it was.
    """
    require("demo", "matplotlib", "safetensors")
    from taylor_kernels.studies.language.kinds import KINDS
    from taylor_kernels.studies.language.run import run
    from taylor_kernels.studies.language.settings import (
        DEFAULT_CRITERIA,
        FRACTIONS,
        LanguageSettings,
    )

    settings = LanguageSettings(
        out=out, quick=quick, draws=draws, seed=seed, device=device, force=force,
        criteria=tuple(dict.fromkeys(criteria or DEFAULT_CRITERIA)),
        kinds=tuple(dict.fromkeys(kinds or KINDS)),
        fractions=tuple(sorted(set(fractions or FRACTIONS))),
    )  # fmt: skip
    conduct("language", run, settings, as_json=as_json)
