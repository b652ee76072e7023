"""Work that may hang or eat memory, in processes that can be ended: symbolic mathematics above all.

Plain subprocesses with one JSON line an item, not multiprocessing: forking a process with threads and devices is
unsafe, and spawning runs the user's script again.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import math
import os
import queue
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

MEMORY = 4 << 30  # bytes of address space of a worker
START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from mopd_train.tasks.workers import serve; serve()"


class Workers:
    """A pool that runs one function, named `module:function`, on lists of JSON values.

    `map(items)` gives one result an item, in order: {"value": what the function returned}, {"error": text} where it
    raised, or {"ended": text} where the worker passed `seconds` of processor time (ten times that of wall-clock
    time, so that a busy machine judges like a quiet one), passed its memory, or died. An ended worker is replaced.
    """

    def __init__(self, function: str, seconds: float, count: int | None = None) -> None:
        self.function, self.seconds = function, seconds
        self.count = count or max(1, len(os.sched_getaffinity(0)))
        self.idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self.started: list[subprocess.Popen[bytes]] = []
        for _ in range(self.count):
            self.idle.put(None)  # a place whose worker starts when first needed
        atexit.register(self.close)

    def map(self, items: list[Any]) -> list[dict[str, Any]]:
        if not items:
            return []
        with ThreadPoolExecutor(min(self.count, len(items))) as threads:
            return list(threads.map(self._one, items))

    def _one(self, item: Any) -> dict[str, Any]:
        worker = self.idle.get()
        answer = b""
        try:
            if worker is None or worker.poll() is not None:
                worker = self._start()
            assert worker.stdin is not None
            assert worker.stdout is not None
            try:
                worker.stdin.write(json.dumps(item).encode() + b"\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
            except BrokenPipeError:
                pass
            if answer.endswith(b"\n"):
                return dict(json.loads(answer))
            code = self._end(worker)
            worker = None
            limits = (-signal.SIGPROF, -signal.SIGALRM)
            return {"ended": f"took over {self.seconds:g} s" if code in limits else f"ended its worker (code {code})"}
        finally:
            self.idle.put(worker)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", START, json.dumps(sys.path), self.function, str(self.seconds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.started.append(worker)
        return worker

    def _end(self, worker: subprocess.Popen[bytes]) -> int:
        worker.kill()  # it may have closed its output and be alive
        code = worker.wait()
        for stream in (worker.stdin, worker.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        if worker in self.started:
            self.started.remove(worker)
        return code

    def close(self) -> None:
        """End every worker; a later `map` starts new ones."""
        for worker in list(self.started):
            self._end(worker)


@lru_cache(maxsize=8)
def workers(function: str, seconds: float) -> Workers:
    """The process-wide pool of a function: its workers stay, with their imports, until the process ends."""
    return Workers(function, seconds)


def serve() -> None:
    """A worker's life. The kernel's timers end it even inside compiled code, and when the parent is gone."""
    module, _, name = sys.argv[2].partition(":")
    seconds = float(sys.argv[3])
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not an answer
    function = getattr(importlib.import_module(module), name)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    for line in sys.stdin.buffer:
        item = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, math.ceil(10 * seconds))
        try:
            answer = {"value": function(item)}
        except (MemoryError, RecursionError) as error:
            answer = {"ended": f"ran into {type(error).__name__}"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        output.write(json.dumps(answer).encode() + b"\n")
        output.flush()
