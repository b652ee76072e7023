"""A sandbox for tests, what runs in it as the host sees it, and the same without one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mopd_train.config import SandboxConfig
from mopd_train.sandbox import Sandbox, SandboxUnavailable

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
