"""The command line: a file per command, which imports what is heavy only when it runs, so that
`--help` is quick.
"""

from __future__ import annotations

import sys

import typer

from taylor_kernels.cli import at_init, compare, demo, info, language, prune, score
from taylor_kernels.cli.common import STOPPED, complain

app = typer.Typer(
    help="Taylor importance of filters in fused kernels, and pruning with it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("prune", epilog=prune.EXAMPLE)(prune.command)
app.command("score", epilog=score.EXAMPLE)(score.command)
app.command("demo", epilog=demo.EXAMPLE)(demo.command)
app.command("compare", epilog=compare.EXAMPLE)(compare.command)
app.command("at-init", epilog=at_init.EXAMPLE)(at_init.command)
app.command("language", epilog=language.EXAMPLE)(language.command)
app.command("info", epilog=info.EXAMPLE)(info.command)


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
        code = complain(error.format_message())
    if code == STOPPED:  # typer, by version, raises or returns it
        print("stopped", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
