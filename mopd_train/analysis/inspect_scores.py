"""Everything the inspector shows of a group, token by token: both log-probs, divergence, and what else was likely.

Legend: G rollouts of the group, T tokens of a rollout, D distinct teacher prompts of a rollout, S = 1 + D sides,
A alternatives at a token, C tokens of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mopd_kernels import LMHead, linear_divergence, linear_logprobs

from ..config import Config
from ..contexts import TeacherPrompt, teacher_prompts
from ..rollout import Group
from ..scoring import completion_hidden

LOGIT_ROWS = 64  # rows of logits held at a time for the alternatives: 12 MB at a vocabulary of 49152


@dataclass(frozen=True)
class TokenScores:
    """One side's view of a rollout, in nats."""

    logprobs: list[float]  # (T,) of the sampled tokens
    entropy: list[float]  # (T,)
    alternatives: list[list[float]]  # (T, A) log-probs of RolloutScores.alternatives


@dataclass(frozen=True)
class TeacherScores(TokenScores):
    """The teacher's view of a rollout behind one prompt."""

    prompt: TeacherPrompt
    divergence: list[float]  # (T,) from the student, as in the loss


@dataclass(frozen=True)
class RolloutScores:
    alternatives: list[list[int]]  # (T, A) token ids: the likeliest of the student and of every teacher prompt
    student: TokenScores
    teacher: list[TeacherScores]  # (D,)
    contexts: dict[str, int | None]  # index into `teacher`; None where the context has nothing to show


@torch.no_grad()
def score_group(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Group,
    contexts: list[str],
    config: Config,
    seed: int,
    top: int = 5,
) -> list[RolloutScores]:  # (G,)
    """Score every rollout without peers (student) and under each context (teacher), as the loss does: template,
    leave-one-out peers drawn from `seed`, token ids as sampled, the temperature of each side, `distillation.alpha` and
    top-k. Log-probs and entropies are over the whole vocabulary.

    Contexts whose prompts coincide are scored once. Logits exist for LOGIT_ROWS rows at a time only.
    """
    distinct, chosen = _distinct_prompts(tokenizer, group, contexts, config, seed)
    completions = [rollout.token_ids for rollout in group.rollouts]
    owners = [i for i, prompts in enumerate(distinct) for _ in prompts]
    repeated = [completions[i] for i in owners]
    s_head, t_head, settings = LMHead.from_model(student), LMHead.from_model(teacher), config.distillation
    temperature = config.rollout.temperature
    t_temperature = settings.teacher_temperature or temperature

    s_hidden = _states(student, [group.prompt.token_ids] * len(completions), completions, config)
    labels = torch.tensor([t for ids in completions for t in ids], device=student.device)
    own = linear_logprobs(torch.cat(s_hidden), s_head, labels, temperature=temperature)
    s_rows = list(zip(_split(own.logprobs, completions), _split(own.entropy, completions), strict=True))

    t_hidden = _states(teacher, [p.token_ids for prompts in distinct for p in prompts], repeated, config)
    t_rows: list[tuple[list[float], ...]] = []
    if owners:
        compared = linear_divergence(
            torch.cat([s_hidden[i] for i in owners]),
            s_head,
            torch.cat(t_hidden),
            t_head,
            alpha=settings.alpha,
            temperature=temperature,
            teacher_temperature=t_temperature,
            top_k=settings.distillation_topk,
            add_tail=settings.distillation_add_tail,
            labels=torch.tensor([t for ids in repeated for t in ids], device=student.device),
            reduction="none",
        )
        columns = (compared.teacher_logprobs, compared.teacher_entropy, compared.per_token)
        t_rows = list(zip(*(_split(column, repeated) for column in columns), strict=True))

    scored = []
    for i, (logprobs, entropy) in enumerate(s_rows):
        mine = [j for j, owner in enumerate(owners) if owner == i]
        sides = [(s_hidden[i], s_head, temperature), *((t_hidden[j], t_head, t_temperature) for j in mine)]
        ids, likely = _alternatives(sides, top)
        teachers = [
            TeacherScores(t_rows[j][0], t_rows[j][1], likely[1 + d], distinct[i][d], t_rows[j][2])
            for d, j in enumerate(mine)
        ]
        scored.append(RolloutScores(ids, TokenScores(logprobs, entropy, likely[0]), teachers, chosen[i]))
    return scored


def _distinct_prompts(
    tokenizer: PreTrainedTokenizerBase, group: Group, contexts: list[str], config: Config, seed: int
) -> tuple[list[list[TeacherPrompt]], list[dict[str, int | None]]]:
    """For each rollout its different teacher prompts, and which of them belongs to which context."""
    distinct: list[list[TeacherPrompt]] = [[] for _ in group.rollouts]
    chosen: list[dict[str, int | None]] = [{} for _ in group.rollouts]
    for name in contexts:
        settings = replace(config.context, context=name)  # type: ignore[arg-type]  # checked by the lookup in CONTEXTS
        prompts = teacher_prompts(group, tokenizer, settings, config.data.chat_template_kwargs, seed)
        for known, of_context, prompt in zip(distinct, chosen, prompts, strict=True):
            of_context[name] = None
            if prompt is not None:
                ids = [other.token_ids for other in known]
                if prompt.token_ids not in ids:
                    known.append(prompt)
                    ids.append(prompt.token_ids)
                of_context[name] = ids.index(prompt.token_ids)
    return distinct, chosen


def _states(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]], config: Config
) -> list[Tensor]:  # (T, H) each
    if not prompts:
        return []
    limit = config.training.max_pack_tokens
    hidden, _ = completion_hidden(model, prompts, completions, pad_id=0, tree=True, max_pack_tokens=limit)
    return list(hidden.split([len(ids) for ids in completions]))


def _split(rows: Tensor | None, completions: list[list[int]]) -> list[list[float]]:
    assert rows is not None
    return [part.tolist() for part in rows.split([len(ids) for ids in completions])]


def _alternatives(
    sides: list[tuple[Tensor, LMHead, float]],  # S of (T, H), its head and temperature
    top: int,
) -> tuple[list[list[int]], list[list[list[float]]]]:  # (T, A) ids; (S, T, A) log-probs
    """At each token the `top` likeliest entries of every side, and what all sides give to them."""
    size = min(head.vocab_size or head.weight.size(0) for _, head, _ in sides)
    tokens, step = sides[0][0].size(0), max(1, LOGIT_ROWS // len(sides))
    ids: list[list[int]] = []
    likely: list[list[list[float]]] = [[] for _ in sides]
    for first in range(0, tokens, step):
        logprobs = torch.stack(
            [
                _logits(hidden[first : first + step], head, size).div(temperature).log_softmax(-1)
                for hidden, head, temperature in sides
            ]
        )  # (S, C, V)
        best = logprobs.topk(min(top, size), dim=-1).indices  # (S, C, top)
        for c, row in enumerate(best.transpose(0, 1).flatten(1).tolist()):
            union = list(dict.fromkeys(row))
            ids.append(union)
            for side, values in zip(likely, logprobs[:, c, union].tolist(), strict=True):
                side.append(values)
    return ids, likely


def _logits(hidden: Tensor, head: LMHead, size: int) -> Tensor:  # (C, size)
    """As LMHead defines them, in float32 (float64 for float64)."""
    logits = hidden @ head.weight[:size].T
    if head.bias is not None:
        logits = logits + head.bias[:size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
