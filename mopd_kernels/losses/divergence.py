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


def log_mixture(log_q: Tensor, log_p: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """log M = log((1 - alpha) q + alpha p)"""
    return torch.logaddexp(log_q + math.log1p(-alpha), log_p + math.log(alpha), out=out)


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
    student_kl, teacher_kl = kl_to_mixture(log_q, log_p, alpha)
    return (1 - alpha) * student_kl + alpha * teacher_kl


def kl_to_mixture(log_q: Tensor, log_p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(q||M) and KL(p||M), summed over the columns at hand: partial sums of a split vocabulary add up."""
    log_m = log_mixture(log_q, log_p, alpha)
    return expected(log_q, log_q - log_m).sum(-1), expected(log_p, log_p - log_m).sum(-1)


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
    ratio = log_q - log_mixture(log_q, log_p, alpha)
    return expected(log_q, ratio - student_kl[:, None]).mul_(1 - alpha)


def kl_from_stats(stats: PairStats, alpha: float) -> Tensor:
    """KL of whole rows from their statistics; alpha is 0 or 1.

    KL(S||T) = E_q[z_s - z_t] - lse_s + lse_t, and the same with the sides exchanged.
    """
    first, second = (stats.student, stats.teacher) if alpha == 1 else (stats.teacher, stats.student)
    assert stats.cross is not None
    return stats.cross / first.sumexp - first.logsumexp + second.logsumexp


def value_and_terms(stats: PairStats, kls: tuple[Tensor, Tensor] | None, alpha: float) -> tuple[Tensor, Terms]:
    """The divergence of whole rows and what their gradient needs; `kls` from `kl_to_mixture` between the ends."""
    if kls is None:
        value = student_kl = kl_from_stats(stats, alpha)
    else:
        student_kl = kls[0]
        value = (1 - alpha) * kls[0] + alpha * kls[1]
    return value, Terms(stats.student.logsumexp, stats.teacher.logsumexp, student_kl)
