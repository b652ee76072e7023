"""Where a call of `linear_divergence` on CPU spends its time: products, row kernels, and the rest.

Legend: N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from mopd_kernels import backends, products

from .cases import Case, Inputs
from .measure import spread
from .peers import ours

# Function: its phase. Those of a backend that has no such function are left out.
PRODUCTS = {"logits_": "z_s and z_t", "hidden_gradient": "dH", "weight_gradient_": "dW"}
KERNELS = {"pair_stats": "statistics", "divergence_grad_": "gradient", "divergence_grad_kept_": "gradient"}

Clocks = tuple[float, float]  # seconds by the wall clock and of the processor


def profile(case: Case, p: Inputs, backend: str, grad_filter: float, rounds: int) -> list[dict[str, Any]]:
    """Medians of the phases' seconds, with the arithmetic and the traffic that they need at least."""
    step = ours(backend, grad_filter)(case, p)
    step()
    runs = []
    for _ in range(rounds):
        with watched(backends.pick(backend, p.hidden)) as spent:
            begun = _now()
            step()
            whole = _since(begun)
        rest = [whole[clock] - sum(phase[clock] for phase in spent.values()) for clock in (0, 1)]
        runs.append({**spent, "rest": rest, "all": list(whole)})
    needed = work(case, grad_filter)
    rows = []
    for phase in runs[0]:
        wall, cpu = (spread([run[phase][clock] for run in runs]) for clock in (0, 1))
        rows.append({"phase": phase, "seconds": wall, "cpu_seconds": cpu, **needed.get(phase, {})})
    return rows


def work(case: Case, grad_filter: float) -> dict[str, dict[str, float]]:
    """FLOP of the products and bytes that the row kernels read and write, if a chunk leaves the cache in between."""
    product, plane = 2.0 * case.N * case.V * case.H, 4.0 * case.N * case.V
    dense = {} if grad_filter else {"dH": {"flop": product}, "dW": {"flop": product}}
    return {
        "z_s and z_t": {"flop": 2 * product},
        "statistics": {"bytes": 2 * plane},
        "gradient": {"bytes": 3 * plane},
    } | dense


@contextmanager
def watched(backend: Any) -> Any:
    """Seconds of each phase of the calls made inside."""
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def timed(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begun = _now()
            try:
                return function(*arguments, **options)
            finally:
                spent[phase] = [a + b for a, b in zip(spent[phase], _since(begun), strict=True)]

        return call

    places = [(products, name, phase) for name, phase in PRODUCTS.items()]
    places += [(backend, name, phase) for name, phase in KERNELS.items() if hasattr(backend, name)]
    if hasattr(backend, "Kept"):
        places.append((backend.Kept, "products", "sparse dH and dW"))
    with ExitStack() as stack:
        for owner, name, phase in places:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), phase)))
        yield spent


def _now() -> Clocks:
    return time.perf_counter(), time.process_time()


def _since(begun: Clocks) -> Clocks:
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def table(found: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for row in found["phases"]:
        wall, cpu = row["seconds"], row["cpu_seconds"]
        rate = f"{row['flop'] / wall['median'] / 1e9:.0f} GFLOP/s" if "flop" in row else ""
        rate = f"{row['bytes'] / wall['median'] / 1e9:.1f} GB/s" if "bytes" in row else rate
        rows.append(
            [
                row["phase"],
                f"{wall['median']:.3f}",
                f"{wall['low']:.3f}-{wall['high']:.3f}",
                f"{cpu['median']:.3f}",
                rate,
            ]
        )
    title = f"phases of {found['provider']} on smollm2"
    return title, ["phase", "seconds", "quartiles", "cpu seconds", "rate"], rows
