"""One group scored under many contexts: every prefix that contexts and rollouts share is computed once.

Legend: G rollouts of the group, T tokens of a rollout, N scored tokens of all sequences, H hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mopd_kernels import LMHead, PrefixTree, linear_logprobs

from ..config import Config
from ..contexts import teacher_prompts
from ..rollout import Group

Sequence = tuple[tuple[int, ...], tuple[int, ...]]  # what the teacher reads, the rollout


@torch.no_grad()
def context_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Group,
    contexts: list[str],
    config: Config,
    seed: int,
    max_tokens: int = 16384,
) -> dict[str, list[Tensor | None]]:  # context -> G of (T,)
    """Teacher log-prob of each token of each rollout under each context, as in training: template, leave-one-out
    peers drawn from `seed`, token ids as sampled, `rollout.temperature`.

    None where a context has nothing to show for a rollout. Sequences that coincide, as those of `1s` and `1s1f` do
    in a group without failures, are scored once. `max_tokens` bounds a packed forward; a longer sequence gets a
    pack of its own.
    """
    sequences: dict[str, list[Sequence | None]] = {}
    for context in contexts:
        settings = replace(config.context, context=context)  # type: ignore[arg-type]  # checked by the lookup
        prompts = teacher_prompts(group, tokenizer, settings, config.data.chat_template_kwargs, seed)
        sequences[context] = [
            None if prompt is None else (tuple(prompt.token_ids), tuple(rollout.token_ids))
            for prompt, rollout in zip(prompts, group.rollouts, strict=True)
        ]
    distinct = list(dict.fromkeys(s for row in sequences.values() for s in row if s is not None))
    logprobs = dict(zip(distinct, _logprobs(model, distinct, config.rollout.temperature, max_tokens), strict=True))
    return {context: [None if s is None else logprobs[s] for s in row] for context, row in sequences.items()}


def _logprobs(model: PreTrainedModel, sequences: list[Sequence], temperature: float, max_tokens: int) -> list[Tensor]:
    """(T,) of each sequence, by one call of the head over all packs."""
    if not sequences:
        return []
    tokens = [torch.tensor(prompt + rollout, device=model.device) for prompt, rollout in sequences]
    parts, labels, order = [], [], []
    for tree, indices in PrefixTree.pack_many(tokens, max(max_tokens, *map(len, tokens))):
        spans = [(j, len(sequences[i][0]) - 1, len(tokens[i]) - 1) for j, i in enumerate(indices)]
        parts.append(tree.gather_many(spans, hidden=tree.forward(model)))
        tree.release()
        labels += [tokens[i][len(sequences[i][0]) :] for i in indices]
        order += indices
    scored = linear_logprobs(
        torch.cat(parts),  # (N, H)
        LMHead.from_model(model),
        torch.cat(labels),
        temperature=temperature,
    ).logprobs
    of_sequence = dict(zip(order, scored.split([len(ids) for ids in labels]), strict=True))
    return [of_sequence[i] for i in range(len(sequences))]
