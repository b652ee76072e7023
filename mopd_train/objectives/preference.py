"""DPO and SimPO on the pairs within a group: whichever rollout has the higher reward is preferred.

Sources: arXiv 2305.18290 (DPO), arXiv 2405.14734 (SimPO). Legend: B rollouts, y_c chosen, y_r rejected.
"""

from __future__ import annotations

from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config
from ..contexts import TeacherPrompt
from ..rollout import Group
from .batch import Example, Loss, Selection, TokenBatch, student_logprobs, teacher_logprobs, token_means


def select(index: int, group: Group, prompts: list[TeacherPrompt | None], config: Config) -> Selection:
    """Rollouts of a group with two different rewards; the reference reads their own prompt. Units: pairs."""
    judged = [rollout for rollout in group.rollouts if rollout.reward is not None and rollout.token_ids]
    if len({rollout.reward for rollout in judged}) < 2:
        return Selection([], 0)
    prompt = group.prompt.token_ids
    examples = [Example(index, prompt, prompt, rollout) for rollout in judged]
    return Selection(examples, len(pairs_of(examples)))


def pairs_of(examples: list[Example]) -> list[tuple[int, int]]:
    """(chosen, rejected) for every two rollouts of one group of which the first has strictly the higher reward."""
    rewards = [float(example.rollout.reward) for example in examples]  # type: ignore[arg-type]
    return [
        (i, j)
        for i, j in permutations(range(len(examples)), 2)
        if examples[i].group == examples[j].group and rewards[i] > rewards[j]
    ]


def dpo(batch: TokenBatch, config: Config) -> Loss:
    """-Σ log σ(β (h_c - h_r)) / pairs,  h = Σ_t log q_t - log ref_t,  ref the initial student."""
    scored = student_logprobs(batch, config)
    reference = teacher_logprobs(batch, config, config.rollout.temperature)
    rewards = config.baseline.dpo_beta * batch.by_rollout(scored.logprobs - reference)
    return _preference(batch, rewards, 0.0, scored.logprobs, scored.entropy)


def simpo(batch: TokenBatch, config: Config) -> Loss:
    """-Σ log σ(β (h_c - h_r) - γ) / pairs,  h = Σ_t log q_t / length."""
    scored = student_logprobs(batch, config)
    lengths = torch.tensor(batch.lengths, device=scored.logprobs.device)
    rewards = config.baseline.simpo_beta * batch.by_rollout(scored.logprobs) / lengths
    return _preference(batch, rewards, config.baseline.simpo_gamma, scored.logprobs, scored.entropy)


def _preference(
    batch: TokenBatch,
    rewards: Tensor,  # (B,) implicit
    gamma: float,
    logprobs: Tensor,  # (N,)
    entropy: Tensor,  # (N,)
) -> Loss:
    chosen, rejected = torch.tensor(pairs_of(batch.examples), device=rewards.device).T
    margins = rewards[chosen] - rewards[rejected]
    loss = -F.logsigmoid(margins - gamma).sum() / batch.normalizer
    metrics = token_means(entropy=entropy)
    metrics |= token_means(
        **{
            "rewards/chosen": rewards[chosen],
            "rewards/rejected": rewards[rejected],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
        }
    )
    return Loss(loss, logprobs.detach(), logprobs.detach(), metrics)
