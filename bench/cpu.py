"""Measure this machine's CPU: ours against the plain GEMMs that any exact answer needs, and against what users have
today. A provider that disagrees with float64 is reported as wrong and not timed. Runs are interleaved, the first round
is dropped; medians with quartiles. Peak memory is measured in a process of its own for each provider."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .origin import commit, processor

EXAMPLES = """examples:
  python -m bench cpu --quick
  python -m bench cpu --case smollm2 --case "smollm2, JSD" --rounds 9
  python -m bench cpu --docs                   # the full run (25 minutes), then results, plots and docs/performance.md
  python -m bench cpu --filters                # error against speed of grad_filter on real hidden states
  python -m bench cpu --quick --base main~3    # this checkout against another commit, runs interleaved
"""
RESULTS = Path(__file__).parent / "results"
SCALING_N, SCALING_V = (256, 512, 1024), (12288, 24576, 49152)
FILTERS = (1e-7, 3e-7, 1e-6, 1e-5, 1e-4)
OURS = ("ours, exact", "ours, filter 1e-6")
PHASES = {"ours, exact": ("cpu", 0.0), "ours, filter 1e-6": ("cpu", 1e-6), "ours, eager backend": ("eager", 0.0)}
MAIN = "smollm2"  # all providers, phases and growth
MEMORY = (MAIN, "smollm2, top-100", "smollm2, scoring")
SLOW = ("Liger, chunk 64", "Liger, chunk 256", "Liger, chunk 1024", "TRL chunked", "ours, filter 1e-7")  # MAIN only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .cases import CASES
    from .peers import PROVIDERS

    parser.add_argument("--quick", action="store_true", help="fewer tokens and providers, under three minutes")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="only these cases")
    parser.add_argument("--provider", action="append", choices=tuple(PROVIDERS), help="only these providers")
    parser.add_argument("--rounds", type=int, help="timed rounds (7 of smollm2, else 5; quick 3)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory processes")
    parser.add_argument("--filters", action="store_true", help="error against speed of grad_filter, instead of cases")
    parser.add_argument("--base", metavar="REV", help="compare ours with that commit's, instead of all providers")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--docs", action="store_true", help="write bench/results, docs/img and docs/performance.md")


def main(options: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of one library starve another's
    from . import report
    from .cases import CASES, QUICK

    cases = QUICK if options.quick else CASES
    if options.case:
        cases = {name: case for name, case in cases.items() if name in options.case}
    if options.base:
        return compare(options, cases)
    record: dict[str, Any] = {"machine": machine(), "quick": options.quick}
    if options.filters:
        record["filters"] = filters(options)
    else:
        record["cases"] = [run(name, case, options) for name, case in cases.items()]
        whole = MAIN in cases and not options.quick and not options.provider
        record["scaling"] = [scaling(name, options) for name in OURS if whole]
        record["phases"] = phases(options) if whole else []
    report.show(record)
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    if options.docs:
        report.write(record, RESULTS)
    wrong = [row for case in record.get("cases", []) for row in case["rows"] if row.get("wrong")]
    return 1 if wrong else 0


def run(name: str, case: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Errors, times and memory of every provider that serves the case."""
    from .cases import inputs
    from .measure import errors, interleaved, oracle
    from .peers import floor

    drawn = inputs(case)
    expected = oracle(case, drawn)
    rows, steps = [], {}
    for provider_name, provider in chosen(name, case, options).items():
        row: dict[str, Any] = {"provider": provider_name, "approximate": provider.approximate}
        rows.append(row)
        try:
            step = provider.build(case, drawn)
            row["errors"] = errors(step(), expected)
        except (ImportError, OSError) as error:
            row["skipped"] = str(error)
            continue
        row["wrong"] = not max(row["errors"]) <= provider.bound
        if not row["wrong"]:
            steps[provider_name] = step
    del expected
    rounds = options.rounds or (3 if options.quick else 7 if name == MAIN else 5)
    timed = interleaved({"floor": floor(case, drawn), **steps}, rounds)
    for row in rows:
        row.update(timed.get(row["provider"], {}))
        if row["provider"] in steps and name in MEMORY and not options.no_memory:
            row.update(memory(name, row["provider"], options.quick))
    return {"name": name, **asdict(case), "floor": timed["floor"], "rows": rows}


def chosen(name: str, case: Any, options: argparse.Namespace) -> dict[str, Any]:
    from .peers import PROVIDERS

    every = name == MAIN and not options.quick
    names = options.provider or [provider for provider in PROVIDERS if every or provider not in SLOW]
    return {provider: PROVIDERS[provider] for provider in names if case.task in PROVIDERS[provider].tasks}


