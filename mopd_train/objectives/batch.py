"""What an objective is given, what it returns, and what several of them compute alike.

Legend: B rollouts of a micro-batch, N completion tokens of all of them in order, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mopd_kernels import LMHead, LogProbs, linear_logprobs

from ..config import Config
from ..rollout import Rollout


@dataclass
class Example:
    """One rollout to learn from. Examples of one group stand together."""

    group: int  # its prompt's place in the step
    prompt_ids: list[int]
    teacher_prompt_ids: list[int]  # what the method's second model reads; unused where it has none
    rollout: Rollout
    advantage: float = 0.0  # GRPO
    steps: list[int] | None = None  # the step of the completion that each token belongs to
    old_logprobs: Tensor | None = None  # (T,) of the first of several updates on this rollout


@dataclass(frozen=True)
class Selection:
    """A group's rollouts that have a loss, and what they add to the normalizer of the step."""

    examples: list[Example]
    units: float


@dataclass(frozen=True)
class TokenBatch:
    """Completion tokens of some rollouts, from the student and, where the method asks, a second model."""

    examples: list[Example]  # B
    student_hidden: Tensor  # (N, Hs)
    student_head: LMHead
    normalizer: float  # units of the whole step (Selection.units), over all processes
    teacher_hidden: Tensor | None = None  # (N, Ht)
    teacher_head: LMHead | None = None

    @cached_property
    def labels(self) -> Tensor:  # (N,) sampled tokens
        ids = [token for example in self.examples for token in example.rollout.token_ids]
        return torch.tensor(ids, device=self.student_hidden.device)

    @property
    def lengths(self) -> list[int]:  # B
        return [len(example.rollout.token_ids) for example in self.examples]

    def on_tokens(self, values: list[float]) -> Tensor:  # B numbers -> (N,)
        device = self.student_hidden.device
        return torch.tensor(values, device=device).repeat_interleave(torch.tensor(self.lengths, device=device))

    def by_rollout(self, values: Tensor) -> Tensor:  # (N,) -> (B,) sums
        return torch.stack([part.sum() for part in values.split(self.lengths)])

    @cached_property
    def old_logprobs(self) -> Tensor | None:  # (N,)
        """Under the policy before the first update on these rollouts; None in that update."""
        kept = [example.old_logprobs for example in self.examples]
        return None if any(part is None for part in kept) else torch.cat(kept)  # type: ignore[arg-type]

    @cached_property
    def engine_logprobs(self) -> Tensor | None:  # (N,)
        """As the rollout engine reports them; None if it does not."""
        given = [example.rollout.logprobs for example in self.examples]
        if any(part is None for part in given):
            return None
        for part, length in zip(given, self.lengths, strict=True):
            if len(part) != length:  # type: ignore[arg-type]
                raise ValueError(f"expected {length} engine log-probs, one a token of the rollout, got {len(part)}")  # type: ignore[arg-type]
        flat = [value for part in given for value in part]  # type: ignore[union-attr]
        return torch.tensor(flat, device=self.student_hidden.device)


@dataclass(frozen=True)
class Loss:
    """Result of an objective."""

    loss: Tensor  # () over the normalizer; carries the gradients
    per_token: Tensor  # (N,) detached: looked at for non-finite rows
    logprobs: Tensor  # (N,) detached log q of the sampled tokens
    means: dict[str, tuple[Tensor, float]]  # metric -> its sum and count here: both add up over micro-batches


Objective = Callable[[TokenBatch, Config], Loss]


def token_means(**values: Tensor | None) -> dict[str, tuple[Tensor, float]]:
    """Metrics that are means over tokens; None is left out."""
    return {name: (v.detach().sum(), float(v.numel())) for name, v in values.items() if v is not None}


def student_logprobs(batch: TokenBatch, config: Config) -> LogProbs:
    """log q of the sampled tokens at the rollout's temperature, differentiable."""
    return linear_logprobs(
        batch.student_hidden,
        batch.student_head,
        batch.labels,
        temperature=config.rollout.temperature,
        execution=config.distillation.execution(),
    )


def teacher_logprobs(batch: TokenBatch, config: Config, temperature: float) -> Tensor:  # (N,)
    """The same of the second model; a constant."""
    assert batch.teacher_hidden is not None
    assert batch.teacher_head is not None
    with torch.no_grad():
        return linear_logprobs(
            batch.teacher_hidden,
            batch.teacher_head,
            batch.labels,
            temperature=temperature,
            execution=config.distillation.execution(),
        ).logprobs


def capped_ratio(numerator: Tensor, denominator: Tensor, cap: float) -> Tensor:
    """min(cap, exp(clamp(a - b, +-20))) of log-probs, a constant."""
    return (numerator.detach() - denominator).clamp(-20, 20).exp().clamp(max=cap)


def engine_weights(batch: TokenBatch, logprobs: Tensor, config: Config) -> Tensor | None:  # (N,)
    """q_old / q_engine on the sampled tokens: trainer and rollout engine compute the same policy differently.

    q_old is the trainer's policy when the rollouts were drawn. None where the engine reports nothing.
    """
    engine = batch.engine_logprobs
    if engine is None or not config.rollout.rollout_is:
        return None
    old = logprobs if batch.old_logprobs is None else batch.old_logprobs
    return capped_ratio(old, engine, config.rollout.rollout_is_threshold)


def engine_gap(batch: TokenBatch, logprobs: Tensor) -> dict[str, tuple[Tensor, float]]:
    """The metric |log q_old - log q_engine|: float rounding, unless the engine's weights are stale or top_p < 1, whose
    nucleus only the engine renormalises over. Nothing where the engine reports nothing."""
    if batch.engine_logprobs is None:
        return {}
    old = logprobs if batch.old_logprobs is None else batch.old_logprobs
    return token_means(**{"rollout/logprob_gap": (old - batch.engine_logprobs).abs()})


def update_weights(batch: TokenBatch, logprobs: Tensor, config: Config) -> Tensor | None:  # (N,)
    """q / q_old on the sampled tokens, from the second update on the same rollouts on; before it is 1 (None)."""
    cap = config.distillation.is_clip
    if batch.old_logprobs is None or cap is None:
        return None
    return capped_ratio(logprobs, batch.old_logprobs, cap)
