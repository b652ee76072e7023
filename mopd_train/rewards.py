"""Reward functions: one or several, sync or async, under a time limit, as one function of a batch.

A reward function has TRL's signature: `fn(prompts, completions, completion_ids, **columns)`, called with keywords and
with those arguments only that it takes. It gives one entry a completion: a reward, None for "no verdict", or
{"score": reward, "feedback": text}. Unlike TRL's, completions are text also where prompts are messages.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import inspect
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from .config import Config
from .tasks import RewardFunction, Task, find_task

GRACE = 30.0  # seconds after the limit until a process that does not even take signals is ended


class RewardTimeout(BaseException):
    """Not an Exception, so that a reward function's own handlers do not swallow it."""


@dataclass(frozen=True)
class Rewards:
    """The weighted sum of the functions' rewards of each completion.

    A function without a verdict on a completion is left out of its sum; without any verdict there is none. Async
    functions run concurrently, after the others. TimeoutError if all together take over `timeout` seconds.
    """

    functions: tuple[RewardFunction, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    timeout: float

    def __call__(self, **arguments: Any) -> list[dict[str, Any]]:
        count = len(arguments["completions"])
        with time_limit(self.timeout):
            given = self._given(arguments)
        columns = []
        for name, verdicts in zip(self.names, given, strict=True):
            if not hasattr(verdicts, "__len__"):
                raise TypeError(f"reward function {name!r}: expected a list of {count} verdicts, got {verdicts!r:.100}")
            if len(verdicts) != count:
                raise ValueError(f"reward function {name!r}: expected {count} verdicts, got {len(verdicts)}")
            columns.append([_checked(verdict, name, arguments, i) for i, verdict in enumerate(verdicts)])
        return [self._combined(verdicts) for verdicts in zip(*columns, strict=True)]

    def _given(self, arguments: dict[str, Any]) -> list[Sequence[Any]]:
        given: list[Any] = []
        for function, name in zip(self.functions, self.names, strict=True):
            try:
                given.append(function(**_taken(function, arguments)))
            except Exception as error:
                raise RuntimeError(f"reward function {name!r} raised {type(error).__name__}: {error}") from error
        waiting = [i for i, value in enumerate(given) if inspect.isawaitable(value)]
        for i, value in zip(waiting, _gathered([given[i] for i in waiting]), strict=True):
            if isinstance(value, BaseException):
                raise RuntimeError(
                    f"reward function {self.names[i]!r} raised {type(value).__name__}: {value}"
                ) from value
            given[i] = value
        return given

    def _combined(self, verdicts: tuple[dict[str, Any], ...]) -> dict[str, Any]:
        scores = [verdict["score"] for verdict in verdicts]
        judged = [w * score for w, score in zip(self.weights, scores, strict=True) if score is not None]
        feedback = "\n".join(verdict["feedback"] for verdict in verdicts if verdict["feedback"])
        return {
            "score": sum(judged) if judged else None,
            "feedback": feedback or None,
            "scores": dict(zip(self.names, scores, strict=True)),
        }


def _taken(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    return {parameter.name: arguments[parameter.name] for parameter in parameters if parameter.name in arguments}


def _checked(verdict: Any, name: str, arguments: dict[str, Any], index: int) -> dict[str, Any]:
    score = verdict.get("score") if isinstance(verdict, dict) else verdict
    feedback = verdict.get("feedback") if isinstance(verdict, dict) else None
    try:
        number = None if score is None else float(score)
    except (TypeError, ValueError) as error:
        raise TypeError(f"reward function {name!r} gave {score!r}, expected a number, None or a dict") from error
    if number is not None and not math.isfinite(number):
        raise ValueError(
            f"reward function {name!r} gave {number} for prompt {shown(arguments['prompts'][index])} and completion "
            f"{arguments['completions'][index]!r:.200}; return None for 'no verdict'"
        )
    return {"score": number, "feedback": feedback}


def shown(prompt: Any) -> str:
    """The last message of a prompt, short enough for an error."""
    return f"{prompt if isinstance(prompt, str) else prompt[-1]['content']!r:.200}"


def _gathered(awaitables: list[Any]) -> list[Any]:
    async def gather() -> list[Any]:
        return list(await asyncio.gather(*awaitables, return_exceptions=True))

    if not awaitables:
        return []
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(gather())
    with ThreadPoolExecutor(1) as thread:  # a notebook has a loop running already
        return thread.submit(asyncio.run, gather()).result()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError if the block takes longer. In the main thread a signal interrupts it, also in a wait or a regular
    expression; code that takes no signals has its traceback printed and the process ended GRACE seconds later. In
    another thread only that last resort is left."""
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__ or 2)
    if threading.current_thread() is not threading.main_thread():
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise RewardTimeout

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except RewardTimeout as error:
        raise TimeoutError(
            f"the reward functions took over data.reward_timeout={seconds:g} seconds: raise it, or give them limits "
            "of their own"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def task_of(settings: Config, reward_fns: Sequence[RewardFunction] | None = None) -> Task:
    """The task of the settings, judged by `reward_fns`, else by data.reward_functions, else by its own verifier."""
    config = settings.data
    if callable(reward_fns):
        raise TypeError(f"expected a list of functions in reward_fns, got {reward_fns!r}: put it in [ ]")
    functions = list(reward_fns or []) or [imported(path, "data.reward_functions") for path in config.reward_functions]
    own = not functions
    task = find_task(config.task, settings if own else None)  # a verifier that judges nothing needs no sandbox
    functions = functions or [task.reward]
    for function in functions:
        if not callable(function):
            raise TypeError(f"expected functions in reward_fns, got {function!r}")
    weights = config.reward_weights or [1.0] * len(functions)
    if len(weights) != len(functions) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"expected one finite number in data.reward_weights for each of {len(functions)} reward functions, "
            f"got {weights}"
        )
    names = [config.task] if own else _names(functions)
    rewards = Rewards(tuple(functions), tuple(names), tuple(weights), config.reward_timeout)
    return replace(task, reward=rewards, columns=task.columns if own else ())


def _names(functions: list[RewardFunction]) -> list[str]:
    """Functions' names, numbered where two are the same."""
    plain = [getattr(function, "__name__", type(function).__name__) for function in functions]
    return [name if plain.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(plain)]


def imported(path: str, key: str) -> Callable[..., Any]:
    """The function at a dotted path. ValueError that names the setting."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}: {path!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"{key}: {path!r} is a {type(function).__name__}, expected a function")
    return function
