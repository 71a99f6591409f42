"""Ctrl-C and SIGTERM: where work may stop, and where it must not."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self


class Interrupts:
    """SIGINT and SIGTERM wait while it is entered, but inside `released` raise KeyboardInterrupt.

    A signal that the process was started to ignore stays ignored, as background jobs expect;
    outside the main thread, where Python handles no signals, none is.

    Args:
        ends_process: nothing follows but the process's end, in which signals are ignored.
    """

    polled = False  # nothing raises, `requested` is looked at: where processes stop together

    def __init__(self, *, ends_process: bool = False) -> None:
        self.requested = False  # whether a signal came
        self._raises = False
        self._ends_process = ends_process
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self._ends_process else handler)

    @contextmanager
    def released(self) -> Iterator[None]:
        """The first signal inside, or before, raises KeyboardInterrupt; later ones do nothing."""
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside `released`: signals wait for the end of the block."""
        self._raises = False
        yield
        self._raises = True
        self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came, unless polled."""
        if self.requested and not self.polled:
            self._raises = False
            raise KeyboardInterrupt

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._raises:
            self.check()
