"""The attack suite of the sandbox. Where that does no harm the same payload is also run without the sandbox, and
gets through: so each of these tests can fail. After every attack nothing of it runs any more."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from tests.train.sandboxes import LIMITS, attack, namespace_of, running_in, unsandboxed

CONNECT = """
import socket
for family, address in {addresses!r}:
    with socket.socket(family) as s:
        s.settimeout(5)
        try:
            s.connect(address)
            print("connected")
        except OSError as error:
            print(type(error).__name__)
"""


def test_no_network(box, bare):
    tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    name = f"\0mopd-{os.getpid()}"  # abstract: reached without any file
    unix.bind(name)
    unix.listen()
    with tcp, unix:
        program = CONNECT.replace("{addresses!r}", repr([(2, tcp.getsockname()), (1, name)]))
        assert unsandboxed(bare, program).stdout.split() == ["connected", "connected"]
        assert attack(box, program).stdout.split() == ["ConnectionRefusedError", "ConnectionRefusedError"]


READ = """
import os
for path in {paths!r}:
    try:
        found = open(path, "rb").read(1) if not os.path.isdir(path) else os.listdir(path)
        print("read", path)
    except OSError as error:
        print(type(error).__name__)
"""


def test_no_files_outside(box, bare, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("expected answers")
    paths = [str(secret), "/etc/passwd", str(Path.home()), f"/proc/{os.getpid()}/environ", "/proc/1/environ", "/tmp/.."]
    program = READ.replace("{paths!r}", repr(paths))
    outside = unsandboxed(bare, program).stdout
    assert f"read {secret}" in outside
    assert "read /etc/passwd" in outside
    assert set(attack(box, program).stdout.split("\n")[:-2]) == {"FileNotFoundError"}
    assert "root" not in attack(box, "import os; print(os.listdir('/'))").stdout


def test_no_environment(box, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "hunter2")
    for program in ("import os; print(dict(os.environ))", "import subprocess; subprocess.run('/usr/bin/env')"):
        printed = attack(box, program).stdout
        assert "HOME" in printed
        assert "hunter2" not in printed


def test_runs_do_not_see_each_other(box):
    program = "import os; open('/tmp/' + input(), 'w'); print(sorted(os.listdir('/tmp')))"
    with box.session("program", program) as one, box.session("program", program) as two:
        assert one.test("a").stdout == "['a']\n"
        assert one.test("b").stdout == "['a', 'b']\n"  # tests of one completion share a folder
        assert two.test("c").stdout == "['c']\n"
        assert namespace_of(one) != namespace_of(two)


def test_no_writes_outside(box, bare, tmp_path):
    name = f"mopd-escape-{os.getpid()}"
    folders = [str(tmp_path), "/", "/usr", "/usr/lib", "/lib", "/dev", "/tmp"]
    program = f"""
for folder in {folders!r}:
    try:
        open(folder + "/{name}", "w").close()
        print(folder)
    except OSError:
        pass
"""
    assert attack(box, program).stdout.split() == ["/tmp"]
    assert not Path("/tmp", name).exists()
    assert str(tmp_path) in unsandboxed(bare, program.replace(repr(folders), repr(folders[:1]))).stdout


COUNT_FORKS = """
import os, time
count = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(1000)
        count += 1
except OSError:
    print(count)
"""


def test_fork_bombs_are_bounded_and_leave_nothing(box):
    assert 1 <= int(attack(box, COUNT_FORKS).stdout) < LIMITS["processes"]
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert attack(box, bomb, seconds=2).status == "timeout"
    assert 1 <= int(attack(box, COUNT_FORKS).stdout) < LIMITS["processes"]  # the next run starts from nothing


def test_memory_bombs(box):
    assert attack(box, "x = bytearray(200 << 20)\nprint(len(x))").status == "ok"
    for bomb in ("x = bytearray(300 << 20)", "x = []\nwhile True: x.append(bytearray(1 << 20))"):
        result = attack(box, bomb)
        assert (result.status, result.error.rpartition("\n")[2]) == ("memory", "MemoryError")
    with box.session("call", "def f(n): return len(bytearray(n << 20))", "f") as session:
        assert session.call(300).status == "memory"
        assert session.call(1).value == 1 << 20


MANY_EATERS = """
import os, time
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        eaten = bytearray(b"x") * (150 << 20)
        time.sleep(3)
        os._exit(0)
    children.append(child)
print(sum(os.waitpid(child, 0)[1] == 0 for child in children))
"""


def test_memory_of_all_processes_is_bounded(box):
    slot = box.slots.get()
    box.slots.put(slot)
    if slot.cgroup is None:
        pytest.skip("no cgroup can be made here: memory is limited per process")
    result = attack(box, MANY_EATERS)  # 8 x 150 MB in a group of 256 MB
    assert result.status in ("memory", "crash") or int(result.stdout) < 8


def test_disk_fill(box):
    program = """
import errno, os
written = 0
try:
    for name in range(100):
        with open(f"/tmp/{name}", "wb", buffering=0) as handle:
            for _ in range(4):
                written += handle.write(bytes(1 << 20))
except OSError as error:
    print(errno.errorcode[error.errno], written >> 20)
"""
    name, megabytes = attack(box, program).stdout.split()
    assert (name, int(megabytes) in (7, 8)) == ("ENOSPC", True)


def test_orphans_end_with_the_run_and_do_not_delay_it(box):
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)  # holds standard output open
    os._exit(0)
print("done")
"""
    with box.session("program", program) as session:
        namespace = namespace_of(session)
        before = len(running_in(namespace))
        assert session.test("").stdout == "done\n"
        assert len(running_in(namespace)) > before  # it does run until the end
    assert running_in(namespace) == []


def test_processes_of_the_host_cannot_be_signalled(box):
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        program = f"import os\ntry: os.kill({victim.pid}, 9)\nexcept OSError as e: print(type(e).__name__)"
        assert attack(box, program).stdout == "ProcessLookupError\n"
        assert victim.poll() is None
        subprocess.run([sys.executable, "-c", program], check=True)
        assert victim.wait() == -signal.SIGKILL  # the control
    finally:
        victim.kill()
        victim.wait()


def test_no_rights_and_none_to_be_had(box):
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(os.getuid(), libc.unshare(0x10000000), libc.mount(b"x", b"/tmp", b"tmpfs", 0, None), libc.setuid(0))
"""
    assert attack(box, program).stdout.split() == ["1000", "-1", "-1", "-1"]


def test_a_killed_trainer_leaves_nothing(box):
    told, tell = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child only starts a program
        trainer = os.fork()
    if trainer == 0:
        try:
            with box.session("program", "import time; time.sleep(1000)") as session:
                os.write(tell, namespace_of(session).encode())
                session.test("", 600)
        finally:
            os._exit(1)
    namespace = os.read(told, 100).decode()
    assert running_in(namespace)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    os.close(told)
    os.close(tell)
    until = time.monotonic() + 20
    while running_in(namespace) and time.monotonic() < until:
        time.sleep(0.05)
    assert running_in(namespace) == []
