"""Measure forward and backward on this machine's GPU: correctness against float64 first, then time, interleaved
over the ways to the same loss, and peak memory. Medians with the 20th and 80th percentile; warm-up is dropped.

Exit code 2 without a GPU. --dry runs the same path on the CPU with a tiny problem and interpreted kernels: it
checks this program and the kernels' results, and prints no times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from .origin import commit

EXAMPLES = """examples:
  python -m bench gpu --shape Llama-3-8B --out gpu.json
  python -m bench gpu --task logprobs --tokens 4096 --rounds 30
  python -m bench gpu --dry
"""
DRY_SHAPE = (12, 67, 16)  # N, V, H
CHECKED_TOKENS = 256
BOUND = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .roofline import SHAPES, N

    parser.add_argument("--task", nargs="+", choices=("divergence", "logprobs"), default=("divergence", "logprobs"))
    parser.add_argument("--shape", choices=tuple(SHAPES), default="Qwen3-8B")
    parser.add_argument("--tokens", type=int, default=N)
    parser.add_argument("--dtype", choices=tuple(BOUND), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20, help="measured runs of each provider")
    parser.add_argument("--warmup", type=int, default=3, help="runs dropped before them")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--dry", action="store_true", help="tiny problem on the CPU, kernels interpreted, no times")


def main(options: argparse.Namespace) -> int:
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    import torch

    if not options.dry and not torch.cuda.is_available():
        print(
            f"bench gpu: no GPU visible to torch {torch.__version__}; run it on a machine with one, or --dry to check "
            "the program on the CPU",
            file=sys.stderr,
        )
        return 2
    results = [row for task in options.task for row in run(task, options)]
    record = {"machine": machine(options.dry), "dry": options.dry, "dtype": options.dtype, "results": results}
    show(record)
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    wrong = [row for row in results if "errors" in row and max(row["errors"]) > BOUND[options.dtype]]
    for row in wrong:
        print(
            f"{row['task']} {row['provider']}: error {max(row['errors']):.2e} > {BOUND[options.dtype]}", file=sys.stderr
        )
    return 1 if wrong else 0


def run(task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a provider. Those with wrong results are not timed."""
    import torch

    from .measure import errors
    from .providers import ORACLE, PROVIDERS, Problem, missing, step_of
    from .roofline import SHAPES

    tokens, vocabulary, hidden = DRY_SHAPE if options.dry else (options.tokens, *SHAPES[options.shape])
    dtype = getattr(torch, options.dtype)
    problem = Problem.random(tokens, vocabulary, hidden, dtype, "cpu" if options.dry else "cuda")
    small = min(tokens, CHECKED_TOKENS)
    expected = step_of(ORACLE[task], problem.first(small, torch.float64))()
    rows, steps = [], {}
    for name, loss in PROVIDERS[task].items():
        row: dict[str, Any] = {
            "task": task,
            "provider": name,
            "tokens": tokens,
            "vocabulary": vocabulary,
            "hidden": hidden,
        }
        rows.append(row)
        reason = missing(name, options.dry)
        if reason is not None:
            row["skipped"] = reason
            continue
        row["errors"] = errors(step_of(loss, problem.first(small, dtype))(), expected)
        if max(row["errors"]) <= BOUND[options.dtype]:
            steps[name] = step_of(loss, problem)
    del expected
    measured = rehearse(steps) if options.dry else measure(steps, options.warmup, options.rounds)
    for row in rows:
        row.update(measured.get(row["provider"], {}))
    return rows


def rehearse(steps: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every step once; a dry run has no times."""
    for step in steps.values():
        step()
    return {name: {"median_ms": None} for name in steps}


def measure(steps: dict[str, Any], warmup: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Times by CUDA events, one step of each provider a round; peak memory above what the inputs take."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int] = {}
    for turn in range(warmup + rounds):
        for name, step in steps.items():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - before
            if turn >= warmup:
                times[name].append(begin.elapsed_time(end))
    return {name: spread(values) | {"peak_bytes": peaks[name]} for name, values in times.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in milliseconds."""
    if len(values) < 2:
        return {"median_ms": values[0], "p20_ms": values[0], "p80_ms": values[0]}
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median_ms": statistics.median(values), "p20_ms": fifths[0], "p80_ms": fifths[3]}


def machine(dry: bool) -> dict[str, Any]:
    import torch
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    if dry:
        return found | {"device": "CPU, kernels interpreted"}
    properties = torch.cuda.get_device_properties(0)
    return found | {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}


def show(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    where = record["machine"]
    note = "dry run: results checked, nothing timed" if record["dry"] else "measured"
    table = Table(title=f"{where['device']}, {record['dtype']}, commit {where['commit']}: {note}", title_justify="left")
    for column in ("task", "N x V x H", "provider", "median ms", "p20-p80", "peak GB", "error loss / dH / dW"):
        table.add_column(column)
    for row in record["results"]:
        table.add_row(*map(escape, cells(row)))
    Console().print(table)


def cells(row: dict[str, Any]) -> list[str]:
    shape = f"{row['tokens']} x {row['vocabulary']} x {row['hidden']}"
    first = [row["task"], shape, row["provider"]]
    if "skipped" in row:
        return [*first, "-", "-", "-", row["skipped"]]
    time = row.get("median_ms")
    timed = ["-"] * 2 if time is None else [f"{time:.2f}", f"{row['p20_ms']:.2f}-{row['p80_ms']:.2f}"]
    peak = f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "-"
    return [*first, *timed, peak, " / ".join(f"{value:.1e}" for value in row["errors"])]
