"""From judged rollouts to optimizer steps: examples, micro-batches, hidden states, loss, backward, update.

Legend: G rollouts a prompt, N completion tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby

import torch
from accelerate.utils import gather_object

from mopd_kernels import LMHead

from .contexts import TeacherPrompt
from .metrics import Clock, check_finite
from .objectives import Example, Loss, TokenBatch, method_of
from .objectives.distillation import steps_of
from .rollout import Group
from .scoring import completion_hidden
from .setup import Run
from .teacher import Scored, SecondModel, moves, update_ema


def learn(
    run: Run, step: int, groups: list[Group], contexts: list[list[TeacherPrompt | None]], clock: Clock
) -> dict[str, float]:
    """`training.num_iterations` optimizer steps on the rollouts of one step, over one global normalizer.

    Without a rollout to learn from, on any process, nothing is updated: Adam would move on its stale moments.
    """
    settings = run.config.training
    examples, units = select(run, groups, contexts)
    tokens = sum(len(example.rollout.token_ids) for example in examples)
    normalizer, total, count = global_sums(run, units, tokens, len(examples))
    metrics: dict[str, float] = {
        "num_tokens": total,
        "num_examples": count,
        "loss_normalizer": normalizer,
        "learning_rate": run.scheduler.get_last_lr()[0],
        "skipped_steps": float(count == 0),
    }
    if count == 0:
        return metrics
    whole_groups = method_of(run.config).whole_groups
    batches = list(micro_batches(examples, settings.per_device_train_batch_size, settings.tree, whole_groups))
    totals = Totals()
    for iteration in range(settings.num_iterations):
        accumulate(run, step, batches, normalizer, totals, clock, keep_logprobs=iteration == 0)
        with clock("optimizer"):
            metrics["grad_norm"] = update(run, step)
    return metrics | totals.metrics(settings.num_iterations)


def select(run: Run, groups: list[Group], contexts: list[list[TeacherPrompt | None]]) -> tuple[list[Example], float]:
    """This process's rollouts with a loss, and what they add to the normalizer."""
    method, settings = method_of(run.config), run.config.distillation
    selections = [
        method.select(place, group, prompts, run.config)
        for place, (group, prompts) in enumerate(zip(groups, contexts, strict=True))
    ]
    examples = [example for selection in selections for example in selection.examples]
    if method.teacher == "context" and settings.step_level_kl:
        for example in examples:
            example.steps = steps_of(example.rollout.token_ids, run.tokenizer, settings.step_separator)
    return examples, sum(selection.units for selection in selections)


def accumulate(
    run: Run, step: int, batches: list[list[Example]], normalizer: float, totals: Totals, clock: Clock,
    keep_logprobs: bool,
) -> None:  # fmt: skip
    """Gradients of all micro-batches. keep_logprobs: this is the policy that later updates are compared with."""
    pad_id = int(run.tokenizer.pad_token_id)
    scores = SecondModel(run.teacher, run.student, run.config, pad_id).scores(batches)
    for batch in batches:
        with clock("teacher"):
            scored = next(scores)
        with clock("student"):
            hidden, computed = student_states(run, batch, pad_id)
            result = method_of(run.config).objective(
                TokenBatch(
                    examples=batch,
                    student_hidden=hidden,
                    student_head=LMHead.from_model(run.student),
                    normalizer=normalizer,
                    teacher_hidden=None if scored is None else scored.hidden,
                    teacher_head=None if scored is None else scored.head,
                ),
                run.config,
            )
            check_finite(result.per_token, [e.rollout for e in batch], step, run.accelerator.process_index)
            run.accelerator.backward(result.loss)
        if keep_logprobs and run.config.training.num_iterations > 1:
            lengths = [len(example.rollout.token_ids) for example in batch]
            for example, logprobs in zip(batch, result.logprobs.split(lengths), strict=True):
                example.old_logprobs = logprobs
        totals.add(batch, result, computed, scored)


def student_states(run: Run, batch: list[Example], pad_id: int) -> tuple[torch.Tensor, int]:  # (N, H), tokens computed
    prompts = [example.prompt_ids for example in batch]
    completions = [example.rollout.token_ids for example in batch]
    return completion_hidden(run.student, prompts, completions, pad_id, run.config.training.tree)


def update(run: Run, step: int) -> float:
    """One optimizer step, and one of the teacher where it moves; the norm of the gradient before it is clipped."""
    norm = float(run.accelerator.clip_grad_norm_(run.student.parameters(), run.config.training.max_grad_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm is {norm} at step {step}; the last checkpoint is intact")
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    if moves(run.config):
        assert run.teacher is not None
        update_ema(run.teacher, run.student, run.config.distillation.teacher_update_rate)
    return norm


class Totals:
    """Metrics of a step: sums over micro-batches and processes, and means as a sum and a count."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)

    def add(self, batch: list[Example], result: Loss, computed: int, scored: Scored | None) -> None:
        self.sums["loss"] += result.loss.detach()
        self.sums["tokens/student_computed"] += computed
        self.sums["tokens/student_total"] += sum(len(e.prompt_ids) + len(e.rollout.token_ids) for e in batch)
        if scored is not None:
            self.sums["tokens/teacher_computed"] += scored.computed
            self.sums["tokens/teacher_total"] += sum(
                len(e.teacher_prompt_ids) + len(e.rollout.token_ids) for e in batch
            )
        for name, (value, count) in result.means.items():
            self.sums[name] += value
            self.counts[name] += count

    def metrics(self, iterations: int) -> dict[str, float]:
        """Over all processes; sums are of one iteration."""
        gathered = gather_object([({name: float(v) for name, v in self.sums.items()}, dict(self.counts))])
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        for some_sums, some_counts in gathered:
            for name, value in some_sums.items():
                sums[name] += value
            for name, value in some_counts.items():
                counts[name] += value
        return {name: value / counts.get(name, iterations) for name, value in sums.items()}


def global_sums(run: Run, *values: float) -> list[float]:
    """Each value added up over all processes."""
    local = torch.tensor(values, dtype=torch.float64).to(run.accelerator.device)
    return [float(value) for value in run.accelerator.reduce(local, "sum")]


def micro_batches(examples: list[Example], size: int, tree: bool, whole_groups: bool) -> Iterator[list[Example]]:
    """About `size` examples each. whole_groups: never less than a group, however large, and no group in two.

    Otherwise the tree keeps the order, in which groups stand together; padded batches take examples of like length.
    """
    if whole_groups:
        batch: list[Example] = []
        for _, members in groupby(examples, key=lambda example: example.group):
            group = list(members)
            if batch and len(batch) + len(group) > size:
                yield batch
                batch = []
            batch += group
        if batch:
            yield batch
        return
    ordered = examples
    if not tree:
        ordered = sorted(examples, key=lambda e: (len(e.teacher_prompt_ids), len(e.rollout.token_ids)))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]
