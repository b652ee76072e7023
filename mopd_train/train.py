"""The MOPD loop, to be read from top to bottom.

A step: prompts -> G rollouts each -> verifier -> what the teacher reads -> teacher and student hidden states
of every completion token -> divergence -> backward -> AdamW -> teacher update.

Legend: G rollouts a prompt, N completion tokens of a micro-batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_constant_schedule_with_warmup

from mopd_kernels import LMHead

from . import checkpoint, report
from .config import Config, validate
from .contexts import TeacherPrompt, teacher_prompts
from .data import build_prompts, split_rows, step_prompts
from .evaluate import Scores, completion_record, evaluate
from .files import read_json, read_jsonl, write_json, write_jsonl
from .models import load_model, load_tokenizer, stop_token_ids
from .objectives import METHODS, TokenBatch
from .rollout import Group, Prompt, Rollout, Sampling, generate
from .rundir import METRICS, MetricsFile, claim
from .scoring import completion_hidden
from .tasks import Task, find_task
from .teacher import build_teacher, update_ema
from .verify import judge

logger = logging.getLogger(__name__)
console = Console()


@dataclass
class Example:
    """One rollout to learn from."""

    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    rollout: Rollout


@dataclass
class Run:
    """Everything a step works on."""

    config: Config
    folder: Path
    accelerator: Accelerator
    task: Task
    tokenizer: PreTrainedTokenizerBase
    student: PreTrainedModel
    teacher: PreTrainedModel
    optimizer: Any
    scheduler: Any
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    first_step: int


def train(config: Config) -> Path:
    """Run the whole job and return its folder."""
    run = set_up(config)
    settings = config.training
    if run.first_step >= settings.max_steps:
        console.print(f"{run.folder} is already at step {run.first_step} of {settings.max_steps}: nothing to do")
        return run.folder
    before = held_out_scores(run, "before") if run.first_step == 0 else None
    metrics_file = MetricsFile(run.folder, run.first_step)
    with progress_bar() as progress:
        bar = progress.add_task("training", total=settings.max_steps, completed=run.first_step)
        for step in range(run.first_step + 1, settings.max_steps + 1):
            metrics = {"step": step, **train_step(run, step)}
            metrics_file.write(metrics)
            run.accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=step)
            progress.console.print(report.step_line(metrics, settings.max_steps), highlight=False)
            progress.advance(bar)
            if step % settings.save_steps == 0 or step == settings.max_steps:
                save(run, step)
    metrics_file.close()
    finish(run, before)
    return run.folder


def set_up(config: Config) -> Run:
    """Every check that can be made before work begins is made here."""
    validate(config)
    task = find_task(config.data.task)
    settings = config.training
    resume = checkpoint.find_resume(settings.resume_from_checkpoint, Path(settings.output_dir))
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    train_rows, eval_rows = split_rows(config.data, task)
    train_source = config.data.train_dataset or f"task {config.data.task!r}"
    train_prompts = build_prompts(train_rows, task, config.data, tokenizer, train_source)
    eval_prompts = []
    if eval_rows:
        eval_prompts = build_prompts(eval_rows, task, config.data, tokenizer, config.data.eval_dataset or train_source)
    folder = claim(config, resuming=settings.resume_from_checkpoint is not None)

    student = load_model(str(resume or config.model.model_name_or_path), config.model.dtype, config.model.attn_implementation)
    LMHead.from_model(student)
    if config.model.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    accelerator = Accelerator(
        log_with=settings.report_to or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder)),
    )
    if accelerator.num_processes > 1:
        raise ValueError(f"training runs in one process so far, got {accelerator.num_processes}: start without a launcher")
    student.to(accelerator.device)
    teacher = build_teacher(config.distillation, config.model, student, tokenizer)
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )
    scheduler = get_constant_schedule_with_warmup(optimizer, settings.warmup_steps)
    checkpoint.check_space(folder, student, moves(config), settings.save_total_limit)
    student, optimizer, scheduler = accelerator.prepare(student, optimizer, scheduler)
    checkpoint.keep_weights_out(accelerator)
    first_step = 0
    if resume is not None:
        first_step = checkpoint.step_of(resume)
        if moves(config):
            teacher.load_state_dict(load_model(str(resume / "teacher"), config.model.dtype).state_dict())
        accelerator.load_state(str(resume / "state"))
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first_step + 1}})
    return Run(
        config, folder, accelerator, task, tokenizer, student, teacher, optimizer, scheduler,
        train_prompts, eval_prompts, first_step,
    )  # fmt: skip


def moves(config: Config) -> bool:
    """Whether the teacher changes during training and so belongs to the checkpoint."""
    return config.distillation.teacher_regularization == "ema"


def train_step(run: Run, step: int) -> dict[str, float]:
    """One batch of rollouts, one optimizer step."""
    config, clock = run.config, Clock()
    with clock("rollout"):
        prompts = step_prompts(run.train_prompts, step - 1, config.rollout.num_prompts, config.training.seed)
        sampling = Sampling(
            config.rollout.num_generations,
            config.rollout.max_completion_length,
            config.rollout.temperature,
            config.rollout.top_p,
            config.rollout.generation_batch_size,
        )
        stops = stop_token_ids(run.student, run.tokenizer)
        groups = generate(run.student, run.tokenizer, prompts, sampling, stops, seed_of(run, step))
    with clock("verify"):
        judge(groups, run.task.reward, config.data.task)
    write_jsonl(
        run.folder / "completions" / f"step-{step:06d}.jsonl",
        [completion_record(group, i) for group in groups for i in range(len(group.rollouts))],
    )
    contexts = [
        teacher_prompts(group, run.tokenizer, config.context, config.data.chat_template_kwargs, seed_of(run, step) + i)
        for i, group in enumerate(groups)
    ]
    metrics = group_metrics(groups, contexts, config)
    metrics |= learn(run, step, to_examples(groups, contexts), clock)
    return metrics | clock.metrics()


def learn(run: Run, step: int, examples: list[Example], clock: Clock) -> dict[str, float]:
    """Accumulate the loss of all examples over one global token count; one optimizer and teacher step."""
    settings = run.config.training
    tokens = sum(len(example.rollout.token_ids) for example in examples)
    metrics: dict[str, float] = {"num_tokens": tokens, "learning_rate": run.scheduler.get_last_lr()[0]}
    if tokens == 0:
        return metrics | {"loss": 0.0, "grad_norm": 0.0}
    sums: dict[str, float] = defaultdict(float)
    for batch in micro_batches(examples, settings.per_device_train_batch_size):
        with clock("teacher"):
            teacher_hidden = hidden_states(run, run.teacher, batch, teacher=True)
        with clock("student"):
            token_batch = TokenBatch(
                student_hidden=hidden_states(run, run.student, batch, teacher=False),
                student_head=LMHead.from_model(run.student),
                teacher_hidden=teacher_hidden,
                teacher_head=LMHead.from_model(run.teacher),
                labels=torch.tensor([t for e in batch for t in e.rollout.token_ids], device=run.student.device),
                normalizer=float(tokens),
            )
            result = METHODS["mopd"](token_batch, run.config)
            check_finite(result.per_token, batch, step, run.accelerator.process_index)
            run.accelerator.backward(result.loss)
        sums["loss"] += float(result.loss.detach())
        sums["entropy"] += float(result.student_entropy.sum()) / tokens
        sums["teacher_entropy"] += float(result.teacher_entropy.sum()) / tokens
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


def hidden_states(run: Run, model: PreTrainedModel, batch: list[Example], teacher: bool) -> torch.Tensor:
    prompts = [example.teacher_prompt_ids if teacher else example.prompt_ids for example in batch]
    completions = [example.rollout.token_ids for example in batch]
    with torch.set_grad_enabled(not teacher):
        return completion_hidden(model, prompts, completions, int(run.tokenizer.pad_token_id))


def to_examples(groups: list[Group], contexts: list[list[TeacherPrompt | None]]) -> list[Example]:
    """Rollouts whose teacher has something to read; the others have no loss and count nowhere."""
    return [
        Example(group.prompt.token_ids, prompt.token_ids, rollout)
        for group, prompts in zip(groups, contexts, strict=True)
        for rollout, prompt in zip(group.rollouts, prompts, strict=True)
        if prompt is not None
    ]


def micro_batches(examples: list[Example], size: int) -> Iterator[list[Example]]:
    """Examples of like length together: less padding."""
    ordered = sorted(examples, key=lambda e: (len(e.teacher_prompt_ids), len(e.rollout.token_ids)))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


def check_finite(per_token: torch.Tensor, batch: list[Example], step: int, rank: int) -> None:
    bad = (~torch.isfinite(per_token)).nonzero()[:, 0].tolist()
    if bad:
        ends, total = [], 0
        for example in batch:
            total += len(example.rollout.token_ids)
            ends.append(total)
        rows = sorted({next(i for i, end in enumerate(ends) if token < end) for token in bad})
        texts = [batch[row].rollout.text for row in rows[:3]]
        raise FloatingPointError(
            f"non-finite loss at step {step}, rank {rank}, in {len(bad)} tokens of rollouts {rows} of the micro-batch "
            f"(first: {texts!r:.300}); nothing was updated, the last checkpoint is intact"
        )


def group_metrics(
    groups: list[Group], contexts: list[list[TeacherPrompt | None]], config: Config
) -> dict[str, float]:
    threshold = config.context.success_reward_threshold
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [torch.tensor([r.reward for r in g.rollouts if r.reward is not None]) for g in groups]
    rewards = [values for values in rewards if values.numel()]
    shown = [prompt for prompts in contexts for prompt in prompts if prompt is not None]
    spread = [float(values.std(correction=0)) for values in rewards]
    return {
        "reward": mean([float(values.mean()) for values in rewards]),
        "reward_std": mean(spread),
        "frac_reward_zero_std": mean([float(s == 0) for s in spread]),
        "completions/mean_length": mean([len(r.token_ids) for r in rollouts]),
        "completions/clipped_ratio": mean([float(not r.finished) for r in rollouts]),
        "self_distillation/success_group_fraction": mean(
            [float(any(r.succeeded(threshold) for r in g.rollouts)) for g in groups]
        ),
        "self_distillation/reprompt_sample_fraction": len(shown) / len(rollouts),
        "self_distillation/teacher_prompt_length/mean": mean([len(prompt.token_ids) for prompt in shown]),
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def seed_of(run: Run, step: int) -> int:
    """Sampling depends on the run's seed and the step alone, so that a resumed run draws the same."""
    return run.config.training.seed * 1_000_003 + step * 1009


