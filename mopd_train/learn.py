"""From judged rollouts to one optimizer step: examples, micro-batches, hidden states, loss, backward, update.

Legend: G rollouts a prompt, N completion tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mopd_kernels import LMHead

from .contexts import TeacherPrompt
from .metrics import Clock, check_finite, logprob_gap
from .objectives import METHODS, TokenBatch
from .rollout import Group, Rollout
from .scoring import completion_hidden
from .setup import Run, moves
from .teacher import update_ema


@dataclass
class Example:
    """One rollout to learn from."""

    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    rollout: Rollout


def learn(run: Run, step: int, examples: list[Example], clock: Clock) -> dict[str, float]:
    """Accumulate the loss of all examples over one global token count; one optimizer and teacher step."""
    settings = run.config.training
    tokens = sum(len(example.rollout.token_ids) for example in examples)
    metrics: dict[str, float] = {"num_tokens": tokens, "learning_rate": run.scheduler.get_last_lr()[0]}
    if tokens == 0:
        return metrics | {"loss": 0.0, "grad_norm": 0.0}
    sums: dict[str, float] = defaultdict(float)
    for batch in micro_batches(examples, settings.per_device_train_batch_size, settings.tree):
        with clock("teacher"):
            teacher_hidden, teacher_tokens = hidden_states(run, run.teacher, batch, teacher=True)
        with clock("student"):
            student_hidden, student_tokens = hidden_states(run, run.student, batch, teacher=False)
            token_batch = TokenBatch(
                student_hidden=student_hidden,
                student_head=LMHead.from_model(run.student),
                teacher_hidden=teacher_hidden,
                teacher_head=LMHead.from_model(run.teacher),
                labels=torch.tensor([t for e in batch for t in e.rollout.token_ids], device=run.student.device),
                normalizer=float(tokens),
            )
            result = METHODS["mopd"](token_batch, run.config)
            check_finite(result.per_token, [e.rollout for e in batch], step, run.accelerator.process_index)
            run.accelerator.backward(result.loss)
        sums["loss"] += float(result.loss.detach())
        sums["entropy"] += float(result.student_entropy.sum()) / tokens
        sums["teacher_entropy"] += float(result.teacher_entropy.sum()) / tokens
        sums["tokens/teacher_computed"] += teacher_tokens
        sums["tokens/student_computed"] += student_tokens
        sums["tokens/teacher_total"] += sum(len(e.teacher_prompt_ids) + len(e.rollout.token_ids) for e in batch)
        sums["tokens/student_total"] += sum(len(e.prompt_ids) + len(e.rollout.token_ids) for e in batch)
        if batch[0].rollout.logprobs is not None and result.student_logprobs is not None:
            sums["rollout/logprob_gap"] += logprob_gap([e.rollout for e in batch], result.student_logprobs) / tokens
        sums["top1_agreement"] += float(result.top1_agreement.sum()) / tokens
    with clock("optimizer"):
        norm = float(run.accelerator.clip_grad_norm_(run.student.parameters(), settings.max_grad_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at step {step}; the last checkpoint is intact")
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        if moves(run.config):
            update_ema(run.teacher, run.student, run.config.distillation.teacher_update_rate)
    return metrics | sums | {"grad_norm": norm}


def hidden_states(run: Run, model: PreTrainedModel, batch: list[Example], teacher: bool) -> tuple[torch.Tensor, int]:
    prompts = [example.teacher_prompt_ids if teacher else example.prompt_ids for example in batch]
    completions = [example.rollout.token_ids for example in batch]
    settings, pad_id = run.config.training, int(run.tokenizer.pad_token_id)
    with torch.set_grad_enabled(not teacher):
        return completion_hidden(model, prompts, completions, pad_id, settings.tree, settings.max_pack_tokens)


def to_examples(groups: list[Group], contexts: list[list[TeacherPrompt | None]]) -> list[Example]:
    """Rollouts whose teacher has something to read; the others have no loss and count nowhere."""
    return [
        Example(group.prompt.token_ids, prompt.token_ids, rollout)
        for group, prompts in zip(groups, contexts, strict=True)
        for rollout, prompt in zip(group.rollouts, prompts, strict=True)
        if prompt is not None
    ]


def micro_batches(examples: list[Example], size: int, tree: bool) -> Iterator[list[Example]]:
    """For the tree groups stay together; padded batches take examples of like length."""
    ordered = examples
    if not tree:
        ordered = sorted(examples, key=lambda e: (len(e.teacher_prompt_ids), len(e.rollout.token_ids)))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]
