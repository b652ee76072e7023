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

from .contexts import TeacherPrompt
from .metrics import Clock, check_finite
from .objectives import METHODS, TokenBatch
from .rollout import Group, Rollout
from .scoring import completion_hidden
from .setup import Run, moves


@dataclass
class Example:
    """One rollout to learn from."""

    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    rollout: Rollout


def learn(run: Run, step: int, examples: list[Example], clock: Clock) -> dict[str, float]:
    """Accumulate the loss of all examples over one global token count; one optimizer and teacher step."""
    settings, ranks = run.config.training, run.ranks
    tokens = round(ranks.totals({"tokens": sum(len(example.rollout.token_ids) for example in examples)})["tokens"])
    metrics: dict[str, float] = {"num_tokens": tokens, "learning_rate": run.scheduler.get_last_lr()[0]}
    if tokens == 0:
        return metrics | {"loss": 0.0, "grad_norm": 0.0}
    sums: dict[str, float] = defaultdict(float)
    size = settings.per_device_train_batch_size * ranks.vocab_parallel
    for batch in run.engine.in_step(list(micro_batches(examples, size, settings.tree))):
        with clock("teacher"), run.engine.as_teacher():
            teacher_hidden, teacher_tokens = hidden_states(run, run.teacher, batch, teacher=True)
            teacher_head = run.engine.head(run.teacher)
        with clock("student"):
            student_hidden, student_tokens = hidden_states(run, run.student, batch, teacher=False)
            student_head = run.engine.head(run.student)
            if not batch:  # other processes have one: take part in its collectives
                run.accelerator.backward(run.engine.nothing(student_hidden, student_head))
                continue
            token_batch = TokenBatch(
                student_hidden=student_hidden,
                student_head=student_head,
                teacher_hidden=teacher_hidden,
                teacher_head=teacher_head,
                labels=torch.tensor([t for e in batch for t in e.rollout.token_ids], device=run.student.device),
                normalizer=float(tokens),
            )
            result = METHODS["mopd"](token_batch, run.config)
            check_finite(result.per_token, [e.rollout for e in batch], step, ranks.rank)
            run.accelerator.backward(result.loss)
        sums["loss"] += float(result.loss.detach())
        sums["entropy"] += float(result.student_entropy.sum()) / tokens
        sums["teacher_entropy"] += float(result.teacher_entropy.sum()) / tokens
        sums["tokens/teacher_computed"] += teacher_tokens
        sums["tokens/student_computed"] += student_tokens
        sums["tokens/teacher_total"] += sum(len(e.teacher_prompt_ids) + len(e.rollout.token_ids) for e in batch)
        sums["tokens/student_total"] += sum(len(e.prompt_ids) + len(e.rollout.token_ids) for e in batch)
        sums["top1_agreement"] += float(result.top1_agreement.sum()) / tokens
    with clock("optimizer"):
        norm = run.engine.reduce_and_clip(settings.max_grad_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at step {step}; the last checkpoint is intact")
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        if moves(run.config):
            run.engine.update_teacher(run.config.distillation.teacher_update_rate)
    return metrics | ranks.totals(sums) | {"grad_norm": norm}


def hidden_states(run: Run, model: PreTrainedModel, batch: list[Example], teacher: bool) -> tuple[torch.Tensor, int]:
    """Of all completion tokens of the batch, and the tokens that were computed for them. Members of a vocabulary group
    compute a part each; without any example a token is computed, because others may wait for its collectives."""
    own = run.ranks.part_of(batch)
    prompts = [example.teacher_prompt_ids if teacher else example.prompt_ids for example in own] or [[0]]
    completions = [example.rollout.token_ids for example in own] or [[0]]
    settings, pad_id = run.config.training, int(run.tokenizer.pad_token_id)
    with torch.set_grad_enabled(not teacher):
        hidden, computed = run.engine.through(
            model,
            lambda: completion_hidden(model, prompts, completions, pad_id, settings.tree, settings.max_pack_tokens),
        )
        if not own:
            hidden, computed = hidden[:0], 0
        rows = run.ranks.gather_rows(hidden, run.ranks.token_counts([e.rollout.token_ids for e in batch]))
    return rows, computed * run.ranks.vocab_parallel  # a group counts once in the sum over processes


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
