"""The conversation with the harness inside one sandbox."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from . import harness
from .jail import Cgroup, as_user, bubblewrap_command

if TYPE_CHECKING:
    from ..config import SandboxConfig

Status = Literal["ok", "wrong", "timeout", "memory", "output limit", "crash"]
STATUSES = {*get_args(Status), "call"}
START_SECONDS = 20.0  # to a running harness, on a machine that is busy elsewhere
OPEN_FILES = 64
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


class Session:
    """A conversation with the harness inside one sandbox. Every answer is awaited for a limited time and length."""

    def __init__(self, config: SandboxConfig, python: str, bubblewrap: str | None, slot: Slot) -> None:
        self.config, self.slot = config, slot
        self.expires = time.monotonic() + START_SECONDS + config.completion_seconds
        self.folder: str | None = None
        self.first: int | None = None  # pidfd of the first process inside: when it is gone, all are
        command = [python, "-s", "-B", "-c", BOOT, str(len(HARNESS))]
        options: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT, bufsize=0)
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 (open for the session)
        self.kills_before = slot.cgroup.kills() if slot.cgroup else 0
        if bubblewrap is None:
            self.folder = tempfile.mkdtemp(prefix="mopd-unsandboxed-")
            self.process = subprocess.Popen(
                command, cwd=self.folder, start_new_session=True, stderr=self.stderr, **options
            )
            return
        info, info_inside = os.pipe()
        jail = bubblewrap_command(bubblewrap, python, config.disk_mb << 20, info_inside)
        joining = slot.cgroup.entering() if slot.cgroup else []
        command = [*joining, *as_user(slot.uid), *jail, *command]
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
        limits: dict[str, int] = {"AS": config.memory_mb << 20, "FSIZE": disk, "NOFILE": OPEN_FILES, "CORE": 0}
        limits["CPU"] = math.ceil(config.completion_seconds) + 1
        if self.folder is None:
            limits["NPROC"] = config.processes  # without a user namespace it would count every process of the user
        options: dict[str, Any] = {"mode": mode, "source": source, "entry_point": entry_point, "limits": limits}
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
            if reply["status"] not in STATUSES:
                raise ValueError(reply["status"])
        except (ValueError, TypeError, KeyError, RecursionError):
            self._end("crash", "the process sent something that is not an answer")
        return dict(reply)

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

    def _end_without_answer(self) -> NoReturn:
        if self.slot.cgroup and self.slot.cgroup.kills() > self.kills_before:
            self._end("memory", "the kernel ended it for memory")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)  # for its last words
        self.stderr.seek(0)
        said = self.stderr.read(harness.TAIL).decode("utf-8", "replace").strip()
        self._end("crash", f"the process ended before it answered. {said}".strip())

    def _end(self, status: Status, error: str) -> NoReturn:
        self.close()
        raise SessionEnded(status, error)

    def close(self) -> None:
        """Kill everything inside and wait until it is gone."""
        if self.first is not None:
            # With the first process of a namespace the kernel ends all others, then reports its end. From the inside
            # out, since bubblewrap then reaps its child and ends by itself.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first, signal.SIGKILL)
            poller = select.poll()
            poller.register(self.first, select.POLLIN)
            if not poller.poll(START_SECONDS * 1000):
                raise RuntimeError(f"a sandbox still runs {START_SECONDS:.0f} s after it was killed")
            with contextlib.suppress(ChildProcessError):  # ours only where we are the init of a container
                os.waitid(os.P_PIDFD, self.first, os.WEXITED | os.WNOHANG)
            os.close(self.first)
            self.first = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(START_SECONDS)
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            if stream is not None and not stream.closed:
                stream.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
