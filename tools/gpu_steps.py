"""Runs the commands of a step of gpu-check side by side, and writes down what they say at once.

A step that is cut short keeps what it had: every line is in the log as it comes, and a command is
interrupted before it is killed, so that pytest still tells its failures and writes its results.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
#: Seconds that an interrupted command has to end by itself.
GRACE = 6.0
#: Runs a command that hears interrupts: it would be born deaf to them where gpu-check runs in the
#: background of a shell.
HEARING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as error:
    print(f"{sys.argv[1]}: {error}")
    sys.exit(127)
"""


class Step(NamedTuple):
    name: str
    commands: list[list[str]]  # run at the same time
    seconds: float
    spare: float = 0.0  # of them, for the last case to end; the commands are told the others
    environment: dict[str, str] | None = None  # beside that of all steps


def run(step: Step, log: Path, seconds: float) -> dict[str, object]:
    """Runs a step for at most so long. Its output goes to the log; returned are its exit code, the
    seconds it took, the last line of each command, and the tests that failed."""
    if seconds <= step.spare:
        return {
            "step": step.name,
            "ok": False,
            "code": 124,
            "seconds": 0,
            "last_lines": ["no time"],
        }
    commands = step.commands
    if step.spare:
        commands = [[*command, f"--seconds={seconds - step.spare:.0f}"] for command in commands]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TAYLOR_KERNELS_CUDA": "on",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        **(step.environment or {}),
    }
    started = time.monotonic()
    done = run_together(commands, environment, seconds, log)
    worst = max(code for code, _ in done)
    lines = [[line for line in output.splitlines() if line.strip()] for _, output in done]
    return {
        "step": step.name,
        "ok": worst == 0,
        "code": worst,
        "seconds": round(time.monotonic() - started, 1),
        "last_lines": [each[-1] for each in lines if each],
        "failed": [line for each in lines for line in each if line.startswith(("FAILED", "ERROR"))],
        "ends": [each[-12:] for (code, _), each in zip(done, lines, strict=True) if code],
    }


def run_together(
    commands: list[list[str]], environment: dict[str, str], seconds: float, log: Path
) -> list[tuple[int, str]]:
    """Exit codes and outputs; 124 if a command was stopped, 127 if it could not begin."""
    running: list[subprocess.Popen[str]] = []
    lock = threading.Lock()
    with log.open("a", errors="replace") as file, ThreadPoolExecutor(len(commands)) as pool:
        try:
            futures = [
                pool.submit(
                    _finish,
                    command,
                    environment,
                    seconds,
                    running,
                    _Log(file, lock, f"[{i + 1}] " if len(commands) > 1 else ""),
                )
                for i, command in enumerate(commands)
            ]
            return [future.result() for future in futures]
        finally:  # an interrupt reaches no process of another session
            for process in running:
                _signal(process, signal.SIGKILL)


class _Log:
    """One file for several commands; each line is written whole, with the mark of its command."""

    def __init__(self, file: IO[str], lock: threading.Lock, mark: str) -> None:
        self._file, self._lock, self._mark = file, lock, mark

    def write(self, line: str) -> None:
        with self._lock:
            self._file.write(f"{self._mark}{line.rstrip()}\n")
            self._file.flush()


def _finish(
    command: list[str],
    environment: dict[str, str],
    seconds: float,
    running: list[subprocess.Popen[str]],
    log: _Log,
) -> tuple[int, str]:
    started = time.monotonic()
    log.write(f"$ {' '.join(command)}")
    process = subprocess.Popen(
        [sys.executable, "-SEc", HEARING, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    running.append(process)
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            log.write(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    code = 0
    grace = min(GRACE, seconds / 2)
    for sent, after in ((signal.SIGINT, seconds - grace), (signal.SIGKILL, grace)):
        try:
            process.wait(after)
            break
        except subprocess.TimeoutExpired:
            _signal(process, sent)
            code = 124
    process.wait()
    _signal(process, signal.SIGKILL)  # what it started, and what would keep its output open
    reader.join(GRACE)
    code = code or (process.returncode if process.returncode >= 0 else 128 - process.returncode)
    took = time.monotonic() - started
    log.write(f"[exit code {code}{', stopped' if code == 124 else ''}, {took:.1f} s]\n")
    return code, "".join(lines)


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """To a command with all that it started: a compiler or a test that ran on would take the next
    step's time, and the GPU."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
