"""What runs inside the sandbox. Its text is sent in, so it is one file that needs the standard library alone.

It answers messages of the host: a length (4 bytes, big endian) and JSON. The first one names a way to run:

- program: each message is a test's standard input; the program runs in a fresh child, its output goes back.
- call: each message is the arguments of a function the source defines; the value it returned goes back.
- check: the source is a *trusted* assert program with `check(candidate)`. Its calls of the candidate go out to
  the host, which asks another sandbox, and at the end comes the verdict.

No expected answer ever comes in beside untrusted code: the host compares. A candidate that takes this process over
can therefore send wrong values, or none, but cannot make them right.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import struct
import sys
import types
from typing import Any

SOURCES: dict[str, str] = {}  # by the names that tracebacks give them
SOLUTION, CHECK = "solution.py", "check.py"
TAIL = 1000  # characters of a traceback or of standard error that are kept


def encode(value: Any) -> Any:
    """A builtin value as JSON that keeps its type; TypeError for what is more than data."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 63 else {"int": hex(value)}  # long decimals are slow to read
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    raise TypeError(f"a {type(value).__name__} is not plain data: return numbers, strings, lists, tuples, sets, dicts")


def decode(value: Any) -> Any:
    """The builtin value that `encode` wrote; ValueError, TypeError or KeyError for anything else."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "int":
        return int(content, 16)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    return {"tuple": tuple, "set": set}[kind](decode(item) for item in content)


class Channel:
    """Messages over two descriptors that the code under test is not given."""

    def __init__(self) -> None:
        self.incoming, self.outgoing = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)

    def receive(self) -> Any:
        (size,) = struct.unpack(">I", self._read(4))
        return json.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self.incoming, min(size, 1 << 20))
            if not part:
                os._exit(0)  # the host is done
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def send(self, message: Any) -> None:
        body = json.dumps(message).encode()
        body = struct.pack(">I", len(body)) + body
        while body:
            body = body[os.write(self.outgoing, body) :]


def set_limits(limits: dict[str, int]) -> None:
    """Hard limits, which this process and its children cannot raise."""
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        ceiling = resource.getrlimit(number)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(number, (value, value))


def new_module(name: str) -> dict[str, Any]:
    """The namespace of a fresh module, known by its name as dataclasses and pickle want it."""
    sys.modules[name] = module = types.ModuleType(name)
    return module.__dict__


def load(source: str, name: str) -> Any:
    SOURCES[name] = source
    return compile(source, name, "exec", dont_inherit=True)


def failure(error: BaseException) -> dict[str, Any]:
    """What went wrong, as the last lines of a traceback of the code's own frames."""
    import linecache  # these two are a third of the start-up time and most runs need neither
    import traceback

    for name, source in SOURCES.items():
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename not in SOURCES:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace))
    return {"status": "memory" if isinstance(error, MemoryError) else "crash", "error": text[-TAIL:].strip()}


