"""A pool of sandboxes on this machine, and the conversation with one of them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import SandboxConfig
from . import harness
from .jail import (
    FIRST_UID,
    REMEDY,
    Cgroup,
    SandboxUnavailable,
    as_user,
    bubblewrap_command,
    find_bubblewrap,
    find_python,
)

logger = logging.getLogger(__name__)

Status = Literal["ok", "wrong", "timeout", "memory", "output limit", "crash"]
START_SECONDS = 20.0  # to a running harness, on a machine that is busy elsewhere
OPEN_FILES = 64
SESSIONS_PER_WORKER = 2  # an assert program and the code it asks
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "PATH": "/usr/bin",
}  # the same verdict each time
# Reads the harness from standard input: a file of ours need not be readable to the sandbox's user.
BOOT = (
    "import os,sys;sys.path[:]=[p for p in sys.path if p];size=int(sys.argv[1]);text=b''\n"
    "while len(text)<size:text+=os.read(0,size-len(text))\n"
    "exec(compile(text,'harness.py','exec'),{'__name__':'__harness__'})"
)
HARNESS = Path(harness.__file__).read_bytes()


@dataclass(frozen=True)
class Result:
    """What one test came to. `error` says why where the status is not ok."""

    status: Status
    stdout: str = ""
    value: Any = None
    error: str = ""


class SessionEnded(Exception):
    """The process is gone or was ended; `result` says why."""

    def __init__(self, status: Status, error: str) -> None:
        super().__init__(f"{status}: {error}")
        self.result = Result(status, error=error)


@dataclass
class Slot:
    """What a running sandbox has to itself."""

    uid: int
    cgroup: Cgroup | None


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
        try:
            self.bubblewrap: str | None = find_bubblewrap()
            self._make_slots()
            self._probe()
        except SandboxUnavailable as error:
            if not config.allow_unsandboxed:
                raise
            logger.warning("RUNNING MODELS' CODE WITHOUT A SANDBOX, as user id %d: %s", os.geteuid(), error)
            self.bubblewrap = None
            self._probe()

    def _make_slots(self) -> None:
        cgroups: list[Cgroup] = []
        for number in range(self.workers * SESSIONS_PER_WORKER):
            try:
                name = f"mopd-{os.getpid()}-{id(self):x}-{number}"
                cgroups.append(Cgroup(name, self.config.memory_mb << 20, self.config.processes))
            except (OSError, KeyError) as error:
                logger.info("no cgroup can be made (%s): memory is limited per process, not in total", error)
                break
        for number in range(self.workers * SESSIONS_PER_WORKER):
            self.slots.put(Slot(FIRST_UID + number, cgroups[number] if number < len(cgroups) else None))
        self.close = weakref.finalize(self, lambda: [cgroup.remove() for cgroup in cgroups])

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
            session = Session(self, slot)
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


class Session:
    """A conversation with the harness inside one sandbox. Every answer is awaited for a limited time and length."""

    def __init__(self, sandbox: Sandbox, slot: Slot) -> None:
        config = sandbox.config
        self.config, self.slot = config, slot
        self.expires = time.monotonic() + START_SECONDS + config.completion_seconds
        self.folder: str | None = None
        self.first: int | None = None  # pidfd of the first process inside: when it is gone, all are
        python = [sandbox.python, "-s", "-B", "-c", BOOT, str(len(HARNESS))]
        options: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, bufsize=0)
        self.stderr = tempfile.TemporaryFile()
        self.kills_before = slot.cgroup.kills() if slot.cgroup else 0
        if sandbox.bubblewrap is None:
            self.folder = tempfile.mkdtemp(prefix="mopd-unsandboxed-")
            self.process = subprocess.Popen(
                python, cwd=self.folder, start_new_session=True, stderr=self.stderr, **options
            )
            return
        info, info_inside = os.pipe()
        jail = bubblewrap_command(sandbox.bubblewrap, sandbox.python, config.disk_mb << 20, info_inside)
        joining = slot.cgroup.entering() if slot.cgroup else []
        command = [*joining, *as_user(slot.uid), *jail, *python]
        try:
            self.process = subprocess.Popen(
                command, pass_fds=(info_inside,), start_new_session=True, stderr=self.stderr, **options
            )
        finally:
            os.close(info_inside)
        with os.fdopen(info, "rb") as handle:
            told = handle.read()
        with contextlib.suppress(ValueError, KeyError, ProcessLookupError):  # it failed to start: load() says so
            self.first = os.pidfd_open(json.loads(told)["child-pid"])

    def load(self, mode: str, source: str, entry_point: str) -> None:
        config, cpu_seconds = self.config, math.ceil(self.config.seconds) + 1
        disk = config.disk_mb << 20
        limits = {"AS": config.memory_mb << 20, "FSIZE": disk, "NOFILE": OPEN_FILES, "CORE": 0}
        limits["CPU"] = math.ceil(config.completion_seconds) + 1
        if self.folder is None:
            limits["NPROC"] = config.processes  # without a user namespace it would count every process of the user
        options = {"mode": mode, "source": source, "entry_point": entry_point, "limits": limits}
        options |= {"cpu_seconds": cpu_seconds, "output_bytes": config.output_kb << 10}
        self._write(HARNESS, time.monotonic() + START_SECONDS)
        reply = self.ask(options, START_SECONDS if mode == "program" else config.seconds)
        if reply["status"] != "ok":
            raise SessionEnded(reply["status"], reply["error"])

    def test(self, stdin: str, seconds: float | None = None) -> Result:
        """Standard output of the program for this input."""
        try:
            reply = self.ask({"stdin": stdin}, seconds)
        except SessionEnded as ended:
            return ended.result
        return Result(reply["status"], stdout=str(reply.get("stdout", "")), error=str(reply.get("error", "")))

    def call(self, *args: Any, **kwargs: Any) -> Result:
        """Value of the function for these arguments."""
        try:
            reply = self.ask({"args": harness.encode(args), "kwargs": harness.encode(kwargs)})
            value = harness.decode(reply["value"]) if reply["status"] == "ok" else None
        except SessionEnded as ended:
            return ended.result
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            return Result("crash", error=f"the reply cannot be read: {error!r:.200}")
        return Result(reply["status"], value=value, error=str(reply.get("error", "")))

    def ask(self, message: Any, seconds: float | None = None) -> dict[str, Any]:
        """One message in, one out. SessionEnded, with the process killed, if it does not come in time or is too
        long, not a message, or never comes."""
        limit = self.config.seconds if seconds is None else seconds
        deadline = min(time.monotonic() + limit, self.expires)
        body = json.dumps(message).encode()
        self._write(struct.pack(">I", len(body)) + body, deadline)
        (size,) = struct.unpack(">I", self._read(4, deadline))
        # Escapes of JSON take up to six characters a character; the harness counts the output itself.
        if size > 8 * (self.config.output_kb << 10):
            self._end("output limit", f"an answer of {size} bytes")
        try:
            reply = json.loads(self._read(size, deadline))
            if reply["status"] in Status.__args__ or reply["status"] == "call":  # type: ignore[attr-defined]
                return reply
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        self._end("crash", "the process sent something that is not an answer")
        raise AssertionError("unreachable")

    def _write(self, body: bytes, deadline: float) -> None:
        assert self.process.stdin is not None
        descriptor = self.process.stdin.fileno()
        os.set_blocking(descriptor, False)
        view = memoryview(body)
        while view:
            self._wait(descriptor, select.POLLOUT, deadline)
            try:
                view = view[os.write(descriptor, view) :]
            except BrokenPipeError:
                self._end_without_answer()

    def _read(self, size: int, deadline: float) -> bytes:
        assert self.process.stdout is not None
        parts = []
        while size:
            self._wait(self.process.stdout.fileno(), select.POLLIN, deadline)
            part = os.read(self.process.stdout.fileno(), min(size, 1 << 20))
            if not part:
                self._end_without_answer()
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poller = select.poll()  # unlike select, for any number of open files
        poller.register(descriptor, event)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            self._end("timeout", "no answer within the time limit")

    def _end_without_answer(self) -> None:
        self.close()
        if self.slot.cgroup and self.slot.cgroup.kills() > self.kills_before:
            self._end("memory", "the kernel ended it for memory")
        self.stderr.seek(0)
        said = self.stderr.read(harness.TAIL).decode("utf-8", "replace").strip()
        self._end("crash", f"the process ended before it answered {said}".strip())

    def _end(self, status: Status, error: str) -> None:
        self.close()
        raise SessionEnded(status, error)

    def close(self) -> None:
        """Kill everything inside and wait until it is gone."""
        if self.process.poll() is None:
            if self.folder is None:
                self.process.kill()  # the processes inside are told to die with it
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.first is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first, signal.SIGKILL)
            poller = select.poll()
            poller.register(self.first, select.POLLIN)
            if not poller.poll(START_SECONDS * 1000):
                raise RuntimeError(f"a sandbox still runs {START_SECONDS:.0f} s after it was killed")
            os.close(self.first)
            self.first = None
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            if stream is not None and not stream.closed:
                stream.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
