"""Rows of a dataset, checked and turned into prompts; and which prompts a step takes."""

from __future__ import annotations

import inspect
import json
import logging
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from transformers import PreTrainedTokenizerBase

from .config import DataConfig
from .contexts import encode_prompt
from .rollout import Messages, Prompt
from .tasks import BENCHMARKS, NAMED_SETS, Row, Task, as_messages

logger = logging.getLogger(__name__)


class Located(dict[str, Any]):
    """A row that knows where it came from, for messages."""

    def __init__(self, row: Row, where: str) -> None:
        super().__init__(row)
        self.where = where


def load_rows(source: str) -> list[Row]:
    """All rows of a jsonl, json or parquet file, of a named set (`champ`, `reasoning-gym:gcd?size=64`), or of a hub
    dataset's train split. Errors name the file and line."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.is_file():
        raise FileNotFoundError(f"dataset {source} does not exist (looked in {Path.cwd()})")
    if path.suffix == ".jsonl":
        return list(_jsonl(path))
    if path.suffix == ".json":
        rows = _parsed(path.read_text(encoding="utf-8"), source)
        if not isinstance(rows, list):
            raise ValueError(f"expected a list of rows in {source}, got {type(rows).__name__}")
        return [_located(row, f"{source} row {number}") for number, row in enumerate(rows)]
    if path.suffix == ".parquet":
        return list(_parquet(path))
    name, _, rest = source.partition("?")[0].partition(":")
    if name in NAMED_SETS:
        return _named(source, name, rest)
    if path.is_file():
        raise ValueError(f"dataset {source} is a file of kind {path.suffix!r}, expected .jsonl, .json or .parquet")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"dataset {source!r} is no file and none of the named sets {sorted(NAMED_SETS)}; as a hub dataset it "
            "needs the datasets package: pip install 'mopd[data]'"
        ) from error
    return list(datasets.load_dataset(source, split="train"))


def _jsonl(path: Path) -> Iterator[Row]:
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            where = f"{path}:{number}"
            if line.strip():
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where} is not UTF-8: {error}") from error
                yield _located(_parsed(text, where), where)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"dataset {path} needs the pyarrow package: pip install 'mopd[parquet]'") from error
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from (Located(row, f"{path} row {number}") for number, row in enumerate(rows))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _named(source: str, name: str, variant: str) -> list[Row]:
    import yaml

    options = {key: yaml.safe_load(value) for key, value in parse_qsl(source.partition("?")[2], keep_blank_values=True)}
    function = NAMED_SETS[name]
    arguments = {**({"variant": variant} if variant else {}), **options}
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"dataset {source!r}: {error}; {name}{inspect.signature(function)}") from error
    return [Located(row, f"{source} row {number}") for number, row in enumerate(function(**arguments))]


def _located(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, expected an object with a prompt and columns")
    return Located(row, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error


def split_rows(config: DataConfig, task: Task) -> tuple[list[Row], list[Row]]:
    """Train and held-out rows in the task's columns: from the named datasets, else the task's own."""
    own = task.rows() if task.rows is not None and not config.train_dataset else ([], [])
    train = _adapted(config.train_dataset, task) if config.train_dataset else own[0]
    # A dataset of the user's is not evaluated on the task's own prompts.
    held_out = _adapted(config.eval_dataset, task) if config.eval_dataset else own[1]
    name = (config.train_dataset or "").partition("?")[0].partition(":")[0]
    if name in BENCHMARKS:
        logger.warning("training on %s, a benchmark: scores of this model on it are contaminated", config.train_dataset)
    return train, held_out


def _adapted(source: str, task: Task) -> list[Row]:
    adapted: list[Row] = []
    for number, row in enumerate(load_rows(source)):
        where = getattr(row, "where", f"{source} row {number}")
        plain = from_verl(row) if "reward_model" in row else row
        try:
            found = task.adapt(plain) if task.adapt is not None else plain
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{where} looks like a known layout and is not: {type(error).__name__}: {error}"
            ) from error
        adapted += [Located(one, where) for one in (found if isinstance(found, list) else [found])]
    return adapted


def from_verl(row: Row) -> Row:
    """verl's columns as ours: `reward_model.ground_truth` is the answer, the keys of `extra_info` are columns."""
    judged, more = row["reward_model"], row.get("extra_info") or {}
    kept = {key: value for key, value in row.items() if key not in ("reward_model", "extra_info")}
    truth = judged if isinstance(judged, dict) else {"ground_truth": judged}
    answer = {"answer": truth["ground_truth"]} if "ground_truth" in truth else {}
    return {**{key: value for key, value in more.items() if value is not None}, **kept, **answer}


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
        where = getattr(row, "where", f"{source} row {number}")
        missing = [column for column in ("prompt", *task.columns) if row.get(column) is None]
        if missing:
            raise ValueError(
                f"{where} lacks column {missing[0]!r}, which task {config.task!r} reads; it has {sorted(row)}"
            )
        try:
            messages = messages_of(row["prompt"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not any(message["role"] == "user" for message in messages):
            raise ValueError(f"{where} has no user message in its prompt: {messages!r:.200}")
        try:
            token_ids = encode_prompt(messages, tokenizer, config.chat_template_kwargs)
        except Exception as error:  # templates raise what they like
            raise ValueError(f"{where}: the chat template refuses its prompt: {error}") from error
        if len(token_ids) > config.max_prompt_length:
            raise ValueError(
                f"{where}: its prompt is {len(token_ids)} tokens, over "
                f"data.max_prompt_length={config.max_prompt_length}; raise the limit or drop the row"
            )
        prompts.append(Prompt(messages, token_ids, row))
    return prompts


def messages_of(prompt: Any) -> Messages:
    """A prompt, text or messages, as messages of text; parts of text are joined. ValueError for anything else."""
    messages = as_messages(prompt)
    if not isinstance(messages, list):
        raise ValueError(f"expected a string or a list of messages as prompt, got {prompt!r:.100}")
    checked = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"expected messages of the form {{role, content}} in a prompt, got {message!r:.100}")
        content: Any = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            checked.append({**message, "content": "".join(part["text"] for part in parts)})
        elif content is None and message["role"] == "assistant" and message.get("tool_calls"):
            checked.append(message)  # a call is all it says
        else:
            raise ValueError(f"expected text, or parts of text, as content of a message, got {content!r:.100}")
    return checked


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