class Program:
    """A message is a test's standard input; the program runs in a fresh child and its output is the answer."""

    def __init__(self, options: dict[str, Any], channel: Channel) -> None:
        self.code = load(options["source"], SOLUTION)
        self.cpu_seconds, self.output_bytes = options["cpu_seconds"], options["output_bytes"]

    def answer(self, message: Any) -> dict[str, Any]:
        output, errors = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            self.run(message["stdin"], output[1], errors[1])
            sys.exit()
        os.close(output[1])
        os.close(errors[1])
        return self.watch(child, output[0], errors[0])

    def run(self, stdin: str, output: int, errors: int) -> None:
        """In the child: the program as __main__, with nothing open but its three standard streams."""
        given = os.memfd_create("stdin")
        with open(given, "wb", closefd=False) as handle:
            handle.write(stdin.encode("utf-8", "surrogateescape"))
        os.lseek(given, 0, os.SEEK_SET)
        for standard, descriptor in enumerate((given, output, errors)):
            os.dup2(descriptor, standard)
        os.closerange(3, 256)
        set_limits({"CPU": self.cpu_seconds})
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        sys.argv = [SOLUTION]
        try:
            exec(self.code, new_module("__main__"))
        except Exception as error:
            print(failure(error)["error"], file=sys.stderr)
            sys.exit(1)

    def watch(self, child: int, output: int, errors: int) -> dict[str, Any]:
        """The child's output until it ends, whoever else still holds the pipes; it is killed for printing too much."""
        ended = os.pidfd_open(child)
        kept: dict[int, bytes] = {output: b"", errors: b""}
        poller = select.poll()
        for descriptor in (output, errors, ended):
            poller.register(descriptor, select.POLLIN)
        overflow = finished = False
        while not (finished or overflow):
            ready = [descriptor for descriptor, _ in poller.poll()]
            finished = ready == [ended]  # what it wrote last has been read
            for descriptor in set(ready) & set(kept):
                part = os.read(descriptor, 1 << 16)
                if not part:
                    poller.unregister(descriptor)
                kept[descriptor] += part
            kept[errors] = kept[errors][-TAIL:]
            overflow = len(kept[output]) > self.output_bytes
        if overflow:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for descriptor in (output, errors, ended):
            os.close(descriptor)
        if overflow:
            return {"status": "output limit", "error": f"it printed more than {self.output_bytes} bytes"}
        error = kept[errors].decode("utf-8", "replace").strip()
        status = "ok" if code == 0 else "crash"
        if code < 0:
            status = "timeout" if -code == signal.SIGXCPU else "crash"
            error = f"{error}\nkilled by {signal.Signals(-code).name}".strip()
        elif code and error.rpartition("\n")[2].startswith("MemoryError"):
            status = "memory"
        return {"status": status, "stdout": kept[output].decode("utf-8", "surrogateescape"), "error": error}


class Calls:
    """A message is the arguments of the function that the source defines; what it returns is the answer."""

    def __init__(self, options: dict[str, Any], channel: Channel) -> None:
        self.namespace, self.name = new_module("solution"), options["entry_point"]
        exec(load(options["source"], SOLUTION), self.namespace)
        self.function()

    def function(self) -> Any:
        """The function, or the method of a new Solution object."""
        if self.name in self.namespace:
            return self.namespace[self.name]
        if hasattr(self.namespace.get("Solution"), self.name):
            return getattr(self.namespace["Solution"](), self.name)
        raise NameError(f"the code defines no function {self.name!r}")

    def answer(self, message: Any) -> dict[str, Any]:
        try:
            value = self.function()(*decode(message["args"]), **decode(message["kwargs"]))
            return {"status": "ok", "value": encode(value)}
        except (Exception, SystemExit) as error:
            return failure(error)


class CandidateError(Exception):
    """Stands in an assert program for whatever the candidate raised."""


class Check:
    """The one message starts check(candidate), where calling the candidate asks the host and waits for its answer.
    Only data comes back, so both sides of an assert are objects of this process."""

    def __init__(self, options: dict[str, Any], channel: Channel) -> None:
        self.channel, self.namespace = channel, new_module("check")
        exec(load(options["source"], CHECK), self.namespace)
        self.namespace[options["entry_point"]] = self.candidate

    def candidate(self, *args: Any, **kwargs: Any) -> Any:
        self.channel.send({"status": "call", "args": encode(args), "kwargs": encode(kwargs)})
        reply = self.channel.receive()
        if reply["status"] != "ok":
            raise CandidateError(reply["error"])
        return decode(reply["value"])

    def answer(self, message: Any) -> dict[str, Any]:
        try:
            self.namespace["check"](self.candidate)
            return {"status": "ok"}
        except (Exception, SystemExit) as error:
            wrong = {"status": "wrong"} if isinstance(error, AssertionError) else {}
            return {**failure(error), **wrong}


MODES: dict[str, Any] = {"program": Program, "call": Calls, "check": Check}


def main() -> None:
    channel = Channel()
    options = channel.receive()
    set_limits(options["limits"])
    try:
        mode = MODES[options["mode"]](options, channel)
    except (Exception, SystemExit) as error:
        channel.send(failure(error))
        return
    channel.send({"status": "ok"})
    while True:
        channel.send(mode.answer(channel.receive()))


if __name__ == "__harness__":
    main()
