"""`mopd inspect`: rollout groups, token by token, under several contexts, as one HTML file."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config, validate
from ..contexts import CONTEXTS
from ..data import step_seed
from ..files import replacing
from ..models import fingerprint, load_model, resolve
from .groups import RolloutFiles, SavedGroup, rollout_paths
from .inspect_page import GroupData, render
from .inspect_scores import RolloutScores, score_group
from .sides import load_teacher, teacher_name, tokenizer_of, warn_of_other_settings

console = Console()


@dataclass(frozen=True)
class InspectOptions:
    """What `mopd inspect` shows; `mopd inspect --help` explains each."""

    rollouts: list[str]
    output: str
    contexts: list[str]
    groups: list[int]
    max_groups: int
    only_mixed: bool
    top: int
    skip_bad_lines: bool
    other_model: bool


def inspect_command(config: Config, options: InspectOptions) -> Path:
    """Score the chosen groups and write the page; its path."""
    started = time.perf_counter()
    contexts = list(dict.fromkeys([*options.contexts, config.context.context]))
    check_options(options)
    validate(config)
    paths = rollout_paths(options.rollouts)
    warn_of_other_settings(config, [*paths, Path(resolve(config.model.model_name_or_path))])
    tokenizer = tokenizer_of(config.model.model_name_or_path)
    student, teacher, taught_by = load_sides(config, tokenizer)
    files = RolloutFiles(
        paths,
        tokenizer,
        config.data.chat_template_kwargs,
        expected=fingerprint(student, tokenizer),
        other_model=options.other_model,
        skip_bad_lines=options.skip_bad_lines,
    )
    threshold = config.context.success_reward_threshold
    collected = GroupData(tokenizer, threshold)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("scoring groups", total=len(options.groups) or options.max_groups)
        for number, saved in chosen_groups(files, options, threshold):
            seed = step_seed(config.training.seed, saved.step or 0) + saved.number  # the peers that training drew
            scored = score_group(student, teacher, tokenizer, saved.group, contexts, config, seed, options.top)
            check_finite(scored, saved)
            task = str(saved.group.prompt.row.get("data_source") or config.data.task)
            collected.add(number, task, saved.group, scored)
            progress.advance(bar)
    if not collected.groups:
        raise ValueError(f"no group of {[str(path) for path in paths]} was chosen: nothing to show")
    if files.bad_lines:
        console.print(f"{files.bad_lines} lines are no rollouts and were dropped: {files.named}", highlight=False)
    about = (
        f"student {config.model.model_name_or_path}, teacher {taught_by}, "
        f"alpha {config.distillation.alpha:g}, temperature {config.rollout.temperature:g}, {', '.join(map(str, paths))}"
    )
    output = Path(options.output)
    with replacing(output) as handle:
        page = {"about": about, "contexts": contexts, **collected.as_dict()}
        handle.write(render("inspect", "Rollout groups", page))
    seconds, size = time.perf_counter() - started, output.stat().st_size
    console.print(f"{len(collected.groups)} groups, {size / 1e6:.2f} MB, {seconds:.1f} s: {output}", highlight=False)
    return output


def check_options(options: InspectOptions) -> None:
    """ValueError before anything is loaded."""
    unknown = [name for name in options.contexts if name not in CONTEXTS]
    if unknown:
        raise ValueError(f"expected --contexts in {list(CONTEXTS)}, got {unknown}")
    counts = {"--max-groups": options.max_groups, "--top": options.top}
    counts["--groups, numbered from 1,"] = min(options.groups, default=1)
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")


def load_sides(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, PreTrainedModel, str]:
    """Student, teacher and the teacher's name. A teacher that is the student itself is loaded once."""
    model, name = config.model, teacher_name(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = load_model(model.model_name_or_path, model.dtype, model.attn_implementation, device)
    if name == model.model_name_or_path:
        return student, student, "the student itself"
    return student, load_teacher(config, tokenizer), name


def chosen_groups(files: RolloutFiles, options: InspectOptions, threshold: float) -> Iterator[tuple[int, SavedGroup]]:
    """The groups asked for, each with its number over all files, from 1. Reading stops behind the last of them."""
    wanted, found, number = set(options.groups), 0, 0
    for number, saved in enumerate(files, start=1):
        rollouts = saved.group.rollouts
        mixed = any(r.succeeded(threshold) for r in rollouts) and any(r.failed(threshold) for r in rollouts)
        if (wanted and number not in wanted) or (options.only_mixed and not mixed):
            continue
        yield number, saved
        found += 1
        if found == (len(wanted) or options.max_groups):
            return
    if wanted and not options.only_mixed:
        raise ValueError(f"the files have no groups {sorted(n for n in wanted if n > number)}, only {number}")


def check_finite(scored: list[RolloutScores], saved: SavedGroup) -> None:
    for i, scores in enumerate(scored, start=1):
        sides = [scores.student, *scores.teacher]
        numbers = [x for side in sides for x in (*side.logprobs, *side.entropy)]
        numbers += [x for teacher in scores.teacher for x in teacher.divergence]
        if not all(map(math.isfinite, numbers)):
            raise FloatingPointError(
                f"non-finite log-prob or divergence in rollout {i} of the group at {saved.path}:{saved.line}: "
                "the model's weights or its dtype are at fault"
            )
