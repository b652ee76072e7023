"""What running untrusted code apart costs: a sandbox session against the same program started plainly, and the pool.

A session starts, loads a program that prints its input, runs one test and ends with every process in it gone. The plain
program is the sandbox's own Python without any protection. Both by turns in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from .origin import commit, processor

EXAMPLES = """examples:
  python -m bench sandbox               seconds; on a quiet machine, as the pool uses every core
  python -m bench sandbox --runs 100
"""
RESULTS = Path(__file__).parents[1] / "bench/results/sandbox.json"
GOAL_MS = 80
PROGRAM = "print(input())"
FUNCTION = "def same(x): return x"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=40, help="sessions")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")


def main(options: argparse.Namespace) -> int:
    from mopd_train.config import SandboxConfig
    from mopd_train.sandbox import Sandbox

    box = Sandbox(SandboxConfig(memory_mb=256))

    def session(_: int = 0) -> None:
        with box.session("program", PROGRAM) as run:
            expect(run.test("1").stdout.strip(), "1")

    def plain() -> None:
        done = subprocess.run([box.python, "-s", "-B", "-c", PROGRAM], input="1", text=True, capture_output=True)
        expect(done.stdout.strip(), "1")

    times: dict[str, list[float]] = {"session": [], "plain Python": []}
    for way in (session, plain):
        way()  # the first of each reads from disk
    for _ in range(options.runs):
        times["session"].append(timed(session))
        times["plain Python"].append(timed(plain))
    with box.session("program", PROGRAM) as program:
        times["further test of a session"] = [timed(lambda: program.test("1")) for _ in range(options.runs)]
    with box.session("call", FUNCTION, "same") as function:
        times["further call of a session"] = [timed(lambda: function.call(1)) for _ in range(options.runs)]
    pool = timed(lambda: box.map(session, range(options.runs)))
    record: dict[str, Any] = {
        "when": str(date.today()), "commit": commit(), "cpu": processor(), "runs": options.runs,
        "milliseconds": {name: spread(seconds) for name, seconds in times.items()},
        "runs_per_second": {"one after another": options.runs / sum(times["session"]), "pool": options.runs / pool},
        "workers": box.workers,
    }  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(record))
    return 0


def expect(found: str, wanted: str) -> None:
    if found != wanted:
        raise RuntimeError(f"the program answered {found!r} instead of {wanted!r}: nothing was measured")


def timed(way: Callable[[], Any]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": 1e3 * statistics.median(seconds), "least": 1e3 * min(seconds), "most": 1e3 * max(seconds)}


def markdown(record: dict[str, Any]) -> str:
    lines = ["| | median | least | most |", "|---|---|---|---|"]
    for name, found in record["milliseconds"].items():
        lines.append(f"| {name} | " + " | ".join(f"{found[key]:.3g} ms" for key in ("median", "least", "most")) + " |")
    rates = record["runs_per_second"]
    return "\n".join([
        *lines, "",
        f"Sessions a second: {rates['one after another']:.1f} one after another, {rates['pool']:.1f} by the pool of "
        f"{record['workers']}. Goal: a session within {GOAL_MS} ms.",
    ])  # fmt: skip
