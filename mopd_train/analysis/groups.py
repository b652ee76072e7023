"""Rollouts saved by a run, read back as groups: one group in memory at a time, however large the files.

A group is consecutive lines of one file with the same `group` number and the same prompt; files without the number
(of other tools) are grouped by prompt alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..contexts import encode_prompt
from ..data import messages_of
from ..rollout import Group, Prompt, Rollout

REMEDY = "; --skip-bad-lines drops such lines and keeps the rest"
OURS = ("group", "completion", "completion_ids", "finished", "reward", "feedback", "step", "model", "tokenizer")
REQUIRED = ("prompt", "completion", "completion_ids", "reward")
NAMED = 20  # bad lines remembered by name; the others are counted


@dataclass(frozen=True)
class SavedGroup:
    """A group and where it was read: `line` is its first line, `number` its place in the file, `step` the training
    step that sampled it, if any."""

    group: Group
    path: Path
    line: int
    number: int
    step: int | None


@dataclass
class RolloutFiles:
    """Iterable of the groups in completions files, read anew each time.

    tokenizer: of the model that is to score. None where only texts and rewards are read: ids are not compared with
    texts, and prompts have no ids.
    expected: fingerprint (models.fingerprint) of the model that is to score. Rollouts of another tokenizer are always
    refused: their ids mean other tokens. Those of another architecture are refused unless `other_model`, which is
    for teachers larger than the student.
    skip_bad_lines: a line that is no rollout is dropped and counted, else ValueError with file:line.
    """

    paths: list[Path]
    tokenizer: PreTrainedTokenizerBase | None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, str] | None = None
    other_model: bool = False
    skip_bad_lines: bool = False
    bad_lines: int = field(default=0, init=False)
    named: list[str] = field(default_factory=list, init=False)
    bytes_read: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        """Bytes of all files, against which `bytes_read` grows."""
        return sum(path.stat().st_size for path in self.paths)

    def __iter__(self) -> Iterator[SavedGroup]:
        self.bad_lines, self.named, self.bytes_read = 0, [], 0
        for path in self.paths:
            yield from self._groups(path)

    def _groups(self, path: Path) -> Iterator[SavedGroup]:
        current: SavedGroup | None = None
        key: tuple[Any, Any] | None = None
        number = -1
        for line, record in self._records(path):
            if current is None or (record.get("group"), record["prompt"]) != key:
                if current is not None:
                    yield current
                key = (record.get("group"), record["prompt"])
                number = number + 1 if record.get("group") is None else record["group"]
                current = SavedGroup(Group(self._prompt(record, path, line)), path, line, number, record.get("step"))
            current.group.rollouts.append(_rollout(record))
        if current is not None:
            yield current

    def _records(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        with open(path, "rb") as handle:
            for line, raw in enumerate(handle, start=1):
                self.bytes_read += len(raw)
                if not raw.strip():
                    continue
                where = f"{path}:{line}"
                try:
                    record = json.loads(raw)
                    check_record(record, self.tokenizer)
                except ValueError as error:  # JSON and UTF-8 errors are ValueErrors as well
                    if not self.skip_bad_lines:
                        raise ValueError(f"{where} is no rollout: {error}{REMEDY}") from error
                    self.bad_lines += 1
                    if len(self.named) < NAMED:
                        self.named.append(f"{where}: {error}")
                    continue
                self._check_origin(record, where)
                yield line, record

    def _check_origin(self, record: dict[str, Any], where: str) -> None:
        for key, ours in (self.expected or {}).items():
            theirs = record.get(key)
            if theirs in (None, ours) or (key == "model" and self.other_model):
                continue
            remedy = "pass --other-model if that is meant" if key == "model" else "score them with their own model"
            raise ValueError(f"{where} was sampled with {key} {theirs!r}, the scoring model has {ours!r}: {remedy}")

    def _prompt(self, record: dict[str, Any], path: Path, line: int) -> Prompt:
        messages = messages_of(record["prompt"])
        row = {key: value for key, value in record.items() if key not in OURS}
        if self.tokenizer is None:
            return Prompt(messages, [], row)
        try:
            return Prompt(messages, encode_prompt(messages, self.tokenizer, self.chat_template_kwargs), row)
        except Exception as error:  # templates raise what they like
            raise ValueError(f"{path}:{line}: the chat template refuses its prompt: {error}") from error


def check_record(record: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """ValueError that says why a line is no rollout (of this tokenizer)."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    missing = [key for key in REQUIRED if key not in record]
    if missing:
        hint = " (null stands for 'no verdict')" if missing[0] == "reward" else ""
        raise ValueError(f"it has no {missing[0]!r}{hint}; it has {sorted(record)}")
    prompt, text, ids, reward = (record[key] for key in ("prompt", "completion", "completion_ids", "reward"))
    if not isinstance(prompt, str):
        turns = prompt if isinstance(prompt, list) else []
        if not any(isinstance(turn, dict) and turn.get("role") == "user" for turn in turns):
            raise ValueError(f"expected a string or messages with a user turn as prompt, got {prompt!r:.100}")
        messages_of(prompt)
    if not isinstance(text, str):
        raise ValueError(f"expected a string as completion, got {type(text).__name__}")
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ValueError(f"expected a list of token ids as completion_ids, got {ids!r:.60}")
    for key in ("group", "step"):
        if type(record.get(key)) not in (int, type(None)):
            raise ValueError(f"expected an integer as {key}, got {record[key]!r:.60}")
    if reward is not None and not (type(reward) in (int, float, bool) and math.isfinite(reward)):
        raise ValueError(f"expected a finite number or null as reward, got {reward!r:.60}")
    if tokenizer is not None:
        _check_tokens(ids, text, tokenizer)


def _check_tokens(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ids of another vocabulary would be scored without complaint, as other words."""
    if min(ids) < 0 or max(ids) >= len(tokenizer):
        raise ValueError(f"token ids run from {min(ids)} to {max(ids)}, the tokenizer has {len(tokenizer)} tokens")
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if decoded != text:
        raise ValueError(
            f"its ids decode to {decoded!r:.80}, its text is {text!r:.80}: the rollout is of another tokenizer"
        )


def _rollout(record: dict[str, Any]) -> Rollout:
    reward = record["reward"]
    return Rollout(
        record["completion_ids"],
        record["completion"],
        bool(record.get("finished", True)),
        None if reward is None else float(reward),
        record.get("feedback"),
    )


def rollout_paths(names: Iterable[str]) -> list[Path]:
    """Files as they are; a run's folder stands for its completions/step-*.jsonl, another for its *.jsonl."""
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted((path / "completions").glob("step-*.jsonl")) or sorted(path.glob("*.jsonl"))
            if not found:
                raise FileNotFoundError(f"{path} holds no completions/step-*.jsonl and no *.jsonl of rollouts")
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise FileNotFoundError(f"no such rollouts file or run folder: {path} (looked in {Path.cwd()})")
    return paths
