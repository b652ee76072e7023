"""The command line that cuts a process off: bubblewrap, a user of its own, and where writable a cgroup."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

LEAST_BUBBLEWRAP = (0, 8)  # --disable-userns
REMEDY = (
    "install bubblewrap >= 0.8 (apt install bubblewrap, dnf install bubblewrap), or run models' code as your own user "
    "with --sandbox.allow_unsandboxed true: it can then read and delete your files and use the network"
)
FIRST_UID = 60578  # systemd's table of user ids leaves 60578-60705 unassigned
MOUNT = Path("/sys/fs/cgroup")


class SandboxUnavailable(RuntimeError):
    """No sandbox can be made here; the message names the remedy."""


def find_bubblewrap() -> str:
    path = shutil.which("bwrap")
    if path is None:
        raise SandboxUnavailable(f"bwrap was not found on PATH={os.environ.get('PATH', '')}: {REMEDY}")
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    if found is None or tuple(map(int, found.groups())) < LEAST_BUBBLEWRAP:
        raise SandboxUnavailable(f"expected bubblewrap >= 0.8, got {text.strip()!r} at {path}: {REMEDY}")
    return path


def find_python(configured: str | None) -> str:
    """The interpreter inside. A system Python starts several times faster than a pyenv shim and lies in /usr, which
    is mounted anyway."""
    if configured is not None:
        if not os.access(configured, os.X_OK):
            raise ValueError(f"sandbox.python={configured!r} is not an executable file")
        return os.path.realpath(configured)
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.access(path, os.X_OK):
            return path
    raise SandboxUnavailable(
        "no Python was found in /usr/bin or /usr/local/bin to run code with: install python3 or set --sandbox.python"
    )


def bubblewrap_command(bubblewrap: str, python: str, disk_bytes: int, info: int) -> list[str]:
    """An empty root with /usr to read and a /tmp of `disk_bytes` to write. No /proc, no network, no environment, no
    capabilities, no new user namespaces; all of it ends with its first process, and that one with ours.

    As root the user changes first: uid 0 would be exempt from the limit on processes.
    """
    command = [bubblewrap, "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--uid", "1000", "--gid", "1000"]
    command += ["--ro-bind", "/usr", "/usr"]
    for folder in ("lib", "lib32", "lib64", "bin"):
        if Path("/", folder).is_dir():
            command += ["--symlink", f"usr/{folder}", f"/{folder}"]
    if not python.startswith("/usr/"):
        prefix = str(Path(python).parent.parent)
        command += ["--ro-bind", prefix, prefix]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    command += ["--size", str(disk_bytes), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*command, "--info-fd", str(info), "--"]


def as_user(uid: int) -> list[str]:
    """Drops root, before bubblewrap; nothing where we are not root."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs", "--"]


class Cgroup:
    """Totals over all processes of a sandbox. Rlimits are per process: thirty of them may take thirty times as much."""

    def __init__(self, name: str, memory_bytes: int, processes: int) -> None:
        """OSError where no group can be made."""
        self.folders: list[Path] = []
        try:
            for parent, limits in _parents(memory_bytes, processes):
                folder = parent / name
                folder.mkdir()
                self.folders.append(folder)
                for file, value in limits.items():
                    # Opened for writing only: a missing file means that the controller is not ours to use.
                    descriptor = os.open(folder / file, os.O_WRONLY)
                    with os.fdopen(descriptor, "w") as handle:
                        handle.write(str(value))
        except OSError:
            self.remove()
            raise

    def entering(self) -> list[str]:
        """Joins the group before anything else is started, so that no child is outside."""
        script = 'while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs" || exit 125; shift; done; shift; exec "$@"'
        return ["/bin/sh", "-c", script, "sh", *map(str, self.folders), "--"]

    def kills(self) -> int:
        """How often the kernel killed a process here for memory."""
        for folder in self.folders:
            for name in ("memory.events", "memory.oom_control"):  # v2, v1
                if (folder / name).is_file():
                    found = re.search(r"^oom_kill (\d+)", (folder / name).read_text(), re.MULTILINE)
                    return int(found[1]) if found else 0
        return 0

    def remove(self) -> None:
        for folder in self.folders:
            with contextlib.suppress(OSError):  # gone, or its last process is still being reaped
                folder.rmdir()


def remove_stale() -> None:
    """Empty groups of processes that were killed before they could remove their own."""
    for parent, _ in _parents(0, 0):
        for folder in parent.glob("mopd-*-*"):
            if not Path("/proc", folder.name.split("-")[1]).exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _parents(memory_bytes: int, processes: int) -> list[tuple[Path, dict[str, int]]]:
    """Folders in which this process may make groups, and the files that limit them: one of version 2, or one per
    controller of version 1."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update({controller: path.lstrip("/") for controller in controllers.split(",")})
    if "memory" in own and "pids" in own:
        memory = {"memory.limit_in_bytes": memory_bytes}
        return [(MOUNT / "memory" / own["memory"], memory), (MOUNT / "pids" / own["pids"], {"pids.max": processes})]
    return [(MOUNT / own[""], {"memory.max": memory_bytes, "memory.swap.max": 0, "pids.max": processes})]
