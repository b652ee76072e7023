"""Objectives by method name: from hidden states of student and teacher to a loss over completion tokens.

A new method is one function here and one line in METHODS. Legend: N completion tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mopd_kernels import Divergence, LMHead, linear_divergence

from .config import Config


@dataclass(frozen=True)
class TokenBatch:
    """Completion tokens of some rollouts, both sides."""

    student_hidden: Tensor  # (N, Hs)
    student_head: LMHead
    teacher_hidden: Tensor  # (N, Ht)
    teacher_head: LMHead
    labels: Tensor  # (N,) sampled tokens
    normalizer: float  # completion tokens of the whole step, over all processes


Objective = Callable[[TokenBatch, Config], Divergence]


def mopd(batch: TokenBatch, config: Config) -> Divergence:
    """Divergence of the peer-reading teacher from the student at every token, over the step's token count."""
    return linear_divergence(
        batch.student_hidden,
        batch.student_head,
        batch.teacher_hidden,
        batch.teacher_head,
        alpha=config.distillation.alpha,
        temperature=config.rollout.temperature,
        labels=batch.labels,
        normalizer=batch.normalizer,
        execution=config.distillation.execution(),
    )


METHODS: dict[str, Objective] = {"mopd": mopd}
