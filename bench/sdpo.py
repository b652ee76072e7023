"""A training step of SDPO by this trainer and by TRL's SDPO trainer: time by phase and peak memory.

Same model (SmolLM2-135M, float32), prompts (8 a step, 8 rollouts each), temperature, EMA teacher, context (one right
answer after the prompt), full-vocabulary reverse KL, micro-batch and optimizer. Each runs in processes of its own, by
turns. Rollouts are drawn by each trainer itself, so a step's time is also divided by the tokens it sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from .origin import commit, processor

EXAMPLES = """examples:
  python -m bench sdpo                        a quarter of an hour on two quiet cores; needs the bench extra (trl)
  python -m bench sdpo --steps 2 --rounds 1   shorter
"""
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/sdpo.json"
GOALS = {"time of a step": 0.5, "peak memory above the weights": 0.5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=3, help="measured steps a process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each trainer")
    parser.add_argument("--batch", type=int, default=16, help="rollouts a forward and backward")
    parser.add_argument("--length", type=int, default=64, help="most tokens a rollout")
    parser.add_argument("--model", help="folder of another model (the embedded SmolLM2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file")


def main(options: argparse.Namespace) -> int:
    from rich.console import Console

    from mopd_train.models import embedded_model

    model = options.model or str(embedded_model())
    found: dict[str, list[dict[str, Any]]] = {"trl": [], "ours": []}
    for turn in range(options.rounds):
        for way in ("trl", "ours") if turn % 2 == 0 else ("ours", "trl"):
            found[way].append(one(way, model, options))
    record = {
        "when": str(date.today()), "commit": commit(), "cpu": processor(),
        "batch": options.batch, "length": options.length,
        **{way: summary(runs) for way, runs in found.items()},
    }  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    Console().print(markdown(record), highlight=False)
    return 0


def one(way: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        sizes = map(str, (options.steps, options.batch, options.length))
        command = [sys.executable, "-m", "bench.sdpo_worker", way, model, *sizes, folder]
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-1000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over all steps; the largest peak."""
    steps = [step for run in runs for step in run["steps"]]
    phases = {name: statistics.median(step["phases"].get(name, 0.0) for step in steps) for name in steps[0]["phases"]}
    seconds = [step["seconds"] for step in steps]
    return {
        "seconds": statistics.median(seconds),
        "range": [min(seconds), max(seconds)],
        "ms_per_token": statistics.median(1e3 * step["seconds"] / step["tokens"] for step in steps),
        "tokens": statistics.median(step["tokens"] for step in steps),
        "phases": phases,
        "extra_bytes": max(run["extra_bytes"] for run in runs),
        "state_bytes": runs[0]["state_bytes"],
    }


def markdown(record: dict[str, Any]) -> str:
    ours, theirs = record["ours"], record["trl"]

    def line(name: str, key: str, scale: float, unit: str) -> str:
        return (
            f"| {name} | {theirs[key] * scale:.3g} {unit} | {ours[key] * scale:.3g} {unit} "
            f"| {ours[key] / theirs[key]:.2f} |"
        )

    rows = [
        "| | TRL | mopd | ratio |",
        "|---|---|---|---|",
        line("step", "seconds", 1, "s"),
        line("step, per sampled token", "ms_per_token", 1, "ms"),
        line("sampled tokens a step", "tokens", 1, ""),
        line("peak memory above both models' weights", "extra_bytes", 1e-9, "GB"),
    ]
    beyond = [way["extra_bytes"] - way["state_bytes"] for way in (theirs, ours)]
    rows.append(
        f"| the same without gradients and Adam moments | {beyond[0] / 1e9:.3g} GB | {beyond[1] / 1e9:.3g} GB "
        f"| {beyond[1] / beyond[0]:.2f} |"
    )
    phases = [
        f"{title}: " + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in way["phases"].items())
        for title, way in (("TRL", theirs), ("mopd", ours))
    ]
    return "\n".join([*rows, "", *phases])