def save(run: Run, step: int) -> None:
    teacher = run.teacher if moves(run.config) else None
    student = run.accelerator.unwrap_model(run.student)
    limit = run.config.training.save_total_limit
    checkpoint.save(run.folder, step, run.accelerator, student, teacher, run.tokenizer, limit)


def held_out_scores(run: Run, name: str) -> Scores | None:
    """Scores on the held-out prompts, kept as evaluation-<name>.json; None where there are none."""
    if not run.eval_prompts or not run.config.evaluation.before_and_after:
        return None
    with console.status(f"evaluating {name} training"):
        path = run.folder / f"completions-{name}.jsonl"
        scores = evaluate(run.student, run.tokenizer, run.eval_prompts, run.task, run.config, path)
    write_json(run.folder / f"evaluation-{name}.json", asdict(scores))
    return scores


def finish(run: Run, before: Scores | None) -> None:
    """Evaluate again, draw, and say where everything is."""
    after = held_out_scores(run, "after")
    kept = run.folder / "evaluation-before.json"
    if before is None and kept.is_file():
        before = Scores(**read_json(kept))
    report.plot_run(read_jsonl(run.folder / METRICS), run.folder / "training.png", before, after)
    if before is not None and after is not None:
        console.print(report.before_after_table(before, after))
    run.accelerator.end_training()
    console.print(f"metrics, completions, plot and checkpoints: {run.folder}")


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


class Clock:
    """Seconds by phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        return {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
