"""`taylor-kernels info`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

EXAMPLE = "Example: taylor-kernels info --json"


def command(
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
