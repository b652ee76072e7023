"""One group scored under many contexts: every prefix that contexts and rollouts share is computed once.

Legend: G rollouts of the group, T tokens of a rollout, S distinct sequences, N their scored tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mopd_kernels import LMHead, linear_logprobs

from ..config import Config
from ..contexts import TeacherPrompt, choose_peers, prompts_showing
from ..rollout import Group
from ..scoring import completion_hidden
from .controls import MATCHED, matched_peers

Sequence = tuple[tuple[int, ...], tuple[int, ...]]  # what the teacher reads, the rollout


@dataclass(frozen=True)
class Scored:
    logprobs: dict[str, list[Tensor | None]]  # context -> G of (T,)
    computed: int  # tokens that went through the model
    total: int  # tokens of all sequences, one each for rollout and context


def condition_prompts(
    group: Group, tokenizer: PreTrainedTokenizerBase, condition: str, config: Config, seed: int
) -> list[TeacherPrompt | None]:  # (G,)
    """What the teacher reads for each rollout under a context, as in training; None where it has nothing to show.
    A name that ends in "/matched" shows all rollouts equally many successes and failures (controls.py)."""
    name = condition.removesuffix(MATCHED)
    settings = replace(config.context, context=name)  # type: ignore[arg-type]  # checked by the lookup
    chosen = choose_peers(group, settings, seed)
    if condition != name:
        chosen = matched_peers(group, chosen, settings.success_reward_threshold)
    return prompts_showing(chosen, group, tokenizer, settings, config.data.chat_template_kwargs)


def context_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Group,
    contexts: list[str],
    config: Config,
    seed: int,
) -> dict[str, list[Tensor | None]]:  # context -> G of (T,)
    """Teacher log-prob of each token of each rollout under each context, as in training: template, leave-one-out
    peers drawn from `seed`, token ids as sampled, the teacher's temperature, `training.tree`. None where a context has
    nothing to show for a rollout."""
    prompts = {name: condition_prompts(group, tokenizer, name, config, seed) for name in contexts}
    return score_prompts(model, tokenizer, group, prompts, config).logprobs


@torch.no_grad()
def score_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Group,
    prompts: dict[str, list[TeacherPrompt | None]],  # context -> G
    config: Config,
) -> Scored:
    """Sequences that coincide, as those of `1s` and `1s1f` do in a group without failures, are scored once."""
    sequences: dict[str, list[Sequence | None]] = {
        name: [
            None if prompt is None else (tuple(prompt.token_ids), tuple(rollout.token_ids))
            for prompt, rollout in zip(row, group.rollouts, strict=True)
        ]
        for name, row in prompts.items()
    }
    wanted = [sequence for row in sequences.values() for sequence in row if sequence is not None]
    distinct = sorted(set(wanted), key=lambda s: (len(s[0]) + len(s[1]), s))
    logprobs: dict[Sequence, Tensor] = {}
    computed = 0
    settings = config.training
    size = len(distinct) if settings.tree else settings.per_device_train_batch_size
    for first in range(0, len(distinct), size or 1):
        batch = distinct[first : first + size]
        hidden, tokens = completion_hidden(
            model,
            [list(prompt) for prompt, _ in batch],
            [list(rollout) for _, rollout in batch],
            int(tokenizer.pad_token_id),
            settings.tree,
            settings.max_pack_tokens,
        )
        labels = torch.tensor([token for _, rollout in batch for token in rollout], device=model.device)  # (N,)
        temperature = config.distillation.teacher_temperature or config.rollout.temperature
        scored = linear_logprobs(hidden, LMHead.from_model(model), labels, temperature=temperature)
        logprobs |= zip(batch, scored.logprobs.split([len(rollout) for _, rollout in batch]), strict=True)
        computed += tokens
    return Scored(
        {name: [None if s is None else logprobs[s] for s in row] for name, row in sequences.items()},
        computed,
        sum(len(prompt) + len(rollout) for prompt, rollout in wanted),
    )
