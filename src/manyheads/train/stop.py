"""Stopping a run from outside: Ctrl-C or SIGTERM finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupted", "StopRequest"]


class Interrupted(Exception):
    """The run was asked to stop, by the signal ``signum``."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class StopRequest:
    """While entered, SIGINT and SIGTERM set ``signum`` instead of ending the process.

    A second SIGINT ends it at once, as without. Outside the main thread nothing is changed.

    Args:
        alone: whether there is no other process in this run.
    """

    def __init__(self, *, alone: bool) -> None:
        self.signum, self.alone = 0, alone
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def check(self) -> None:
        """Raise :class:`Interrupted` if one process is all there is and it was asked to stop.

        Several processes evaluate different shares: those stop between steps only.
        """
        if self.signum and self.alone:
            raise Interrupted(self.signum)
