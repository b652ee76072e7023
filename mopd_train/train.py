"""The MOPD loop, to be read from top to bottom.

A step: prompts -> G rollouts each -> verifier -> what the teacher reads -> teacher and student hidden states
of every completion token -> divergence -> backward -> AdamW -> teacher update.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import checkpoint, report
from .config import Config
from .contexts import teacher_prompts
from .data import step_prompts
from .evaluate import Scores, completion_record, evaluate
from .files import read_json, read_jsonl, write_json, write_jsonl
from .learn import learn, to_examples
from .metrics import Clock, group_metrics
from .models import stop_token_ids
from .rundir import METRICS, MetricsFile
from .sampler import Sampling
from .setup import Run, moves, set_up
from .verify import judge

logger = logging.getLogger(__name__)
console = Console()

PLOT = "training.png"  # drawn last: with it a run is complete


def train(config: Config) -> Path:
    """Run the whole job and return its folder."""
    run = set_up(config)
    settings = config.training
    if run.first_step >= settings.max_steps and (run.folder / PLOT).is_file():
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
            progress.console.print(report.step_line(metrics, settings.max_steps), highlight=False, soft_wrap=True)
            progress.advance(bar)
            if step % settings.save_steps == 0 or step == settings.max_steps:
                save(run, step)
    metrics_file.close()
    finish(run, before)
    return run.folder


def train_step(run: Run, step: int) -> dict[str, float]:
    """One batch of rollouts, one optimizer step."""
    config, clock = run.config, Clock()
    with clock("weights"):
        run.engine.update_weights(run.accelerator.unwrap_model(run.student))
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
        groups = run.engine.generate(prompts, sampling, stops, seed_of(run, step))
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
    metrics = group_metrics(groups, contexts, config.context.success_reward_threshold)
    metrics |= learn(run, step, to_examples(groups, contexts), clock)
    return metrics | clock.metrics()


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
        run.engine.update_weights(run.accelerator.unwrap_model(run.student))
        stops = stop_token_ids(run.student, run.tokenizer)
        scores = evaluate(run.engine, stops, run.eval_prompts, run.task, run.config, path)
    write_json(run.folder / f"evaluation-{name}.json", asdict(scores))
    return scores


def finish(run: Run, before: Scores | None) -> None:
    """Evaluate again, draw, and say where everything is."""
    after = held_out_scores(run, "after")
    kept = run.folder / "evaluation-before.json"
    if before is None and kept.is_file():
        before = Scores(**read_json(kept))
    report.plot_run(read_jsonl(run.folder / METRICS), run.folder / PLOT, before, after)
    if before is not None and after is not None:
        console.print(report.before_after_table(before, after))
    run.accelerator.end_training()
    console.print(f"metrics, completions, plot and checkpoints: {run.folder}")


def progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)
