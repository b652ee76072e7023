"""Learning curves of methods and contexts on the embedded task with one rollout budget, several seeds each.

Every run is a `mopd train` in a process of its own. Finished runs are kept under --runs and not repeated, so it
can be stopped and called again. There is no larger model with the same tokenizer here: OPD's frozen teacher is the
student that GRPO trained with the first seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

from mopd_train.checkpoint import checkpoints

from .origin import commit, processor

EXAMPLES = """examples:
  python -m bench methods                               all methods, seeds 0 1 2: two hours on two cores
  python -m bench methods --only mopd-2s sdpo --seeds 0
  python -m bench methods --collect                     results file, table and plot of the runs that are there
"""
ROOT = Path(__file__).parents[1]
Runs = dict[str, tuple[str, list[str]]]  # name: what tables call it, arguments of `mopd train`
SUM = ["--config", str(ROOT / "examples/smollm2.yaml")]
SLOW = [*SUM, "--training.learning_rate", "1e-5"]
METHODS: Runs = {
    "grpo": ("GRPO", [*SLOW, "--method", "grpo"]),
    "mopd-2s": ("MOPD 2s", SLOW),
    "mopd-2s-fast": ("MOPD 2s, lr 4e-5 (make train)", SUM),
    "mopd-2s1f": ("MOPD 2s1f", [*SLOW, "--context.context", "2s1f"]),
    "mopd-2s1f-bare": (
        "MOPD 2s1f, failure marked by one word",
        [*SLOW, "--context.context", "2s1f", "--context.failure_template", "\nWrong: {text}"],
    ),
    "sdpo": ("SDPO", [*SLOW, "--method", "sdpo"]),
    "opd": ("OPD, trained teacher", [*SLOW, "--method", "opd", "--distillation.teacher_regularization", "frozen"]),
}
TEACHER_OF_OPD = "grpo-0"
FINISHED = "evaluation-after.json"  # the last thing that a run writes
COLORS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#999999", "#CC79A7", "#E69F00")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, "methods", METHODS, seeds=[0, 1, 2])


def add_runs(parser: argparse.ArgumentParser, name: str, table: Runs, seeds: list[int]) -> None:
    parser.add_argument("--only", nargs="+", choices=table, default=list(table), help="these runs (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / name, help="where runs are kept")
    parser.add_argument("--collect", action="store_true", help="start no run")
    parser.add_argument("--out", type=Path, default=ROOT / f"bench/results/{name}.json", help="results file")
    parser.add_argument("--plot", type=Path, default=ROOT / f"docs/img/{name}.png")
    parser.set_defaults(table=table)


def main(options: argparse.Namespace) -> int:
    table: Runs = options.table
    if not options.collect:
        for seed in options.seeds:
            for name in options.only:
                train(name, seed, options)
    runs = {
        name: [found for seed in options.seeds if (found := collected(options.runs / f"{name}-{seed}"))]
        for name in options.only
    }
    runs = {name: found for name, found in runs.items() if found}
    if not runs:
        raise FileNotFoundError(f"{options.runs} holds no finished run of {options.only}, seeds {options.seeds}")
    record = {"when": str(date.today()), "cpu": processor(), "runs": runs}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    labels = {name: table[name][0] for name in runs}
    plot(runs, labels, options.plot)
    print(markdown(runs, labels))
    return 0


def train(name: str, seed: int, options: argparse.Namespace) -> None:
    """One run, unless it is there already; what it used at its peak is kept beside it."""
    folder = options.runs / f"{name}-{seed}"
    if collected(folder):
        return
    arguments = options.table[name][1]
    if name == "opd":
        found = checkpoints(options.runs / TEACHER_OF_OPD)
        if not found:
            raise FileNotFoundError(
                f"{options.runs / TEACHER_OF_OPD} has no checkpoint for OPD's teacher: run grpo first"
            )
        arguments = [*arguments, "--distillation.teacher_model_name_or_path", str(found[-1])]
    command = [sys.executable, "-m", "mopd_train", "train", *arguments, "--training.output_dir", str(folder),
               "--training.seed", str(seed), "--training.overwrite_output_dir", "true"]  # fmt: skip
    process = os.spawnv(os.P_NOWAIT, command[0], command)
    _, status, usage = os.wait4(process, 0)
    if status != 0 or not (folder / FINISHED).is_file():  # a run that was told to stop ends with 0
        raise RuntimeError(f"{' '.join(command)} ended with status {status} before it was done")
    (folder / "usage.json").write_text(json.dumps({"peak_bytes": usage.ru_maxrss << 10, "commit": commit()}))
    if folder.name != TEACHER_OF_OPD:
        for path in checkpoints(folder):  # 2 GB a run
            shutil.rmtree(path)


def collected(folder: Path) -> dict[str, Any] | None:
    """Curve, held-out scores, time and memory of a finished run; None where it has not finished."""
    if not all((folder / name).is_file() for name in ("usage.json", FINISHED)):
        return None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = (json.loads((folder / f"evaluation-{when}.json").read_text()) for when in ("before", "after"))
    seconds = [sum(value for key, value in row.items() if key.startswith("time/")) for row in rows]
    return {
        "seed": json.loads((folder / "run.json").read_text())["training"]["seed"],
        "reward": [row["reward"] for row in rows],
        "mean_at_k": [before["mean_at_k"], after["mean_at_k"]],
        "pass_at_k": [before["pass_at_k"], after["pass_at_k"]],
        "completion_length": [before["completion_length"], after["completion_length"]],
        "seconds_per_step": statistics.median(seconds),
        **json.loads((folder / "usage.json").read_text()),
    }


def markdown(runs: dict[str, list[dict[str, Any]]], labels: dict[str, str]) -> str:
    lines = [
        "| run | seeds | mean@8 before | mean@8 after, each seed | mean | pass@8 after, each seed | s/step | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        after = [run["mean_at_k"][1] for run in found]
        passed = [run["pass_at_k"][1] for run in found]
        peaks = [run["peak_bytes"] for run in found if run["peak_bytes"] is not None]
        peak = f"{max(peaks) / 1e9:.1f} GB" if peaks else "not measured"
        lines.append(
            f"| {labels[name]} | {len(found)} | {found[0]['mean_at_k'][0]:.3f} | {listed(after)} "
            f"| **{statistics.mean(after):.3f}** | {listed(passed)} "
            f"| {statistics.median(run['seconds_per_step'] for run in found):.1f} "
            f"| {peak} |"
        )
    return "\n".join(lines)


def listed(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def plot(runs: dict[str, list[dict[str, Any]]], labels: dict[str, str], path: Path) -> None:
    """Mean reward of the rollouts of each step, averaged over seeds, with the range of the seeds; and held-out ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    curve, ends = figure.subplots(1, 2, width_ratios=(2, 1))
    for color, (name, found) in zip(COLORS, runs.items(), strict=False):
        rewards = list(zip(*(smooth(run["reward"]) for run in found), strict=True))
        steps = range(1, len(rewards) + 1)
        curve.plot(steps, [statistics.mean(row) for row in rewards], color=color, label=labels[name])
        curve.fill_between(steps, [min(row) for row in rewards], [max(row) for row in rewards], color=color, alpha=0.15)
    for place, found in enumerate(runs.values()):
        for run in found:
            ends.plot([place - 0.1, place + 0.1], run["mean_at_k"], "-o", color=COLORS[place], markersize=3, alpha=0.7)
    curve.set(xlabel="step", ylabel="mean reward of the rollouts (3-step mean)", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=4 if len(runs) > 4 else 2, fontsize=8)
    ends.set(ylabel="held-out mean@8, before and after", ylim=(0, 1), xticks=range(len(runs)))
    ends.set_xticklabels(runs, rotation=30, ha="right", fontsize=8)
    for axes in (curve, ends):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def smooth(values: list[float]) -> list[float]:
    """Mean of up to three steps that end here: a step's 8 prompts make a noisy reward."""
    return [statistics.mean(values[max(0, i - 2) : i + 1]) for i in range(len(values))]
