"""Programs in processes of their own, which find PyTorch imported.

Importing it takes a new interpreter seconds. One that has imported it, and nothing of this package,
forks for each program; another has also imported what the first optimizer of a process does, Triton
among it, which takes as long again.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

from tests.helpers import ROOT


class Run(NamedTuple):
    """How a program ended, a signal as a negative number, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_program(
    program: str, seconds: float = 120.0, optimizers: bool = False, **environment: str | None
) -> Run:
    """Run Python code as `python -c` does, with these variables besides those of this process, and
    without those that are None.

    It is stopped after so many seconds. `optimizers`: it makes some.
    """
    server = _server(optimizers)
    assert server.stdin is not None
    assert server.stdout is not None
    given = {**os.environ, **environment}
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "program": program,
            "environment": {k: v for k, v in given.items() if v is not None},
            "seconds": seconds,
            "folder": folder,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        assert code, "the process that runs programs has ended"
        wrote = [Path(folder, name).read_text() for name in ("1", "2")]
    return Run(int(code), *wrote)


def run_module(
    module: str,
    *arguments: str,
    before: str = "",
    optimizers: bool = False,
    **environment: str | None,
) -> Run:
    """Run `python -m module` with these arguments, for ten minutes at most; `before` is Python code
    that runs first."""
    start = (
        f"import runpy, sys\nsys.argv[1:] = {list(arguments)!r}\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return run_program(f"{before}\n{start}", 600.0, optimizers, **environment)


def run_pytest(*arguments: str, before: str = "", **environment: str | None) -> Run:
    """Run `python -m pytest` with pytest-benchmark and no other plugin, and measure as outside of
    pytest-xdist."""
    # Finding and importing all that is installed takes seconds.
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    outside = dict.fromkeys(name for name in os.environ if "XDIST" in name)
    plugins = ("-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider")
    environment = {**outside, **alone, **environment}
    return run_module("pytest", *plugins, *arguments, before=before, **environment)


def undrawn(pages: str) -> str:
    """Python code after which this module of a study's pages makes no drawings, which takes
    seconds."""
    return (
        f"import {pages} as pages\n"
        "from taylor_kernels.studies.report import Text\n"
        "pages.draw = lambda *_, **__: Text('not in this test')\n"
    )


@cache
def _server(optimizers: bool) -> subprocess.Popen[str]:
    """It ends when this process does, which closes its input."""
    ahead = ["torch._dynamo"] if optimizers else []
    words = [sys.executable, "-m", "tests.helpers.programs", "torch", *ahead]
    return subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _serve(modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _become(**request)
        print(_end_of(child, request["seconds"]), flush=True)


def _end_of(child: int, seconds: float) -> int:
    latest = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > latest:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _become(program: str, environment: dict[str, str], folder: str, seconds: float) -> NoReturn:
    """Run the program in this process, which is a fork, and end it."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (1, 2):
            os.dup2(os.open(Path(folder, str(number)), os.O_CREAT | os.O_WRONLY), number)
        os.environ.clear()
        os.environ.update(environment)
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1:])
