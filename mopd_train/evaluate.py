"""mean@k and pass@k on held-out prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import Config, validate
from .data import build_prompts, split_rows
from .distributed import Ranks
from .files import write_json, write_jsonl
from .models import fingerprint, load_model, load_tokenizer, stop_token_ids
from .rewards import task_of
from .rollout import Group, Prompt
from .rollout_engines import RolloutEngine, build_rollout_engine, check_rollout_engine
from .sampler import Sampling
from .tasks import Task
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
    rollouts: RolloutEngine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    task: Task,
    config: Config,
    completions_path: Path | None = None,
    ranks: Ranks | None = None,  # None: this process alone
) -> Scores | None:
    """Sample k completions of each prompt from `model` with the evaluation settings, judge them, write them as jsonl.
    Several processes take a part of the prompts each; the scores are the main one's, None on the others."""
    settings = config.evaluation
    sampling = Sampling(
        settings.k,
        config.rollout.max_completion_length,
        settings.temperature,
        settings.top_p,
        config.rollout.generation_batch_size,
    )
    rollouts.update_weights(model)
    stops, ranks = stop_token_ids(model, tokenizer), ranks or Ranks()
    chosen = prompts[: settings.num_prompts]
    first, stop = ranks.slice(len(chosen))
    groups = rollouts.generate(chosen[first:stop], sampling, stops, settings.seed + first)
    judge(groups, task.reward, config.data.task)
    groups = ranks.gathered(groups)
    if not ranks.is_main:
        return None
    if completions_path is not None:
        write_jsonl(completions_path, completion_records(groups, **fingerprint(model, tokenizer)))
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


UNWRITTEN = ("tests", "test", "prelude")  # hidden tests of programs: megabytes that every completion would repeat


def completion_records(groups: list[Group], **origin: Any) -> list[dict[str, Any]]:
    """Lines of a completions file, group after group. `origin` (step, fingerprint of the model) is on each; columns
    of the dataset stand beside ours, which win where names collide."""
    return [
        {
            **{key: value for key, value in group.prompt.row.items() if key not in UNWRITTEN},
            "prompt": group.prompt.messages,
            "group": number,
            "completion": rollout.text,
            "completion_ids": rollout.token_ids,
            "finished": rollout.finished,
            "reward": rollout.reward,
            "feedback": rollout.feedback,
            **({"scores": rollout.scores} if len(rollout.scores) > 1 else {}),
            **origin,
        }
        for number, group in enumerate(groups)
        for rollout in group.rollouts
    ]


def evaluate_command(config: Config, output: Path) -> Scores:
    """`mopd eval`: load, evaluate, print a table, write scores.json and completions.jsonl."""
    validate(config)
    check_rollout_engine(config)
    task = task_of(config)
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    _, rows = split_rows(config.data, task)
    prompts = build_prompts(
        rows, task, config.data, tokenizer, config.data.eval_dataset or f"task {config.data.task!r}"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(config.model.model_name_or_path, config.model.dtype, config.model.attn_implementation, device)
    rollouts = build_rollout_engine(config, model, tokenizer)
    result = evaluate(rollouts, model, tokenizer, prompts, task, config, output / "completions.jsonl")
    assert result is not None, "one process has all prompts"
    record = {"model": config.model.model_name_or_path, "task": config.data.task, **result.as_dict()}
    write_json(output / "scores.json", record)
    table = Table(title=f"{config.model.model_name_or_path} on {config.data.task}")
    for name in result.as_dict():
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in result.as_dict().values()))
    Console().print(table)
    return result
