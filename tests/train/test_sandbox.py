"""The attack suite of the sandbox. Where that does no harm the same payload is also run without the sandbox, and
gets through: so each of these tests can fail. After every attack nothing of it runs any more."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mopd_train.config import SandboxConfig
from mopd_train.sandbox import Sandbox, SandboxUnavailable, SessionEnded

LIMITS = dict(seconds=20.0, completion_seconds=40.0, memory_mb=256, disk_mb=8, output_kb=64, processes=16, workers=2)


@pytest.fixture(scope="module")
def box():
    try:
        sandbox = Sandbox(SandboxConfig(**LIMITS))
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    yield sandbox
    sandbox.close()


@pytest.fixture
def bare(monkeypatch):
    """The control: the same program with the user's rights."""
    monkeypatch.setenv("PATH", "/nowhere")
    return Sandbox(SandboxConfig(allow_unsandboxed=True, **LIMITS))


def namespace_of(session):
    """Identity of the process namespace of a running sandbox, as the host sees it."""
    told = Path(f"/proc/self/fdinfo/{session.first}").read_text()
    pid = next(line.split()[1] for line in told.splitlines() if line.startswith("Pid:"))
    return os.readlink(f"/proc/{pid}/ns/pid")


def running_in(namespace):
    """Host ids of the processes in a namespace, dead ones not yet reaped by the host's init left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/ns/pid"):
        try:
            state = (path.parents[1] / "stat").read_text().rpartition(")")[2].split()[0]
            if os.readlink(path) == namespace and state != "Z":
                found.append(int(path.parts[2]))
        except OSError:  # ended meanwhile
            continue
    return found


def attack(box, program, seconds=None, stdin=""):
    with box.session("program", program) as session:
        namespace = namespace_of(session)
        assert running_in(namespace)
        result = session.test(stdin, seconds)
    assert running_in(namespace) == []
    return result


def unsandboxed(bare, program):
    with bare.session("program", program) as session:
        return session.test("")


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
    script = """
from mopd_train.config import SandboxConfig
from mopd_train.sandbox import Sandbox
with Sandbox(SandboxConfig(workers=1)).session("program", "import time; time.sleep(1000)") as session:
    print(open(f"/proc/self/fdinfo/{session.first}").read().split("Pid:")[1].split()[0], flush=True)
    session.test("", 600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    namespace = os.readlink(f"/proc/{int(parent.stdout.readline())}/ns/pid")
    assert running_in(namespace)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while running_in(namespace) and time.monotonic() < until:
        time.sleep(0.05)
    assert running_in(namespace) == []


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
