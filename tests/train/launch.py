"""Starting the command line as a user does: another process, from the repository root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """CPU without hub access; warnings of the interpreter's own are not this test's subject."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def mopd(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mopd_train", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mopd_train", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
