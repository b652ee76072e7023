"""Log-probability of given labels, entropy and logsumexp of rows of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import expected


def dense_logprobs(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
) -> tuple[Tensor, Tensor, Tensor]:
    """log q[label], H = -sum q log q and log sum exp z by autograd; the oracle in float64."""
    log_q = logits.log_softmax(-1)
    chosen = log_q.gather(-1, labels[..., None])[..., 0]
    return chosen, -expected(log_q, log_q).sum(-1), logits.logsumexp(-1)


def grad_of_logprobs(
    log_q: Tensor,  # (C, V)
    entropy: Tensor,  # (C,)
    grad_logprob: Tensor,  # (C,)
    grad_entropy: Tensor,  # (C,)
    grad_lse: Tensor,  # (C,)
) -> Tensor:  # (C, V)
    """d/dz of a·log q[y] + b·H + c·lse, short of the one-hot term a·1[y]: q (c - a - b (log q + H))"""
    slope = (grad_lse - grad_logprob)[:, None] - grad_entropy[:, None] * (log_q + entropy[:, None])
    return expected(log_q, slope)


def unguarded_grad_(
    log_q: Tensor,  # (C, V), overwritten
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad_lse: Tensor,
    out: Tensor,
) -> Tensor:
    """`grad_of_logprobs` in `out`, NaN where 0 meets infinity."""
    constant = grad_lse - grad_logprob - grad_entropy * entropy
    if not bool(grad_entropy.any()):
        return torch.mul(log_q.exp_(), constant[:, None], out=out)
    torch.mul(log_q, -grad_entropy[:, None], out=out).add_(constant[:, None])
    return out.mul_(log_q.exp_())
