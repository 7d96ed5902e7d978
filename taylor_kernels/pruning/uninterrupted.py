"""Work that Ctrl-C does not stop half-way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits for the end, so that what is written in many places is written in all.

    Python hands signals to the main thread alone: others are not interrupted anyway. Nor is work
    where SIGINT is ignored, as by jobs in the background of a shell. What the system or C code does
    with it is left as it is: Python could not put a handler of C code back.

    A handler that is set inside stays. It may call the one that it found, or put that back later,
    so the one of this block hands on what comes after its end.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[FrameType | None] = []
    over = False

    def wait(number: int, frame: FrameType | None) -> None:
        if over:
            handler(number, frame)
        else:
            came.append(frame)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is wait:
            signal.signal(signal.SIGINT, handler)
        over = True
        if came:
            handler(signal.SIGINT, came[0])
