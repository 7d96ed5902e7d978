"""--config: a file of the same options, which those on the command line come before."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from taylor_kernels.cli.common import fail


def _read(path: Path) -> Any:
    """The content of a TOML or YAML file; a mistake in it ends the command."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--config: cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}")
    if path.suffix == ".toml":
        found = next((n for n in ("tomllib", "tomli") if importlib.util.find_spec(n)), None)
        if found is None:
            fail("--config: TOML needs Python 3.11 or later, or pip install tomli")
        loads: Any = importlib.import_module(found).loads
    elif path.suffix in (".yaml", ".yml"):
        if importlib.util.find_spec("yaml") is None:
            fail("--config: YAML needs PyYAML; pip install pyyaml, or write TOML")
        loads = importlib.import_module("yaml").safe_load
    else:
        fail(f"--config: {str(path)!r} is neither .toml nor .yaml")
    try:
        return loads(text)
    except Exception as error:  # each library has its own
        fail(f"--config: {str(path)!r} is no valid {path.suffix[1:].upper()}: {error}")


def _load(context: typer.Context, path: Path | None) -> Path | None:
    if path is None:
        return None
    content = _read(path)
    if not isinstance(content, dict):
        fail(f"--config: {str(path)!r} holds no options; write lines such as flops = 0.5")
    # An option goes by its long name there and by its parameter's here.
    known = {
        flag.lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        for flag in parameter.opts
    }
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known or name in ("config", "help"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            fail(f"--config: {str(path)!r} has {key!r}, which is no option{hint}")
        parameter = known[name]
        if parameter.multiple and not isinstance(value, (list, tuple)):
            value = [value]  # one of several is written as it would be on the command line
        values[parameter.name] = value
    context.default_map = {**(context.default_map or {}), **values}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A TOML or YAML file of these options; those given here come first.",
        callback=_load,
        is_eager=True,
    ),
]
