"""Hidden states as training meets them: SmolLM2's own rollouts, read by the student with the prompt alone and by the
teacher with peers of the same group. Made once (about two minutes) with the trainer's own code, then cached.

Legend: N completion tokens, H hidden.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mopd_train.config import ContextConfig
from mopd_train.contexts import encode_prompt, teacher_prompts
from mopd_train.models import EMBEDDED, cache_dir, load_model, load_tokenizer, stop_token_ids
from mopd_train.rollout import Group, Prompt, Sampling, generate
from mopd_train.scoring import completion_hidden
from mopd_train.tasks import TASKS
from mopd_train.verify import judge

logger = logging.getLogger(__name__)

VERSION = 1  # of what is asked and how; part of the file name
TOKENS = 2048
QUESTIONS = ("What is {a} + {b}? Show your steps.", "What is {a} * {b}? Show your steps.")
SAMPLING = Sampling(num_generations=8, max_completion_length=64, temperature=1.0, top_p=1.0, batch_size=64)


@dataclass(frozen=True)
class HiddenStates:
    """float32; the weight is the model's own, tied to its embedding."""

    student: Tensor  # (N, H)
    teacher: Tensor  # (N, H)
    labels: Tensor  # (N,)
    weight: Tensor  # (V, H)


def smollm2() -> HiddenStates:
    """The first TOKENS completion tokens of seeded rollouts, and the output head's weight."""
    path = cache_dir() / f"bench-smollm2-v{VERSION}.safetensors"
    if not path.is_file():
        logger.warning("making hidden states of SmolLM2 rollouts in %s (once, about two minutes)", path)
        save_file(_make(), path)
    model = load_model(EMBEDDED)
    return HiddenStates(weight=model.get_output_embeddings().weight.detach().clone(), **load_file(path))


@torch.no_grad()
def _make() -> dict[str, Tensor]:
    model, tokenizer = load_model(EMBEDDED), load_tokenizer(EMBEDDED)
    groups = generate(model, tokenizer, _prompts(tokenizer), SAMPLING, stop_token_ids(model, tokenizer), seed=0)
    judge(groups, TASKS["arithmetic"].reward, "arithmetic")
    parts = [part for group in groups for part in _group_states(model, tokenizer, group)]
    student, teacher, labels = (torch.cat(column)[:TOKENS].contiguous() for column in zip(*parts, strict=True))
    if len(labels) < TOKENS:
        raise RuntimeError(f"expected {TOKENS} completion tokens with peers, got {len(labels)}: raise bench.hidden.SAMPLING")
    return {"student": student, "teacher": teacher, "labels": labels}


def _prompts(tokenizer) -> list[Prompt]:  # type: ignore[no-untyped-def]
    rng, prompts = random.Random(0), []
    for number in range(16):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        question = QUESTIONS[number % 2].format(a=a, b=b)
        messages = [{"role": "user", "content": question}]
        row = {"prompt": question, "answer": str(a * b if number % 2 else a + b)}
        prompts.append(Prompt(messages, encode_prompt(messages, tokenizer, {}), row))
    return prompts


def _group_states(model, tokenizer, group: Group) -> list[tuple[Tensor, Tensor, Tensor]]:  # type: ignore[no-untyped-def]
    pad = tokenizer.pad_token_id
    contexts = teacher_prompts(group, tokenizer, ContextConfig(), {}, seed=0)
    pairs = [(context, rollout) for context, rollout in zip(contexts, group.rollouts, strict=True) if context]
    if not pairs:
        return []
    completions = [rollout.token_ids for _, rollout in pairs]
    student = completion_hidden(model, [group.prompt.token_ids] * len(pairs), completions, pad)
    teacher = completion_hidden(model, [context.token_ids for context, _ in pairs], completions, pad)
    return [(student, teacher, torch.tensor([token for ids in completions for token in ids]))]
