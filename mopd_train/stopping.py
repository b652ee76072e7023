"""Stopping when a scheduler asks: SIGTERM, or SIGUSR1 as slurm sends ahead of a time limit (--signal=USR1@300)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .distributed import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """A signal came, which the message names."""


class Stop:
    """Which signal came, if one did."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __call__(self, number: int, frame: Any) -> None:
        """The second of the same kind acts as if nobody listened: it ends the process."""
        self.signal = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def check(self, ranks: Ranks) -> None:
        """Stopped, on every process, if a signal came to any. Between two checks lies a phase that cannot be cut short
        without loss: an evaluation, the rollouts of a step, its judging, its learning."""
        heard = [name for name in ranks.everywhere(self.signal) if name is not None]
        if heard:
            raise Stopped(heard[0])


@contextmanager
def listening() -> Iterator[Stop]:
    """Within, the first signal is only noted; the loop ends at its next check."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may listen
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
