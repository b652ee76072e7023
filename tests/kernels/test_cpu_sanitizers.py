"""The C++ kernels fuzzed under the address and undefined-behaviour sanitizers, on buffers without a spare byte."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc_ref"
ROUNDS, SEED = 80, 20260512


def missing(folder: Path) -> str | None:
    """Why the fuzz program cannot be built here."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which("cmake") is None:
        return "no C++ compiler or no cmake"
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    command = [compiler, "-fsanitize=address,undefined", str(probe), "-o", str(folder / "probe")]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else f"{compiler} has no sanitizers: {done.stderr[:200]}"


def test_fuzz_under_sanitizers(tmp_path):
    if reason := missing(tmp_path):
        pytest.skip(reason)
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", SOURCE, "-B", build, "-DMOPD_SANITIZE=ON"],
        ["cmake", "--build", build, "--target", "mopd_fuzz", "-j2"],
        [build / "mopd_fuzz", str(ROUNDS), str(SEED)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout[-1000:]} {done.stderr[-3000:]}"
    assert f"levels, {ROUNDS} rounds each" in done.stdout
