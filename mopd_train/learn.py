"""From judged rollouts to optimizer steps: examples, micro-batches, hidden states, loss, backward, update.

Legend: G rollouts a prompt, N completion tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby

import torch
from transformers import PreTrainedModel

from .contexts import TeacherPrompt
from .distributed import Ranks
from .metrics import Clock, check_finite
from .models import warn_of_length
from .objectives import Example, Loss, TokenBatch, method_of
from .objectives.batch import engine_gap
from .objectives.distillation import steps_of
from .rollout import Group
from .scoring import completion_hidden
from .setup import Run
from .teacher import Scored, SecondModel, moves


def learn(
    run: Run, step: int, groups: list[Group], contexts: list[list[TeacherPrompt | None]], clock: Clock
) -> dict[str, float]:
    """`training.num_iterations` optimizer steps on the rollouts of one step, over one global normalizer.

    Without a rollout to learn from, on any process, nothing is updated: Adam would move on its stale moments.
    """
    settings, ranks = run.config.training, run.ranks
    examples, units = select(run, groups, contexts)
    tokens = sum(len(example.rollout.token_ids) for example in examples)
    metrics = ranks.totals({"num_tokens": tokens, "num_examples": len(examples), "loss_normalizer": units})
    metrics["learning_rate"] = run.scheduler.get_last_lr()[0]
    metrics["skipped_steps"] = float(metrics["num_examples"] == 0)
    if metrics["skipped_steps"]:
        return metrics
    size, whole_groups = settings.per_device_train_batch_size * ranks.vocab_parallel, method_of(run.config).whole_groups
    batches = run.engine.in_step(list(micro_batches(examples, size, settings.tree, whole_groups)))
    totals = Totals()
    for iteration in range(settings.num_iterations):
        accumulate(run, step, batches, metrics["loss_normalizer"], totals, clock, keep_logprobs=iteration == 0)
        with clock("optimizer"):
            metrics["grad_norm"] = update(run, step)
    return metrics | totals.metrics(ranks, settings.num_iterations)


def select(run: Run, groups: list[Group], contexts: list[list[TeacherPrompt | None]]) -> tuple[list[Example], float]:
    """Rollouts with a loss of this process, or of its vocabulary group, and what they add to the normalizer."""
    method, settings = method_of(run.config), run.config.distillation
    first, _ = run.ranks.slice(run.config.rollout.num_prompts)  # groups are told apart over all processes
    selections = run.ranks.exchanged(
        [
            method.select(first + place, group, prompts, run.config)
            for place, (group, prompts) in enumerate(zip(groups, contexts, strict=True))
        ]
    )
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
    for batch, scored in zip(batches, second_model(run, clock).scores(batches), strict=True):
        with clock("student"):
            hidden, computed = hidden_states(run, run.student, batch)
            head = run.engine.head(run.student)
            if not batch:  # other processes have one: take part in its collectives
                run.accelerator.backward(run.engine.nothing(hidden, head))
                continue
            tokens = TokenBatch(
                examples=batch,
                student_hidden=hidden,
                student_head=head,
                normalizer=normalizer,
                teacher_hidden=None if scored is None else scored.hidden,
                teacher_head=None if scored is None else scored.head,
            )
            result = method_of(run.config).objective(tokens, run.config)
            check_finite(result.per_token, [e.rollout for e in batch], step, run.ranks.rank)
            run.accelerator.backward(result.loss)
        if keep_logprobs and run.config.training.num_iterations > 1:
            lengths = [len(example.rollout.token_ids) for example in batch]
            for example, logprobs in zip(batch, result.logprobs.split(lengths), strict=True):
                example.old_logprobs = logprobs
        totals.add(tokens, result, computed, scored)


def second_model(run: Run, clock: Clock) -> SecondModel:
    def states(model: PreTrainedModel, batch: list[Example]) -> tuple[torch.Tensor, int]:
        with clock("teacher"):
            return hidden_states(run, model, batch, teacher=True)

    engine = run.engine
    return SecondModel(
        run.teacher, run.student, run.config, states, engine.head, engine.as_teacher, engine.loss_dtype,
        engine.vocabulary,
    )  # fmt: skip


def hidden_states(
    run: Run, model: PreTrainedModel, batch: list[Example], teacher: bool = False
) -> tuple[torch.Tensor, int]:
    """Of all completion tokens of the batch, and the tokens that were computed for them. Members of a vocabulary group
    compute a part each; without any example a token is computed, because others may wait for its collectives."""
    own = run.ranks.part_of(batch)
    prompts = [example.teacher_prompt_ids if teacher else example.prompt_ids for example in own] or [[0]]
    completions = [example.rollout.token_ids for example in own] or [[0]]
    settings, pad_id = run.config.training, int(run.tokenizer.pad_token_id)
    if teacher:
        longest = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
        warn_of_length(model, longest, "lower context.max_reprompt_len, to which teacher prompts are cut")
    with torch.set_grad_enabled(not teacher):
        hidden, computed = run.engine.through(
            model,
            lambda: completion_hidden(model, prompts, completions, pad_id, settings.tree, settings.max_pack_tokens),
        )
        if not own:
            hidden, computed = hidden[:0], 0
        rows = run.ranks.gather_rows(hidden, run.ranks.token_counts([e.rollout.token_ids for e in batch]))
    return rows, computed * run.ranks.vocab_parallel  # a group counts once in the sum over processes


def update(run: Run, step: int) -> float:
    """One optimizer step, and one of the teacher where it moves; the norm of the gradient before it is clipped."""
    norm = run.engine.reduce_and_clip(run.config.training.max_grad_norm)
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm is {norm} at step {step}; the last checkpoint is intact")
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    if moves(run.config):
        run.engine.update_teacher(run.config.distillation.teacher_update_rate)
    return norm


class Totals:
    """Metrics of a step: sums over micro-batches and processes, and means as a sum and a count."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)

    def add(self, tokens: TokenBatch, result: Loss, computed: int, scored: Scored | None) -> None:
        batch = tokens.examples
        self.sums["loss"] += result.loss.detach()
        self.sums["tokens/student_computed"] += computed
        self.sums["tokens/student_total"] += sum(len(e.prompt_ids) + len(e.rollout.token_ids) for e in batch)
        if scored is not None:
            self.sums["tokens/teacher_computed"] += scored.computed
            self.sums["tokens/teacher_total"] += sum(
                len(e.teacher_prompt_ids) + len(e.rollout.token_ids) for e in batch
            )
        for name, (value, count) in (result.means | engine_gap(tokens, result.logprobs)).items():
            self.sums[name] += value
            self.counts[name] += count

    def metrics(self, ranks: Ranks, iterations: int) -> dict[str, float]:
        """Over all processes; sums are of one iteration."""
        sums = ranks.totals({name: float(value) for name, value in self.sums.items()})
        counts = ranks.totals(self.counts)
        return {name: value / counts.get(name, iterations) for name, value in sums.items()}


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
