"""Row kernels in plain PyTorch. Rows are taken in blocks that fit the cache, so temporaries stay small
and every pass but the first reads from cache.

Legend: C rows, V columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..losses import divergence, logprob
from ..losses import topk as topk_loss
from ..losses.stats import MINUS_INFINITY, PairStats, SideStats, Terms

BLOCK_BYTES = 1 << 20


def _blocks(z: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_BYTES // max(1, z.size(1) * z.element_size()))
    for first in range(0, z.size(0), rows):
        yield slice(first, first + rows)


def _side(z: Tensor, labels: Tensor | None, start: int) -> tuple[SideStats, Tensor]:
    """Statistics of a block, and exp(z - max) for the cross moment."""
    maximum, argmax = z.max(dim=1)
    shifted = z - torch.where(maximum > MINUS_INFINITY, maximum, 0.0)[:, None]
    weight = shifted.exp()
    moment = torch.where(weight > 0, weight * shifted, 0.0).sum(1)
    if labels is None:
        label = torch.full_like(maximum, MINUS_INFINITY)
    else:
        local = labels - start
        here = (local >= 0) & (local < z.size(1))
        picked = z.gather(1, local.clamp(0, z.size(1) - 1)[:, None])[:, 0]
        label = torch.where(here, picked, MINUS_INFINITY)
    return SideStats(maximum, weight.sum(1), moment, label, (argmax + start).to(z.dtype)), weight


def _take(labels: Tensor | None, rows: slice) -> Tensor | None:
    return None if labels is None else labels[rows]


def _concat(parts: list[SideStats]) -> SideStats:
    return SideStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _empty_side(z: Tensor) -> SideStats:
    """A shard without valid rows: the neutral element of `merge_sides`."""
    none = z.new_full((z.size(0),), MINUS_INFINITY)
    zero = z.new_zeros(z.size(0))
    return SideStats(none, zero, zero, none, zero)


def side_stats(z: Tensor, labels: Tensor | None, start: int) -> SideStats:
    if z.size(1) == 0:
        return _empty_side(z)
    return _concat([_side(z[rows], _take(labels, rows), start)[0] for rows in _blocks(z)])


def pair_stats(
    z_s: Tensor,  # (C, V)
    z_t: Tensor,  # (C, V)
    labels: Tensor | None,  # (C,) global
    start: int,
    alpha: float,
) -> PairStats:
    if z_s.size(1) == 0:
        return PairStats(_empty_side(z_s), _empty_side(z_t), z_s.new_zeros(z_s.size(0)) if alpha in (0, 1) else None)
    students, teachers, crosses = [], [], []
    for rows in _blocks(z_s):
        student, weight_s = _side(z_s[rows], _take(labels, rows), start)
        teacher, weight_t = _side(z_t[rows], _take(labels, rows), start)
        students.append(student)
        teachers.append(teacher)
        if alpha in (0, 1):
            weight, difference = (weight_s, z_s[rows] - z_t[rows]) if alpha == 1 else (weight_t, z_t[rows] - z_s[rows])
            crosses.append(torch.where(weight > 0, weight * difference, 0.0).sum(1))
    return PairStats(_concat(students), _concat(teachers), torch.cat(crosses) if crosses else None)


def mixture_sums(z_s: Tensor, z_t: Tensor, lse_s: Tensor, lse_t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    sums = [
        divergence.kl_to_mixture(z_s[rows] - lse_s[rows, None], z_t[rows] - lse_t[rows, None], alpha)
        for rows in _blocks(z_s)
    ]
    student, teacher = zip(*sums, strict=True)
    return torch.cat(student), torch.cat(teacher)


def mix_(log_p: Tensor, z: Tensor, lse: Tensor, log_weight: Tensor) -> None:
    for rows in _blocks(z):
        torch.logaddexp(log_p[rows], z[rows] + (log_weight - lse)[rows, None], out=log_p[rows])


def _store(z: Tensor, rows: slice, grad: Tensor, cap: float | None) -> None:
    """z <- grad (1 - (z / cap)^2)"""
    if cap is not None:
        grad = grad.mul_(1 - (z[rows] / cap).square_())
    z[rows] = grad


def divergence_grad_(
    z_s: Tensor,  # (C, V), overwritten
    z_t: Tensor,  # (C, V)
    terms: Terms,
    coefficient: Tensor,  # (C,)
    alpha: float,
    cap: float | None,
    grad_filter: float,
) -> None:
    for rows in _blocks(z_s):
        log_q = z_s[rows] - terms.student_lse[rows, None]
        log_p = z_t[rows] - terms.teacher_lse[rows, None]
        grad = divergence.grad_of_logprobs(log_q, log_p, terms.student_kl[rows], alpha)
        if grad_filter > 0:
            grad.masked_fill_(grad.abs() <= grad_filter, 0.0)
        _store(z_s, rows, grad.mul_(coefficient[rows, None]), cap)


def logprob_grad_(
    z: Tensor,  # (C, V), overwritten
    lse: Tensor,
    entropy: Tensor,
    labels: Tensor,  # (C,) global
    start: int,
    grads: tuple[Tensor, Tensor, Tensor],  # of log-prob, entropy and logsumexp, each (C,)
    cap: float | None,
) -> None:
    if z.size(1) == 0:
        return
    for rows in _blocks(z):
        grad_logprob, grad_entropy, grad_lse = (g[rows] for g in grads)
        grad = logprob.grad_of_logprobs(z[rows] - lse[rows, None], entropy[rows], grad_logprob, grad_entropy, grad_lse)
        local = labels[rows] - start
        here = (local >= 0) & (local < z.size(1))
        grad.scatter_add_(1, local.clamp(0, z.size(1) - 1)[:, None], torch.where(here, grad_logprob, 0.0)[:, None])
        _store(z, rows, grad, cap)


def topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values (C, k), largest first, and columns; among equals at the k-th place the lowest columns."""
    parts = [topk_loss.largest(z[rows], k) for rows in _blocks(z)]
    return torch.cat([values for values, _ in parts]), torch.cat([columns for _, columns in parts])