def memory(case: str, provider: str, quick: bool) -> dict[str, int]:
    command = [sys.executable, "-m", "bench.worker", case, provider, "1" if quick else "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def scaling(provider: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times over N at full V and over V at full N, and the fitted exponents."""
    from .cases import REAL, inputs
    from .measure import exponent, interleaved
    from .peers import PROVIDERS

    drawn = inputs(REAL)
    sizes = [(N, REAL.V) for N in SCALING_N] + [(REAL.N, V) for V in SCALING_V[:-1]]
    steps = {}
    for N, V in sizes:
        case = replace(REAL, N=N, V=V)
        steps[f"{N},{V}"] = PROVIDERS[provider].build(case, drawn.cut(N, V))
    timed = interleaved(steps, options.rounds or 5)
    times = {size: timed[f"{size[0]},{size[1]}"] for size in sizes}
    result: dict[str, Any] = {"provider": provider, "N": [], "V": []}
    for clock in ("seconds", "cpu_seconds"):
        over_n = [times[N, REAL.V][clock]["median"] for N in SCALING_N]
        over_v = [times[REAL.N, V][clock]["median"] for V in SCALING_V]
        result["N"].append([*over_n, exponent(list(SCALING_N), over_n)])
        result["V"].append([*over_v, exponent(list(SCALING_V), over_v)])
    return result


def phases(options: argparse.Namespace) -> list[dict[str, Any]]:
    from .cases import REAL, inputs
    from .phases import profile

    drawn, rounds = inputs(REAL), options.rounds or 5
    return [{"provider": name, "phases": profile(REAL, drawn, *how, rounds=rounds)} for name, how in PHASES.items()]


def filters(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Kept entries, error and time of each threshold and loss, against exact gradients and plain GEMMs."""
    from .cases import REAL, inputs
    from .measure import errors, interleaved, oracle
    from .peers import floor, ours

    rows = []
    for alpha in (0.0, 0.5, 1.0):
        case = replace(REAL, alpha=alpha, N=384 if options.quick else REAL.N)
        drawn = inputs(case)
        expected = oracle(case, drawn)
        steps = {eps: ours("cpu", eps)(case, drawn) for eps in (0.0, *FILTERS)}
        found = {eps: errors(step(), expected) for eps, step in steps.items()}
        timed = interleaved({"floor": floor(case, drawn), **{str(eps): step for eps, step in steps.items()}}, 5)
        for eps in steps:
            base, own = timed["floor"], timed[str(eps)]
            ratios = {clock: own[clock]["median"] / base[clock]["median"] for clock in ("seconds", "cpu_seconds")}
            rows.append({"alpha": alpha, "filter": eps, "errors": found[eps], **ratios})
    return rows


def compare(options: argparse.Namespace, cases: dict[str, Any]) -> int:
    """Ours of this checkout and of --base in two processes, runs in turn."""
    here = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        base = Path(folder) / "base"
        subprocess.run(["git", "-C", here, "worktree", "add", "--detach", "-q", base, options.base], check=True)
        stack.callback(subprocess.run, ["git", "-C", here, "worktree", "remove", "--force", base], check=True)
        build(base)
        for case in cases:
            for provider in OURS if cases[case].task == "divergence" else OURS[:1]:
                times = alternate([here, base], case, provider, options)
                report_pair(case, provider, options.base, times)
    return 0


def build(checkout: Path) -> None:
    """The C++ kernels of a checkout, where it has them."""
    if (checkout / "csrc_ref" / "CMakeLists.txt").is_file():
        for command in (["-S", checkout / "csrc_ref", "-B", checkout / "build"], ["--build", checkout / "build"]):
            subprocess.run(["cmake", *command], check=True, stdout=subprocess.DEVNULL)


def alternate(checkouts: list[Path], case: str, provider: str, options: argparse.Namespace) -> list[list[float]]:
    command = [sys.executable, "-m", "bench.worker", case, provider, "1" if options.quick else "0"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen([*command, str(path)], cwd=Path(__file__).parents[1], **pipes))
            for path in checkouts
        ]
        times: list[list[float]] = [[] for _ in processes]
        for turn in range((options.rounds or 7) + 1):
            for process, own in zip(processes, times, strict=True):
                process.stdin.write("\n")
                process.stdin.flush()
                seconds = json.loads(process.stdout.readline())
                if turn > 0:
                    own.append(seconds)
        return times


def report_pair(case: str, provider: str, base: str, times: list[list[float]]) -> None:
    from .measure import spread

    ours, theirs = (spread(values) for values in times)
    ratio = ours["median"] / theirs["median"]
    inside = ours["low"] <= theirs["high"] and theirs["low"] <= ours["high"]
    verdict = "within the spread" if inside else "slower" if ratio > 1 else "faster"
    print(f"{case}, {provider}: {ours['median']:.3f} s, {base}: {theirs['median']:.3f} s, ratio {ratio:.3f}, {verdict}")


def machine() -> dict[str, Any]:
    import torch

    from mopd_kernels import backends

    backend = backends.pick(None, torch.empty(0))
    level = backend.levels()[-1] if hasattr(backend, "levels") else "eager backend"
    peers = ("liger_kernel", "trl", "cut_cross_entropy")
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "level": level,
        "torch": torch.__version__,
        "commit": commit(),
        "load": os.getloadavg()[0],
        "peers": [name for name in peers if importlib.util.find_spec(name)],
    }
