"""What the sandbox promises to its users: statuses, values, the pool, and when it refuses to work."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from mopd_train.config import SandboxConfig
from mopd_train.sandbox import Sandbox, SandboxUnavailable, SessionEnded
from tests.train.sandboxes import LIMITS, attack


def test_a_program_reads_and_prints(box):
    with box.session("program", "n = int(input())\nprint(n + 1)") as session:
        assert [session.test(str(n)).stdout for n in (1, 41)] == ["2\n", "42\n"]
        assert (result := session.test("x")).status == "crash"
    assert result.error.endswith("ValueError: invalid literal for int() with base 10: 'x'")
    assert "n = int(input())" in result.error
    assert "harness" not in result.error
    assert attack(box, "import sys; sys.exit(3)").status == "crash"
    assert attack(box, "import sys; print('a'); sys.exit()").stdout == "a\n"


def test_large_inputs_and_outputs_pass(box):
    text = "line\n" * 10_000
    assert attack(box, "import sys; sys.stdout.write(sys.stdin.read())", stdin=text).stdout == text


def test_values_keep_their_types(box):
    values = [
        None,
        True,
        7,
        -(2**80),
        2.5,
        float("inf"),
        "é\ud800",
        (1, [2, {3: (4,)}]),
        {1, 2},
        b"\x00",
        1j,
        {"int": 1},
    ]
    with box.session("call", "def f(*args, **kwargs): return args, kwargs", "f") as session:
        result = session.call(*values, key={(1, 2): []})
    assert result.value == (tuple(values), {"key": {(1, 2): []}})
    assert [type(value) for value in result.value[0]] == list(map(type, values))


def test_what_is_not_data_does_not_come_out(box):
    with box.session("call", "def f(kind): return eval(kind)", "f") as session:
        for kind in ("object()", "iter([1])", "print", "[len]"):
            assert session.call(kind).status == "crash"
        assert session.call("int('9' * 4000) ** 3").value == int("9" * 4000) ** 3  # too long to print in decimal


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("while True: print('x' * 1000)", "output limit"),
        ("import os\nos.fork()\nwhile True: print('x' * 1000)", "output limit"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "timeout"),
        ("while True: pass", "timeout"),
        ("import signal as s\nfor n in {*range(1, 32)} - {9, 19}: s.signal(n, s.SIG_IGN)\nwhile 1: pass", "timeout"),
        ("import os; os.kill(os.getpid(), 11)", "crash"),
        ("import os; os.kill(os.getppid(), 9)", "crash"),
        ("import os; os.kill(-1, 9)", "crash"),
        ("import os; os.kill(1, 9); print(end='alive')", "ok"),
        ("import os; os._exit(0)", "ok"),
    ],
)  # fmt: skip
def test_how_programs_end(box, program, status):
    result = attack(box, program, seconds=3)
    assert result.status == status, result
    assert len(result.stdout) <= LIMITS["output_kb"] << 10


def test_the_same_program_prints_the_same(box):
    program = "print({'a', 'b', 'c', 'd', 'e', 'f'}, hash('x'))"
    assert attack(box, program).stdout == attack(box, program).stdout


def test_the_pool_uses_every_worker_and_keeps_order(box):
    both = threading.Barrier(2, timeout=30)

    def judge(item):
        with box.session("program", "print(input())") as session:
            if item < 2:
                both.wait()  # only passes while the other is running as well
            return session.test(str(item)).stdout

    assert box.map(judge, range(5)) == [f"{i}\n" for i in range(5)]


def test_after_the_batch_limit_nothing_is_begun(box, monkeypatch):
    monkeypatch.setattr(box.config, "batch_seconds", 0.2)
    began = []

    def judge(item):
        began.append(item)
        time.sleep(0.4)
        return item

    assert box.map(judge, range(6)) == [0, 1, None, None, None, None]
    assert sorted(began) == [0, 1]


def test_slots_come_back_whatever_happens(box):
    for _ in range(3 * box.workers):
        with pytest.raises(SessionEnded, match="SyntaxError"), box.session("program", "def"):
            pass
        with pytest.raises(RuntimeError, match="mine"), box.session("program", "1"):
            raise RuntimeError("mine")
    assert attack(box, "print(1)").stdout == "1\n"


def test_refuses_without_bubblewrap(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxUnavailable, match=r"bwrap was not found on PATH=/nowhere: install bubblewrap"):
        Sandbox(SandboxConfig())
    sandbox = Sandbox(SandboxConfig(allow_unsandboxed=True, memory_mb=256))
    assert "WITHOUT A SANDBOX" in caplog.text
    with sandbox.session(
        "program", "import os; print(os.getcwd(), 'SECRET' in os.environ, len(bytearray(9)))"
    ) as session:
        folder = Path(session.folder)
        assert session.test("").stdout == f"{folder} False 9\n"
        assert session.test("", 0.0).status == "timeout"
    assert not folder.exists()
    with sandbox.session("program", "x = bytearray(300 << 20)") as session:
        assert session.test("").status == "memory"


def test_refuses_where_the_kernel_refuses(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "bubblewrap 0.9.0" && exit\necho "no namespaces" >&2; exit 1\n'
    )
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SandboxUnavailable, match=r"could not be run: .*install bubblewrap"):
        Sandbox(SandboxConfig())
    broken.write_text("#!/bin/sh\necho bubblewrap 0.4.1\n")
    with pytest.raises(SandboxUnavailable, match=r"expected bubblewrap >= 0.8, got 'bubblewrap 0.4.1'"):
        Sandbox(SandboxConfig())


def test_a_missing_interpreter_is_named():
    with pytest.raises(ValueError, match=r"sandbox.python='/no/python' is not an executable"):
        Sandbox(SandboxConfig(python="/no/python"))
