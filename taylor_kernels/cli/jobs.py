"""How `score` and `prune` run their jobs, and say what came of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from taylor_kernels.cli.common import STOPPED, fail, show

if TYPE_CHECKING:
    from taylor_kernels.studies.own.settings import OwnSettings


def run_job(job: Callable[..., Any], settings: OwnSettings, *, as_json: bool) -> None:
    """Run a job; print its tables, or what result.json holds. A mistake is one line.

    Of the processes that torchrun has started the first one prints; the others say mistakes alone.
    """
    from rich.console import Console

    from taylor_kernels.studies.options import Mistake
    from taylor_kernels.studies.own.processes import is_first, started_by_torchrun
    from taylor_kernels.studies.own.run import files_of
    from taylor_kernels.studies.own.stopping import Stopped
    from taylor_kernels.studies.progress import ProgressLog

    first = is_first()
    log = ProgressLog() if first else ProgressLog(Console(quiet=True))
    try:
        result, tables = job(settings, log)
    except Mistake as error:
        fail(str(error))
    except Stopped as stop:
        if first:
            by = ", by torchrun with any number of processes" if started_by_torchrun() else ""
            print(f"{stop}; go on with{by}: {settings.command()} --resume", file=sys.stderr)
        sys.exit(STOPPED)  # past main(), which would say again that it stopped
    if not first:
        return
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        show(tables, *([] if result["kind"] == "plan" else files_of(settings.out)))


def check_named(model: str | None, data: str | None) -> tuple[str, str]:
    """The paths of --model and --data, which may be in a file of options; both have to be there."""
    if model is None or data is None:
        missing = " and ".join(n for n, v in (("--model", model), ("--data", data)) if v is None)
        fail(
            f"{missing}: not given; as in --model package.module:make_model "
            "--data package.module:make_loader"
        )
    return model, data
