"""Right first, then fast: errors against float64, and times of interleaved runs.

Legend: N tokens, V vocabulary, H hidden, K contexts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mopd_kernels.losses import LOSSES

from .cases import Case, Inputs
from .peers import TOP_K

ORACLE_ROWS = 64


def oracle(case: Case, p: Inputs) -> tuple[Tensor, ...]:
    """The answer in float64, a few tokens at a time."""
    teacher_weight = p.teacher_weight.double()
    if case.task == "score":
        rows = [_chosen(states, teacher_weight, p.labels) for states in p.teacher_hidden]
        return (torch.stack(rows),)
    weight = p.weight.detach().double()
    loss, grads, grad_weight = torch.zeros((), dtype=torch.float64), [], torch.zeros_like(weight)
    for rows in torch.arange(case.N).split(ORACLE_ROWS):
        h = p.hidden.detach()[rows].double()
        z_s, z_t = (h @ weight.T).requires_grad_(), p.teacher_hidden[0, rows].double() @ teacher_weight.T
        if case.task == "topk":
            value = LOSSES["topk"](z_s, z_t, case.alpha, TOP_K, True).sum() / case.N
        else:
            value = LOSSES["divergence"](z_s, z_t, case.alpha).sum() / case.N
        (grad,) = torch.autograd.grad(value, z_s)
        loss += value.detach()
        grads.append(grad @ weight)
        grad_weight.addmm_(grad.T, h)
    return loss, torch.cat(grads), grad_weight


def _chosen(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """log softmax(h Wᵀ)[label] of each token."""
    blocks = zip(states.split(ORACLE_ROWS), labels.split(ORACLE_ROWS), strict=True)
    return torch.cat([(h.double() @ weight.T).log_softmax(-1).gather(-1, y[:, None])[:, 0] for h, y in blocks])


def errors(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """Relative error of each result in the 2-norm."""
    return [
        float((actual.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))
        for actual, exact in zip(results, expected, strict=True)
    ]


def interleaved(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, Any]]:
    """One run of every step a round; the first round is dropped. Wall-clock time is what users wait; processor time of
    all threads is given beside it, since other work on the machine disturbs it less."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            begun = time.perf_counter(), time.process_time()
            step()
            if turn > 0:
                wall[name].append(time.perf_counter() - begun[0])
                cpu[name].append(time.process_time() - begun[1])
    return {name: {"seconds": spread(wall[name]), "cpu_seconds": spread(cpu[name])} for name in steps}


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "low": low, "high": high, "best": min(values)}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log time over log size, least squares."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(seconds).double().log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())
