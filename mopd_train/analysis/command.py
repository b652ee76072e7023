"""`mopd analyze`: sample or read rollouts, score them, and write tables and plots. A killed analysis goes on where it
stopped when it is started again with the same settings.

output/  settings.json   what is analysed, and how
         rollouts.jsonl  sampled here, unless --rollouts names files
         scored.jsonl    one line a group, written as soon as it is scored
         analysis.json   counts, metrics, controls, every score
         auc.png margins.png
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config, validate
from ..data import build_prompts, split_rows, step_prompts, step_seed
from ..evaluate import completion_records
from ..files import read_json, read_jsonl, write_json, write_jsonl
from ..models import fingerprint, load_model, resolve, stop_token_ids
from ..rewards import task_of
from ..rollout import generate
from ..sampler import Sampling
from ..verify import judge
from .alignment import statistics
from .groups import RolloutFiles, rollout_paths
from .plots import plot_auc, plot_margins
from .scored import ScoredGroup, score_groups
from .sides import load_teacher, teacher_name, tokenizer_of, warn_of_other_settings
from .summary import Analysis, summarise
from .tables import auc_table, controls_table, metrics_table, number
from .teacher_signal import check_contexts, with_controls

console = Console()


@dataclass(frozen=True)
class AnalyzeOptions:
    """What `mopd analyze` does; `mopd analyze --help` explains each."""

    rollouts: list[str]
    output: str
    contexts: list[str]
    num_prompts: int
    controls: bool
    resamples: int
    reference: str
    skip_bad_lines: bool
    other_model: bool
    overwrite: bool


def analyze_command(config: Config, options: AnalyzeOptions) -> Analysis:
    started = time.perf_counter()
    statistics()  # asked for before any work
    validate(config)
    contexts = check_contexts(options.contexts or None, options.reference)
    if options.num_prompts < 0 or options.resamples < 1:
        raise ValueError(
            f"expected --num-prompts >= 0 and --resamples >= 1, got {options.num_prompts} and {options.resamples}"
        )
    named = rollout_paths(options.rollouts)
    warn_of_other_settings(config, [*named, Path(resolve(config.model.model_name_or_path))])
    tokenizer = tokenizer_of(config.model.model_name_or_path)
    output = claim(Path(options.output), config, options, contexts)
    paths = named or [sampled_rollouts(config, tokenizer, output, options.num_prompts or 64)]
    teacher = load_teacher(config, tokenizer)
    files = RolloutFiles(
        paths,
        tokenizer,
        config.data.chat_template_kwargs,
        expected=fingerprint(teacher, tokenizer),
        # A frozen teacher is allowed to be another model than the student that sampled.
        other_model=options.other_model or config.distillation.teacher_model_name_or_path is not None,
        skip_bad_lines=options.skip_bad_lines,
    )
    conditions = with_controls(contexts, options.controls)
    scored = score_files(teacher, tokenizer, files, conditions, config, output, options.num_prompts)
    threshold, seed = config.context.success_reward_threshold, config.training.seed
    analysis = summarise(scored, contexts, threshold, options.resamples, seed, options.reference)
    about = {
        "model": config.model.model_name_or_path,
        "teacher": teacher_name(config),
        "task": config.data.task,
        "rollouts": [str(path) for path in paths],
        "bad_lines": {"count": files.bad_lines, "first": files.named},
        "seconds": time.perf_counter() - started,
    }
    write_json(output / "analysis.json", about | analysis.to_dict())
    plot_auc(analysis, output / "auc.png")
    plot_margins(analysis, output / "margins.png")
    show(analysis, about, output)
    return analysis


def claim(output: Path, config: Config, options: AnalyzeOptions, contexts: list[str]) -> Path:
    """The folder, ours: new, or left by the same analysis. FileExistsError for another one's."""
    sections = ("model", "data", "rollout", "context", "distillation")
    settings: dict[str, Any] = {name: value for name, value in config.as_dict().items() if name in sections}
    settings |= {"seed": config.training.seed, "contexts": contexts, "controls": options.controls}
    settings |= {"rollouts": options.rollouts, "num_prompts": options.num_prompts, "teacher": teacher_name(config)}
    kept = output / "settings.json"
    if output.is_dir() and any(output.iterdir()):
        if not kept.is_file():
            raise FileExistsError(f"--output {output} is not empty and holds no analysis: choose another folder")
        before = read_json(kept)
        changed = [key for key, value in settings.items() if before.get(key) != value]
        if changed and not options.overwrite:
            raise FileExistsError(
                f"--output {output} holds an analysis with other settings ({', '.join(changed)}): choose another "
                "folder, or replace it by --overwrite"
            )
        if options.overwrite:
            shutil.rmtree(output)
    write_json(kept, settings)
    return output


