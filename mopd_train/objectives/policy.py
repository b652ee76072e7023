"""GRPO: a policy gradient whose baseline is the mean reward of the group. Source: arXiv 2402.03300.

Token-level loss without division by the standard deviation, after arXiv 2503.20783 and 2503.14476.
"""

from __future__ import annotations

import statistics

import torch

from ..config import Config
from ..contexts import TeacherPrompt
from ..rollout import Group
from .batch import Example, Loss, Selection, TokenBatch, engine_weights, student_logprobs, token_means


def select(index: int, group: Group, prompts: list[TeacherPrompt | None], config: Config) -> Selection:
    """Judged rollouts with an advantage that is not 0. Units: tokens of all judged rollouts, as a mean has it: one
    whose advantage is 0 is left out of the forward, not of the mean."""
    judged = [rollout for rollout in group.rollouts if rollout.reward is not None]
    advantages = group_advantages([float(r.reward) for r in judged], config.baseline.scale_rewards)  # type: ignore[arg-type]
    examples = [
        Example(index, group.prompt.token_ids, [], rollout, advantage)
        for rollout, advantage in zip(judged, advantages, strict=True)
        if advantage != 0 and rollout.token_ids
    ]
    return Selection(examples, sum(len(rollout.token_ids) for rollout in judged))


def group_advantages(rewards: list[float], scale: bool) -> list[float]:
    """r - mean, with `scale` over (standard deviation + 1e-4); all 0 where rewards are equal or only one is known."""
    if len(set(rewards)) < 2:
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    spread = statistics.stdev(rewards) + 1e-4 if scale else 1.0
    return [(reward - mean) / spread for reward in rewards]


def grpo(batch: TokenBatch, config: Config) -> Loss:
    """-Σ_t v_t min(ρ_t A, clip(ρ_t, 1 - ε, 1 + ε) A) / tokens,  ρ = q / q_old,  v = q_old / q_engine capped.

    In the first update on a batch q_old is q held constant: ρ = 1 and the gradient is that of -A log q.
    """
    scored = student_logprobs(batch, config)
    logprobs, advantage = scored.logprobs, batch.on_tokens([example.advantage for example in batch.examples])
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    ratio = (logprobs - old).clamp(-20, 20).exp()
    epsilon = config.baseline.epsilon
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    terms = -torch.minimum(ratio * advantage, clipped * advantage)
    engine = engine_weights(batch, logprobs.detach(), config)
    if engine is not None:
        terms = terms * engine
    metrics = token_means(entropy=scored.entropy)
    metrics |= token_means(
        **{
            "advantage/abs_mean": advantage.abs(),
            "is_ratio/engine": engine,
            "is_ratio/update": ratio,
            "clip_ratio": (clipped * advantage < ratio * advantage).float(),
        }
    )
    return Loss(terms.sum() / batch.normalizer, terms.detach(), logprobs.detach(), metrics)
