"""Verified-success fine-tuning: likelihood of the rollouts that the verifier accepts.

Source: arXiv 2203.14465 (STaR).
"""

from __future__ import annotations

from ..config import Config
from ..contexts import TeacherPrompt
from ..rollout import Group
from .batch import Example, Loss, Selection, TokenBatch, student_logprobs, token_means


def select(index: int, group: Group, prompts: list[TeacherPrompt | None], config: Config) -> Selection:
    """Successes. Units: rollouts, or their tokens without sft_length_normalize."""
    threshold = config.context.success_reward_threshold
    right = [rollout for rollout in group.rollouts if rollout.succeeded(threshold) and rollout.token_ids]
    examples = [Example(index, group.prompt.token_ids, [], rollout) for rollout in right]
    tokens = sum(len(rollout.token_ids) for rollout in right)
    return Selection(examples, len(examples) if config.baseline.sft_length_normalize else tokens)


def sft(batch: TokenBatch, config: Config) -> Loss:
    """-Σ_i Σ_t log q_t / length_i over rollouts; or -Σ_t log q_t over tokens."""
    scored = student_logprobs(batch, config)
    terms = -scored.logprobs
    if config.baseline.sft_length_normalize:
        terms = terms * batch.on_tokens([1 / length for length in batch.lengths])
    metrics = token_means(entropy=scored.entropy, nll=-scored.logprobs)
    return Loss(terms.sum() / batch.normalizer, terms.detach(), scored.logprobs.detach(), metrics)
