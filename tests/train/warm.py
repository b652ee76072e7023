"""Many short runs of the command line without paying for imports each time.

One process imports everything and waits; each run is a fork of it, so a process of its own with the command line, the
signals and the exit status that a user's has. Nothing has used a thread pool before the fork.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.train.launch import ROOT, environment


@dataclass
class Job:
    server: Server
    pid: int
    log: Path

    def wait(self, timeout: float = 60) -> int:
        """The exit status, negative for a signal. A run past its time is killed, and fails the test."""
        code = self.server.ask(wait=self.pid, timeout=timeout)
        if code is None:
            self.kill()
            raise AssertionError(f"a run hangs:\n{self.log.read_text()[-2000:]}")
        return int(code)

    def running(self) -> bool:
        return self.server.ask(wait=self.pid, timeout=0) is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def text(self) -> str:
        return " ".join(self.log.read_text().split())


class Server:
    """The waiting process, seen from the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environ = environment() | {"OMP_NUM_THREADS": "1", "MOPD_DEBUG": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.warm"],
            cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *arguments: str, **environ: str) -> Job:
        self.count += 1
        log = self.folder / f"{self.count}.log"
        return Job(self, self.ask(arguments=arguments, environ=environ, log=str(log)), log)

    def run(self, *arguments: str, code: int = 0, **environ: str) -> Job:
        job = self.start(*arguments, **environ)
        assert job.wait() == code, job.log.read_text()
        return job

    def ranks(self, count: int, *arguments: str) -> list[Job]:
        """What torchrun starts: processes that find each other by these variables."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(*arguments, **{name: str(v) for name, v in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()})
            for rank in range(count)
        ]

    def run_ranks(self, count: int, *arguments: str) -> None:
        jobs = self.ranks(count, *arguments)
        codes = [job.wait() for job in jobs]
        assert codes == [0] * count, "\n".join(job.log.read_text()[-3000:] for job in jobs)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def serve() -> None:
    import matplotlib.figure  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import mopd_train.train  # noqa: F401
    from mopd_train.cli import build_parser

    torch.set_num_threads(1)
    build_parser()
    for line in sys.stdin:
        request = json.loads(line)
        answer = _reap(request) if "wait" in request else _fork(request)
        print(json.dumps(answer), flush=True)


ENDED: dict[int, int] = {}


def _reap(request: dict[str, Any]) -> int | None:
    pid, deadline = request["wait"], time.monotonic() + request["timeout"]
    while pid not in ENDED:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ENDED[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= deadline:
            return None
        else:
            time.sleep(0.02)
    return ENDED[pid]


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    from mopd_train.cli import main

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environ"])
    _inject(request["environ"])
    code: Any = 1
    try:
        main(request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _inject(environ: dict[str, str]) -> None:
    """Faults: files of at most FILE_SIZE bytes; death at file operation KILL_AT_EVENT in the folder KILL_IN."""
    if "FILE_SIZE" in environ:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(environ["FILE_SIZE"]),) * 2)
    if "KILL_AT_EVENT" in environ:
        left = [int(environ["KILL_AT_EVENT"])]

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            if event in FILE_EVENTS and str(arguments[0]).startswith(environ["KILL_IN"]):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)


FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

if __name__ == "__main__":
    serve()
