"""Divergence on the student's top-k support, with the rest as one bucket or left out.

With the student's k largest logits as support and q, p normalised over the full vocabulary:

    add_tail        k + 1 buckets: q_1..q_k, q_tail = 1 - Σ, and the teacher's on the same indices
    without it      k entries: both sides renormalised to the support

log q_tail is the logsumexp of the entries outside the support, never log(1 - Σ) of a rounded sum. The
gradient of the buckets' logits is that of the full divergence; the tail hands its part on to its entries:

    d/dz_v = G_b            v in the support
    d/dz_v = G_tail softmax(z outside the support)_v

Among equal logits the lowest vocabulary index is taken, so the support does not depend on chunks or shards.

Legend: C rows, V columns, k support, B buckets (k or k + 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import divergence
from .stats import MINUS_INFINITY, SideStats


class Support(NamedTuple):
    """The student's k largest entries, largest first, and the teacher's logits there."""

    student: Tensor  # (C, k)
    teacher: Tensor  # (C, k)
    indices: Tensor  # (C, k) global vocabulary indices, int64


class Buckets(NamedTuple):
    """Both sides' log-probabilities of the buckets, (C, B) each, and the support's mass, (C,) each."""

    log_q: Tensor
    log_p: Tensor
    student_mass: Tensor
    teacher_mass: Tensor


def dense_topk_divergence(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    alpha: float,
    top_k: int,
    add_tail: bool = True,
) -> Tensor:  # (...)
    """The definition, by autograd; the oracle in float64."""
    support = student_logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    log_q, log_p = (_dense_buckets(z, support, add_tail) for z in (student_logits, teacher_logits))
    return divergence.of_logprobs(log_q, log_p, alpha)


def _dense_buckets(logits: Tensor, support: Tensor, add_tail: bool) -> Tensor:
    log_q = logits.log_softmax(-1).gather(-1, support)
    if not add_tail:
        return log_q.log_softmax(-1)
    if support.size(-1) == logits.size(-1):
        return log_q
    rest = logits.scatter(-1, support, MINUS_INFINITY).logsumexp(-1, keepdim=True)
    return torch.cat([log_q, rest - logits.logsumexp(-1, keepdim=True)], -1)


def largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first, and their columns; among those equal to the k-th the lowest columns.

    torch.topk promises no order among equals, so rows whose k-th value also occurs outside are settled anew.
    """
    values, columns = z.topk(k, dim=1)
    last = values[:, -1:]
    unsettled = ((z >= last).sum(1) > k).nonzero()[:, 0]
    if unsettled.numel() > 0:
        index = torch.arange(z.size(1), device=z.device)
        lowest = torch.where(z[unsettled] == last[unsettled], -index, -z.size(1)).topk(k, dim=1).values.neg_()
        above = (values[unsettled] > last[unsettled]).sum(1, keepdim=True)
        place = torch.arange(k, device=z.device) - above
        equals = lowest.gather(1, place.clamp(min=0))
        columns[unsettled] = torch.where(place >= 0, equals, columns[unsettled])
    return values, columns


def merged(candidates: Support, k: int) -> Support:
    """The k best of the candidates in each row, by value and then by vocabulary index."""
    by_index = candidates.indices.argsort(dim=1)
    candidates = Support(*(column.gather(1, by_index) for column in candidates))
    best = candidates.student.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return Support(*(column.gather(1, best) for column in candidates))


def support_side(z: Tensor, indices: Tensor, labels: Tensor | None) -> SideStats:
    """Statistics of the support's entries alone, to be merged with those of the rest."""
    maximum, at = z.max(dim=1)
    shifted = z - torch.where(maximum > MINUS_INFINITY, maximum, 0.0)[:, None]
    label = torch.full_like(maximum, MINUS_INFINITY)
    if labels is not None:
        label = torch.where(indices == labels[:, None], z, MINUS_INFINITY).amax(1)
    argmax = indices.gather(1, at[:, None])[:, 0].to(z.dtype)
    return SideStats(maximum, shifted.exp().sum(1), divergence.expected(shifted, shifted).sum(1), label, argmax)


def buckets(
    support: Support,
    whole: tuple[SideStats, SideStats],  # of all entries, student and teacher
    rest: tuple[SideStats, SideStats],  # of the entries outside the support
    add_tail: bool,
) -> Buckets:
    """Maxima are subtracted first: a logsumexp of 1e4 holds a log-probability in float32 to 1e-3 only."""
    sides, masses = [], []
    for z, row, outside in zip(support[:2], whole, rest, strict=True):
        log_sum = row.sumexp.log()
        log_q = (z - row.maximum[:, None]) - log_sum[:, None]
        masses.append(log_q.exp().sum(1).clamp_(max=1))
        tail = (outside.maximum - row.maximum) + (outside.sumexp.log() - log_sum)
        sides.append(torch.cat([log_q, tail[:, None]], 1) if add_tail else log_q.log_softmax(1))
    return Buckets(*sides, *masses)


def value_and_grad(log_q: Tensor, log_p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The divergence (C,) of the buckets and its gradient (C, B) with respect to their logits."""
    if alpha in (0, 1):
        value = student_kl = divergence.of_logprobs(log_q, log_p, alpha)
    else:
        student_kl, teacher_kl = divergence.kl_to_mixture(log_q, log_p, alpha)
        value = (1 - alpha) * student_kl + alpha * teacher_kl
    return value, divergence.grad_of_logprobs(log_q, log_p, student_kl, alpha)