def sampled_rollouts(config: Config, tokenizer: PreTrainedTokenizerBase, output: Path, count: int) -> Path:
    """`count` training prompts of the task, sampled with the rollout settings and judged; done once."""
    path = output / "rollouts.jsonl"
    if path.is_file():
        return path
    task = task_of(config)
    rows, _ = split_rows(config.data, task)
    source = config.data.train_dataset or f"task {config.data.task!r}"
    prompts = build_prompts(rows, task, config.data, tokenizer, source)
    if count > len(prompts):
        raise ValueError(f"{source} has {len(prompts)} prompts, --num-prompts asks for {count}")
    model = config.model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = load_model(model.model_name_or_path, model.dtype, model.attn_implementation, device)
    rollout = config.rollout
    sampling = Sampling(
        rollout.num_generations,
        rollout.max_completion_length,
        rollout.temperature,
        rollout.top_p,
        rollout.generation_batch_size,
    )
    stops, seed = stop_token_ids(student, tokenizer), config.training.seed
    chosen = step_prompts(prompts, 0, count, seed)
    at_once = max(1, rollout.generation_batch_size // rollout.num_generations)
    groups = []
    with progress_bar() as progress:
        bar = progress.add_task("sampling", total=count)
        for first in range(0, count, at_once):
            batch = chosen[first : first + at_once]
            groups += generate(student, tokenizer, batch, sampling, stops, step_seed(seed, 0) + first)
            progress.advance(bar, len(batch))
    judge(groups, task.reward, config.data.task)
    write_jsonl(path, completion_records(groups, **fingerprint(student, tokenizer)))
    return path


def score_files(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: RolloutFiles,
    conditions: list[str],
    config: Config,
    output: Path,
    limit: int,
) -> list[ScoredGroup]:
    """Every group scored; those of an interrupted analysis are taken from scored.jsonl."""
    path = output / "scored.jsonl"
    known = {row["key"]: ScoredGroup(**row) for row in read_jsonl(path)} if path.is_file() else {}
    write_jsonl(path, [asdict(group) for group in known.values()])  # without a line cut short by a kill
    scored = []
    groups = islice(files, limit) if limit else files
    with progress_bar() as progress, open(path, "a", encoding="utf-8") as handle:
        bar = progress.add_task("scoring", total=files.size)
        for group in score_groups(teacher, tokenizer, groups, conditions, config, known):
            if group.key not in known:
                handle.write(json.dumps(asdict(group)) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
            scored.append(group)
            progress.update(bar, completed=files.bytes_read, description=f"scoring: {len(scored)} groups")
        progress.update(bar, completed=files.size)
    return scored


def show(analysis: Analysis, about: dict[str, Any], output: Path) -> None:
    counts = analysis.counts
    console.print(auc_table(analysis, f"{about['teacher']} on rollouts of {about['task']}"))
    console.print(metrics_table(analysis))
    if analysis.controls:
        console.print(controls_table(analysis))
    if about["bad_lines"]["count"]:
        console.print(f"{about['bad_lines']['count']} bad lines dropped, first: {about['bad_lines']['first'][0]}")
    console.print(
        f"{counts['groups']} groups: {counts['mixed_groups']} hold successes and failures, {counts['uniform_groups']} "
        f"one reward only, {counts['groups_of_one']} fewer than two verdicts; {counts['unjudged_rollouts']} rollouts "
        f"without a verdict. Length alone, shorter first, has an AUC of {number(counts['shorter_first_auc'])}. "
        f"{counts['tokens_computed']} of {counts['tokens_total']} tokens computed, scoring took "
        f"{counts['scoring_seconds']:.1f} s, this start {about['seconds']:.1f} s. Written: {output}",
        highlight=False,
        soft_wrap=True,
    )


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console
    )
