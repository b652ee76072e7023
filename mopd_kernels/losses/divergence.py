"""Forward KL, reverse KL and Jensen-Shannon divergence by `alpha`.

With q the student's and p the teacher's distribution:

    alpha = 0        KL(T||S) = sum p (log p - log q)
    alpha = 1        KL(S||T) = sum q (log q - log p)
    between          (1 - alpha) KL(q||M) + alpha KL(p||M),  M = (1 - alpha) q + alpha p

Between the ends the value tends to 0 as alpha tends to 0 or 1, so the ends are separate cases.
Terms with zero probability are 0: the product is guarded, not the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .stats import PairStats, Terms


def expected(log_weight: Tensor, value: Tensor) -> Tensor:
    """exp(log_weight) * value, and 0 where the weight underflows or is exp(-inf), also for value = inf."""
    weight = log_weight.exp()
    return weight * torch.where(weight > 0, value, 0.0)


def log_mixture(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """log M = log((1 - alpha) q + alpha p)"""
    return torch.logaddexp(log_q + math.log1p(-alpha), log_p + math.log(alpha))


def mixture_ratios(log_q: Tensor, log_p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """log(q / M) and log(p / M), exactly 0 where q = p; a closed form, not to be differentiated by autograd.

    With d = log p - log q:  log(q / M) = -log1p(alpha expm1(d)),  log(p / M) = -log1p((1 - alpha) expm1(-d));
    the one with the negative exponent is computed, the other differs from it by d.
    """
    d = log_p - log_q
    share = d.sign().mul_(0.5 - alpha).add_(0.5)  # alpha or 1 - alpha
    smaller = d.abs().neg_().expm1_().mul_(share).log1p_().neg_()
    del share
    return d.clamp(min=0).neg_().add_(smaller), smaller.add_(d.clamp_(max=0))


def dense_divergence(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    alpha: float,
) -> Tensor:  # (...)
    """The definition, by autograd; the oracle in float64."""
    return of_logprobs(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), alpha)


def of_logprobs(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """Divergence of two normalised log-distributions over the last dimension."""
    if alpha == 0:
        return expected(log_p, log_p - log_q).sum(-1)
    if alpha == 1:
        return expected(log_q, log_q - log_p).sum(-1)
    log_m = log_mixture(log_q, log_p, alpha)
    return ((1 - alpha) * expected(log_q, log_q - log_m) + alpha * expected(log_p, log_p - log_m)).sum(-1)


def kl_to_mixture(log_q: Tensor, log_p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(q||M) and KL(p||M), summed over the columns at hand: partial sums of a split vocabulary add up."""
    student, teacher = mixture_ratios(log_q, log_p, alpha)
    return expected(log_q, student).sum(-1), expected(log_p, teacher).sum(-1)


def grad_of_logprobs(
    log_q: Tensor,  # (C, V)
    log_p: Tensor,  # (C, V)
    student_kl: Tensor,  # (C,) as in Terms
    alpha: float,
) -> Tensor:  # (C, V)
    """d(divergence)/d(student logits), closed form.

    alpha = 0: q - p;  alpha = 1: q (log q - log p - R);  between: (1 - alpha) q (log q - log m - KL(q||M))
    """
    if alpha == 0:
        return log_q.exp() - log_p.exp()
    if alpha == 1:
        return expected(log_q, log_q - log_p - student_kl[:, None])
    ratio = mixture_ratios(log_q, log_p, alpha)[0]
    return expected(log_q, ratio - student_kl[:, None]).mul_(1 - alpha)


def kl_from_stats(stats: PairStats, alpha: float) -> Tensor:
    """KL of whole rows from their statistics; alpha is 0 or 1.

    KL(S||T) = E_q[z_s - z_t] - (m_s - m_t) - (log s_s - log s_t), lse = m + log s, and the same with the sides
    exchanged: an offset of all logits leaves the difference of the maxima exact, and not that of rounded lse.
    """
    first, second = (stats.student, stats.teacher) if alpha == 1 else (stats.teacher, stats.student)
    assert stats.cross is not None
    drop = (first.maximum - second.maximum) + (first.sumexp.log() - second.sumexp.log())
    return stats.cross / first.sumexp - drop


def value_and_terms(stats: PairStats, kls: tuple[Tensor, Tensor] | None, alpha: float) -> tuple[Tensor, Terms]:
    """The divergence of whole rows and what their gradient needs; `kls` from `kl_to_mixture` between the ends."""
    if kls is None:
        value = student_kl = kl_from_stats(stats, alpha)
    else:
        student_kl = kls[0]
        value = (1 - alpha) * kls[0] + alpha * kls[1]
    return value, Terms(stats.student.logsumexp, stats.teacher.logsumexp, student_kl)
