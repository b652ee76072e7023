"""A pool of sandboxes on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .jail import FIRST_UID, REMEDY, Cgroup, SandboxUnavailable, find_bubblewrap, find_python, remove_stale
from .session import START_SECONDS, Session, SessionEnded, Slot

if TYPE_CHECKING:
    from ..config import SandboxConfig

logger = logging.getLogger(__name__)

SESSIONS_PER_WORKER = 2  # an assert program and the code it asks


class Sandbox:
    """Runs untrusted Python. Every check that this can be done here is made when it is built.

    SandboxUnavailable (with the remedy) if there is no bubblewrap or the kernel refuses it, unless
    `allow_unsandboxed`: then code runs as this user, limited in time and memory only, with a warning.
    """

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self.python = find_python(config.python)
        self.workers = config.workers or len(os.sched_getaffinity(0))
        self.slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._make_slots()
        try:
            self.bubblewrap: str | None = find_bubblewrap()
            self._probe()
        except SandboxUnavailable as error:
            if not config.allow_unsandboxed:
                raise
            logger.warning("RUNNING MODELS' CODE WITHOUT A SANDBOX, as user id %d: %s", os.geteuid(), error)
            self.bubblewrap = None
            self._probe()

    def _make_slots(self) -> None:
        cgroups: list[Cgroup] = []
        with contextlib.suppress(OSError, KeyError):  # no cgroups here: said below
            remove_stale()
        for number in range(self.workers * SESSIONS_PER_WORKER):
            try:
                name = f"mopd-{os.getpid()}-{id(self):x}-{number}"
                cgroups.append(Cgroup(name, self.config.memory_mb << 20, self.config.processes))
            except (OSError, KeyError) as error:
                logger.info("no cgroup can be made (%s): memory is limited per process, not in total", error)
                break
        for number in range(self.workers * SESSIONS_PER_WORKER):
            self.slots.put(Slot(FIRST_UID + number, cgroups[number] if number < len(cgroups) else None))
        self.close = weakref.finalize(self, remove_all, cgroups)

    def _probe(self) -> None:
        try:
            with self.session("program", "print(input())") as session:
                answer = session.test("alive", START_SECONDS)
        except SessionEnded as ended:
            raise SandboxUnavailable(f"a first program could not be run: {ended}: {REMEDY}") from ended
        if answer.stdout != "alive\n":
            raise SandboxUnavailable(f"a first program printed {answer.stdout!r} ({answer.error}): {REMEDY}")

    @contextmanager
    def session(self, mode: str, source: str, entry_point: str = "") -> Iterator[Session]:
        """One isolated process with `source` loaded, gone with everything it started when the block ends.

        mode: "program" (stdin to stdout), "call" (arguments to value), "check" (a trusted assert program).
        SessionEnded if the source cannot be loaded.
        """
        slot = self.slots.get()
        session = None
        try:
            session = Session(self.config, self.python, self.bubblewrap, slot)
            session.load(mode, source, entry_point)
            yield session
        finally:
            if session is not None:
                session.close()
            self.slots.put(slot)

    def map(self, judge: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """judge(item) for every item, `workers` at once; None for those not begun after `batch_seconds`."""
        deadline = time.monotonic() + self.config.batch_seconds
        with ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox") as pool:
            verdicts = list(pool.map(lambda item: judge(item) if time.monotonic() < deadline else None, items))
        return verdicts


def remove_all(cgroups: list[Cgroup]) -> None:
    for cgroup in cgroups:
        cgroup.remove()
