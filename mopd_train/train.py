"""The loop, to be read from top to bottom.

A step of MOPD: prompts -> G rollouts each -> verifier -> what the teacher reads -> teacher and student hidden states
of every completion token -> divergence -> backward -> AdamW -> teacher update. Other methods: objectives/.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import checkpoint, report, trackers
from .callbacks import Callback, Hooks
from .config import Config
from .contexts import TeacherPrompt, step_contexts
from .data import step_prompts, step_seed
from .evaluate import Scores, completion_records, evaluate
from .files import read_json, read_jsonl, write_json, write_jsonl
from .learn import learn
from .metrics import Clock, context_metrics, group_metrics
from .models import fingerprint, stop_token_ids
from .objectives import method_of
from .rollout import Group
from .rundir import METRICS, PLOT, MetricsFile
from .sampler import Sampling, sample
from .setup import Run, set_up
from .stopping import Stop, Stopped, listening
from .summaries import PeerSummaries, shares
from .tasks import RewardFunction
from .teacher import moves
from .verify import judge

console = Console()


def train(
    config: Config, reward_fns: Sequence[RewardFunction] | None = None, callbacks: Sequence[Callback] = ()
) -> Path:
    """Run the whole job and return its folder. `reward_fns` judge instead of the task's verifier. Every process of
    torchrun or accelerate launch calls it."""
    run = set_up(config, reward_fns)
    hooks = Hooks(run, callbacks)
    try:
        with listening() as stop:
            return _train(run, hooks, stop)
    except Exception as error:
        if run.ranks.size > 1:
            last = checkpoint.checkpoints(run.folder)
            kept = last[-1] if last else "none"
            error.add_note(f"process {run.ranks.rank} of {run.ranks.size}; last complete checkpoint: {kept}")
        raise


def _train(run: Run, hooks: Hooks, stop: Stop) -> Path:
    settings, ranks = run.config.training, run.ranks
    if run.first_step >= settings.max_steps and ranks.from_main((run.folder / PLOT).is_file()):
        say(run, f"{run.folder} is already at step {run.first_step} of {settings.max_steps}: nothing to do")
        run.accelerator.end_training()
        return run.folder
    done = saved = run.first_step
    hooks("on_train_begin", done)
    try:
        stop.check(ranks)
        before = held_out_scores(run, "before", hooks, 0) if done == 0 else None
        metrics_file = MetricsFile(run.folder, done) if ranks.is_main else None
        with progress_bar(ranks.is_main) as progress, metrics_file or nullcontext():
            bar = progress.add_task("training", total=settings.max_steps, completed=done)
            for step in range(done + 1, settings.max_steps + 1):
                stop.check(ranks)
                hooks("on_step_begin", step)
                metrics = {"step": step, **train_step(run, step, hooks, stop)}
                done = step
                hooks("on_step_end", step, metrics=metrics)
                if metrics_file is not None:
                    metrics_file.write(metrics)
                    run.accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=step)
                    line = report.step_line(metrics, settings.max_steps)
                    progress.console.print(line, highlight=False, soft_wrap=True)
                progress.advance(bar)
                last = step == settings.max_steps or any(ranks.everywhere(hooks.stopped))
                if last or step % settings.save_steps == 0:
                    hooks("on_save", step, checkpoint=save(run, step))
                    saved = step
                if last:
                    break
        stop.check(ranks)
    except Stopped as stopped:
        if done > saved:
            hooks("on_save", done, checkpoint=save(run, done))
        say(run, f"stopped by {stopped} after step {done}: training.resume_from_checkpoint=latest goes on")
        run.accelerator.end_training()
        return run.folder
    finish(run, before, hooks, done)
    hooks("on_train_end", done)
    return run.folder


def train_step(run: Run, step: int, hooks: Hooks | None = None, stop: Stop | None = None) -> dict[str, float]:
    """One batch of rollouts, one optimizer step; its metrics are those of all processes, on the main one.

    Stopped where a signal came before anything was learnt: the step, begun again, draws and learns the same.
    """
    config, clock, ranks, stop = run.config, Clock(), run.ranks, stop or Stop()
    with clock("weights"):
        run.rollouts.update_weights(run.student)
    with clock("rollout"):
        prompts = step_prompts(run.train_prompts, step - 1, config.rollout.num_prompts, config.training.seed)
        first, end = ranks.slice(len(prompts))
        sampling = Sampling(
            config.rollout.num_generations,
            config.rollout.max_completion_length,
            config.rollout.temperature,
            config.rollout.top_p,
            config.rollout.generation_batch_size,
        )
        stops = stop_token_ids(run.student, run.tokenizer)
        seed = seed_of(run, step)
        groups = run.rollouts.generate(prompts[first:end], sampling, stops, seed + first)
    stop.check(ranks)
    with clock("verify"):
        judge(groups, run.task.reward, config.data.task)
    if hooks is not None:
        hooks("on_rollouts", step, groups=groups)
    stop.check(ranks)
    contexts, about = read_contexts(run, groups, seed + first, clock)
    metrics = step_metrics(run, step, ranks.gathered(list(zip(groups, contexts, strict=True))))
    return metrics | about | learn(run, step, groups, contexts, clock) | clock.metrics()


def read_contexts(
    run: Run, groups: list[Group], seed: int, clock: Clock
) -> tuple[list[list[TeacherPrompt | None]], dict[str, float]]:
    """What the teacher reads of each rollout, where there is one; the student is asked for the summaries in it."""
    config, settings = run.config, run.config.context
    if method_of(config).teacher != "context":
        return [[None] * len(group.rollouts) for group in groups], {}

    def sampled(prompts: list[list[int]], tokens: int, seeds: list[int]) -> list[list[int]]:
        rollout, stops = config.rollout, stop_token_ids(run.student, run.tokenizer)
        sampling = Sampling(1, tokens, rollout.temperature, rollout.top_p, rollout.generation_batch_size)
        replies = sample(run.student, prompts, sampling, stops, int(run.tokenizer.pad_token_id), seeds)
        return [reply for (reply,) in replies]

    batch = groups
    if settings.peer_control_mode != "none":
        batch = [group for part in run.ranks.everywhere(groups) for group in part]
    template = config.data.chat_template_kwargs
    summaries = PeerSummaries(groups, run.tokenizer, settings, template, sampled, seed)
    with clock("contexts"), run.engine.sampling() if settings.summary_k else nullcontext():
        contexts = step_contexts(groups, run.tokenizer, settings, template, seed, summaries, batch)
    return contexts, shares(run.ranks.totals(summaries.counts)) if settings.summary_k else {}


def step_metrics(run: Run, step: int, judged: list[tuple[Group, list[TeacherPrompt | None]]]) -> dict[str, float]:
    """Write every completion and average over all groups; the other processes have none and do nothing."""
    if not run.ranks.is_main:
        return {}
    groups, contexts = [group for group, _ in judged], [prompts for _, prompts in judged]
    write_jsonl(
        run.folder / "completions" / f"step-{step:06d}.jsonl",
        completion_records(groups, step=step, **fingerprint(run.student, run.tokenizer)),
    )
    metrics = group_metrics(groups, run.config.context.success_reward_threshold)
    return metrics | (context_metrics(contexts) if method_of(run.config).teacher == "context" else {})


def seed_of(run: Run, step: int) -> int:
    return step_seed(run.config.training.seed, step)


def save(run: Run, step: int) -> Path:
    teacher = run.teacher if moves(run.config) else None
    limit = run.config.training.save_total_limit
    return checkpoint.save(
        run.folder, step, run.ranks, run.student, teacher, run.optimizer, run.scheduler, run.tokenizer, limit
    )


def held_out_scores(run: Run, name: str, hooks: Hooks, step: int) -> Scores | None:
    """Scores on the held-out prompts, kept as evaluation-<name>.json; None where there are none, and on processes
    other than the main one."""
    if not run.eval_prompts or not run.config.evaluation.before_and_after:
        return None
    path = run.folder / f"completions-{name}.jsonl"
    with console.status(f"evaluating {name} training") if run.ranks.is_main else nullcontext():
        scores = evaluate(
            run.rollouts, run.student, run.tokenizer, run.eval_prompts, run.task, run.config, path, run.ranks
        )
    if scores is not None:
        write_json(run.folder / f"evaluation-{name}.json", asdict(scores))
    hooks("on_evaluate", step, scores=scores)
    return scores


def finish(run: Run, before: Scores | None, hooks: Hooks, step: int) -> None:
    """Evaluate again, draw, upload if asked, and say where everything is."""
    after = held_out_scores(run, "after", hooks, step)
    if run.ranks.is_main:
        kept = run.folder / "evaluation-before.json"
        if before is None and kept.is_file():
            before = Scores(**read_json(kept))
        report.plot_run(read_jsonl(run.folder / METRICS), run.folder / PLOT, before, after)
        if before is not None and after is not None:
            console.print(report.before_after_table(before, after))
        if skipped := sum(row.get("skipped_steps", 0) for row in read_jsonl(run.folder / METRICS)):
            say(run, f"{skipped:.0f} of {step} steps had no rollout to learn from: skipped")
        if run.config.training.push_to_hub:
            address = trackers.push(run.config.training, checkpoint.checkpoints(run.folder)[-1])
            console.print(f"uploaded to {address}")
    run.accelerator.end_training()
    say(run, f"metrics, completions, plot and checkpoints: {run.folder}")


def say(run: Run, text: str) -> None:
    if run.ranks.is_main:
        console.print(text)


def progress_bar(shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not shown)


class _CallableModule(ModuleType):
    """`from mopd_train import train` finds this module once it is loaded, and calls it."""

    def __call__(self, *arguments: Any, **named: Any) -> Path:
        return train(*arguments, **named)


sys.modules[__name__].__class__ = _CallableModule
