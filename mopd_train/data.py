"""Rows of a dataset, checked and turned into prompts; and which prompts a step takes."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import DataConfig
from .contexts import encode_prompt
from .rollout import Prompt
from .tasks import Row, Task, as_messages


def load_rows(source: str) -> list[Row]:
    """All rows of a jsonl, json or parquet file or of a hub dataset's train split."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json") and not path.is_file():
        raise FileNotFoundError(f"dataset {source} does not exist (looked in {Path.cwd()})")
    if path.suffix == ".jsonl":
        return [_parsed(line, f"{source}:{number}") for number, line in _lines(path)]
    if path.suffix == ".json":
        rows = _parsed(path.read_text(encoding="utf-8"), source)
        if not isinstance(rows, list):
            raise ValueError(f"expected a list of rows in {source}, got {type(rows).__name__}")
        return rows
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"dataset {source} needs the datasets package: pip install 'mopd[data]'") from error
    if path.suffix == ".parquet":
        return list(datasets.Dataset.from_parquet(str(path)))
    return list(datasets.load_dataset(source, split="train"))


def _lines(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error


def split_rows(config: DataConfig, task: Task) -> tuple[list[Row], list[Row]]:
    """Train and held-out rows: from the named datasets, else the task's own."""
    own = task.rows() if task.rows is not None else ([], [])
    train = load_rows(config.train_dataset) if config.train_dataset else own[0]
    # A dataset of the user's is not evaluated on the task's own prompts.
    held_out = load_rows(config.eval_dataset) if config.eval_dataset else ([] if config.train_dataset else own[1])
    return train, held_out


def build_prompts(
    rows: list[Row], task: Task, config: DataConfig, tokenizer: PreTrainedTokenizerBase, source: str
) -> list[Prompt]:
    """Prompts of all rows. ValueError with the row's number for a missing column or a prompt too long."""
    if not rows:
        raise ValueError(
            f"{source} has no rows; give --data.train_dataset / --data.eval_dataset or another --data.task"
        )
    prompts = []
    for number, row in enumerate(rows):
        missing = [column for column in ("prompt", *task.columns) if row.get(column) is None]
        if missing:
            raise ValueError(
                f"{source} row {number} lacks column {missing[0]!r}, which task {config.task!r} reads; "
                f"it has {sorted(row)}"
            )
        messages = as_messages(row["prompt"])
        if not any(message.get("role") == "user" for message in messages):
            raise ValueError(f"{source} row {number} has no user message in its prompt: {messages!r:.200}")
        token_ids = encode_prompt(messages, tokenizer, config.chat_template_kwargs)
        if len(token_ids) > config.max_prompt_length:
            raise ValueError(
                f"{source} row {number}: its prompt is {len(token_ids)} tokens, over "
                f"data.max_prompt_length={config.max_prompt_length}; raise the limit or drop the row"
            )
        prompts.append(Prompt(messages, token_ids, row))
    return prompts


def step_prompts(prompts: list[Prompt], step: int, per_step: int, seed: int) -> list[Prompt]:
    """The prompts of a step: epochs are permutations drawn from `seed`, read on without gaps. The step's
    number is all the position there is, so a resumed run goes on with the same prompts."""
    chosen = []
    for position in range(step * per_step, (step + 1) * per_step):
        epoch, offset = divmod(position, len(prompts))
        chosen.append(prompts[_permutation(len(prompts), f"{seed}/{epoch}")[offset]])
    return chosen


def step_seed(seed: int, step: int) -> int:
    """What a step samples from; group i of it draws its peers from this + i. It depends on the run's seed and the
    step alone, so that a resumed run draws the same."""
    return seed * 1_000_003 + step * 1009


@lru_cache(maxsize=2)  # a step reads one epoch, or the end of one and the start of the next
def _permutation(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
