"""Tasks: where prompts come from and how completions are judged. A new task is one file and one line here.

A reward function is `fn(prompts, completions, completion_ids, **columns) -> list[float | None | dict]`, one
entry a completion: a reward, None for "no verdict", or {"score": reward, "feedback": text, ...}.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import arithmetic, math

if TYPE_CHECKING:  # a verifier's worker process imports this package, and not torch
    from ..rollout import Messages

Row = dict[str, Any]
RewardFunction = Callable[..., Sequence[float | dict[str, Any] | None]]


@dataclass(frozen=True)
class Task:
    """columns: what a row must hold beside `prompt`; rows: the task's own (train, held-out) prompts, if any."""

    reward: RewardFunction
    columns: tuple[str, ...] = ()
    rows: Callable[[], tuple[list[Row], list[Row]]] | None = None


TASKS: dict[str, Task] = {
    "arithmetic": Task(arithmetic.reward, ("answer",), arithmetic.rows),
    "math": Task(math.reward, ("answer",)),
}


def find_task(name: str) -> Task:
    """A task by name, or one whose reward function is the dotted path `name`."""
    if name in TASKS:
        return TASKS[name]
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
