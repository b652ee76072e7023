"""Row statistics: all that a loss needs to know of a row of logits, additive over vocabulary shards.

Legend: C rows of a chunk, V vocabulary columns held here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MINUS_INFINITY = float("-inf")


class SideStats(NamedTuple):
    """One side's online statistics of z, each (C,)."""

    maximum: Tensor  # max z
    sumexp: Tensor  # sum exp(z - max)
    moment: Tensor  # sum exp(z - max) (z - max)
    label: Tensor  # z[label], -inf where the label's row is not here
    argmax: Tensor  # global vocabulary index of the maximum, as a float (exact below 2**24)

    @property
    def logsumexp(self) -> Tensor:
        return self.maximum + self.sumexp.log()

    @property
    def entropy(self) -> Tensor:
        """H = log sum exp(z - m) - E[z - m]"""
        return self.sumexp.log() - self.moment / self.sumexp


class PairStats(NamedTuple):
    """Both sides and the one cross moment that a KL needs (None for Jensen-Shannon).

    cross: alpha=1: sum exp(z_s - m_s) (z_s - z_t); alpha=0: sum exp(z_t - m_t) (z_t - z_s).
    """

    student: SideStats
    teacher: SideStats
    cross: Tensor | None


class Terms(NamedTuple):
    """What the gradient of a row needs, each (C,); saved between forward and backward."""

    student_lse: Tensor
    teacher_lse: Tensor
    student_kl: Tensor  # alpha=1: KL(S||T); between: KL(S||M); alpha=0: unused


def merge_sides(parts: SideStats) -> tuple[SideStats, Tensor]:
    """Combine stacked parts (P, C) of split rows into one (C,); also the parts' factors exp(m_p - m).

    s = sum_p f_p s_p;  moment = sum_p f_p (moment_p + (m_p - m) s_p),  f_p = exp(m_p - m)
    """
    maximum, winner = parts.maximum.max(dim=0)
    shift = torch.where(parts.sumexp > 0, parts.maximum - maximum, MINUS_INFINITY)
    factor = shift.exp()
    shift = torch.where(parts.sumexp > 0, shift, 0.0)
    merged = SideStats(
        maximum=maximum,
        sumexp=(factor * parts.sumexp).sum(0),
        moment=(factor * (parts.moment + shift * parts.sumexp)).sum(0),
        label=parts.label.amax(0),
        argmax=parts.argmax.gather(0, winner[None])[0],
    )
    return merged, factor
