"""mean@k and pass@k on held-out prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .config import Config, validate
from .data import build_prompts, split_rows
from .engines import Engine, build_engine, check_engine
from .files import write_json, write_jsonl
from .models import load_model, load_tokenizer, stop_token_ids
from .rollout import Group, Prompt
from .sampler import Sampling
from .tasks import Task, find_task
from .verify import judge


@dataclass(frozen=True)
class Scores:
    mean_at_k: float
    pass_at_k: float
    k: int
    prompts: int
    completion_length: float  # tokens, mean
    unjudged: int  # completions without a verdict: in neither score

    def as_dict(self) -> dict[str, Any]:
        return {
            f"mean@{self.k}": self.mean_at_k,
            f"pass@{self.k}": self.pass_at_k,
            "prompts": self.prompts,
            "completion_length": self.completion_length,
            "unjudged": self.unjudged,
        }


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the unbiased chance that k of the n samples hold a correct one (arXiv 2107.03374)."""
    if not 1 <= k <= samples:
        raise ValueError(f"expected 1 <= k <= {samples} samples, got {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def evaluate(
    engine: Engine,
    stop_ids: list[int],
    prompts: list[Prompt],
    task: Task,
    config: Config,
    completions_path: Path | None = None,
) -> Scores:
    """Sample k completions of each prompt with the evaluation settings, judge them, write them as jsonl."""
    settings = config.evaluation
    sampling = Sampling(
        settings.k,
        config.rollout.max_completion_length,
        settings.temperature,
        settings.top_p,
        config.rollout.generation_batch_size,
    )
    groups = engine.generate(prompts[: settings.num_prompts], sampling, stop_ids, settings.seed)
    judge(groups, task.reward, config.data.task)
    if completions_path is not None:
        write_jsonl(completions_path, [completion_record(group, i) for group in groups for i in range(settings.k)])
    return scores(groups, config.context.success_reward_threshold)


def scores(groups: list[Group], threshold: float) -> Scores:
    means, passes, unjudged = [], [], 0
    k = len(groups[0].rollouts)
    for group in groups:
        judged = [rollout for rollout in group.rollouts if rollout.reward is not None]
        unjudged += k - len(judged)
        if judged:
            correct = sum(rollout.succeeded(threshold) for rollout in judged)
            means.append(correct / len(judged))
            passes.append(pass_at_k(len(judged), correct, min(k, len(judged))))
    if not means:
        raise ValueError(f"the verifier gave no verdict on any of {len(groups) * k} completions: nothing to score")
    lengths = [len(rollout.token_ids) for group in groups for rollout in group.rollouts]
    return Scores(
        sum(means) / len(means), sum(passes) / len(passes), k, len(groups), sum(lengths) / len(lengths), unjudged
    )


def completion_record(group: Group, index: int) -> dict[str, Any]:
    """One line of a completions file."""
    rollout = group.rollouts[index]
    return {
        "prompt": group.prompt.messages,
        "completion": rollout.text,
        "completion_ids": rollout.token_ids,
        "finished": rollout.finished,
        "reward": rollout.reward,
        "feedback": rollout.feedback,
        **{key: value for key, value in group.prompt.row.items() if key != "prompt"},
    }


def evaluate_command(config: Config, output: Path) -> Scores:
    """`mopd eval`: load, evaluate, print a table, write scores.json and completions.jsonl."""
    validate(config)
    check_engine(config)
    task = find_task(config.data.task)
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    _, rows = split_rows(config.data, task)
    prompts = build_prompts(
        rows, task, config.data, tokenizer, config.data.eval_dataset or f"task {config.data.task!r}"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(config.model.model_name_or_path, config.model.dtype, config.model.attn_implementation, device)
    engine = build_engine(config, model, tokenizer)
    engine.update_weights(model)
    result = evaluate(engine, stop_token_ids(model, tokenizer), prompts, task, config, output / "completions.jsonl")
    record = {"model": config.model.model_name_or_path, "task": config.data.task, **result.as_dict()}
    write_json(output / "scores.json", record)
    table = Table(title=f"{config.model.model_name_or_path} on {config.data.task}")
    for name in result.as_dict():
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in result.as_dict().values()))
    Console().print(table)
    return result
