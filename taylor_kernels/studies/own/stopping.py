"""Stopping between two minibatches, and checkpoints from which a run goes on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run was stopped, and a checkpoint of it is there.

    Args:
        where: how far it came, in words.
        file: the checkpoint.
    """

    def __init__(self, where: str, file: Path) -> None:
        super().__init__(f"stopped {where}; the checkpoint is {file}")


class Keeper:
    """Says when a checkpoint is due: every so many seconds, and where the user asks to stop.

    Args:
        save: writes the checkpoint.
        say: tells the user that they were heard.
        together: makes of what this process was asked, and of whether a checkpoint is due, what
            holds for all processes of the run; None where there is one.
    """

    def __init__(
        self,
        file: Path,
        seconds: float,
        save: Callable[[], None],
        say: Callable[[str], None],
        together: Callable[[bool, bool], tuple[bool, bool]] | None = None,
    ) -> None:
        self.file, self._seconds, self._save, self._say = file, seconds, save, say
        self._last = time.monotonic()
        self._asked = False
        self._together = together

    def between(self, where: str) -> None:
        """Between two minibatches: write a checkpoint if one is due.

        Raises:
            Stopped: the user asked for it.
        """
        asked, due = self._asked, time.monotonic() - self._last >= self._seconds
        if self._together is not None:
            asked, due = self._together(asked, due)
        if asked:
            self._save()
            raise Stopped(where, self.file)
        if due:
            self._save()
            self._last = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, Ctrl-C and SIGTERM ask to stop at the next `between`; a second one stops at once.

        With several processes a second one changes nothing: from one Ctrl-C each process has two,
        the terminal's and torchrun's. torchrun kills those that go on for more than 30 seconds.
        Outside of the main thread, where signals do not arrive, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: object) -> None:
            if self._asked:
                if self._together is None:
                    raise KeyboardInterrupt
                return  # the terminal and torchrun both pass it on
            self._asked = True
            more = "; once more stops at once, without a checkpoint"
            if self._together is not None:
                more = ", unless torchrun kills the processes before: it waits 30 seconds"
            self._say(f"stopping after this minibatch{more}")

        before = {number: signal.signal(number, ask) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
