"""Reward functions: one or several, sync and async, weights, missing verdicts, and every way to misbehave."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
import threading
import time

import pytest

from mopd_train.config import Config, DataConfig, validate
from mopd_train.metrics import group_metrics
from mopd_train.rewards import Rewards, task_of, time_limit
from mopd_train.rollout import Group, Prompt, Rollout
from mopd_train.verify import judge
from tests.train import rewards as examples
from tests.train.launch import ROOT, environment


def length(completions, **_):
    """As TRL's examples are written: named arguments only."""
    return [float(len(completion)) for completion in completions]


def answered(completions, answer):
    """No **columns: it gets what it takes."""
    return [1.0 if completion == gold else None for completion, gold in zip(completions, answer, strict=True)]


async def slowly(completions, **_):
    await asyncio.sleep(0.2)
    return [{"score": 0.5, "feedback": f"said {completion}"} for completion in completions]


def groups():
    prompts = [
        Prompt([{"role": "user", "content": q}], [1], {"prompt": q, "answer": a}) for q, a in (("p", "x"), ("q", "yy"))
    ]
    return [Group(prompt, [Rollout([1], "x", True), Rollout([2], "yy", True)]) for prompt in prompts]


def judged(functions, **settings):
    some = groups()
    judge(some, task_of(Config(data=DataConfig(**settings)), functions).reward, "mine")
    metrics = {key: value for key, value in group_metrics(some, 1.0).items() if key.startswith("rewards/")}
    return [(r.reward, r.feedback) for group in some for r in group.rollouts], metrics


def test_one_function_named_arguments_only():
    assert judged([length]) == ([(1.0, None), (2.0, None), (1.0, None), (2.0, None)], {})


def test_several_functions_are_weighted_and_missing_verdicts_left_out():
    """By hand: 0.1 * length, plus 2 where the answer is said, plus 4 * 0.5."""
    rows, metrics = judged([length, answered, slowly], reward_weights=[0.1, 2.0, 4.0])
    assert rows == [
        (pytest.approx(0.1 + 2 + 2), "said x"),
        (pytest.approx(0.2 + 2), "said yy"),
        (pytest.approx(0.1 + 2), "said x"),
        (pytest.approx(0.2 + 2 + 2), "said yy"),
    ]
    assert metrics == {"rewards/length/mean": 1.5, "rewards/answered/mean": 1.0, "rewards/slowly/mean": 0.5}
    assert judged([answered])[0][1] == (None, None)


def test_async_functions_run_at_the_same_time():
    together = {"now": 0, "most": 0}

    async def counted(completions):
        together["now"] += 1
        together["most"] = max(together["most"], together["now"])
        await asyncio.sleep(0.05)
        together["now"] -= 1
        return [0.0] * len(completions)

    judged([counted] * 5)
    assert together["most"] == 5

    async def inside_a_notebook():
        return judged([slowly])[0][0]

    assert asyncio.run(inside_a_notebook()) == (0.5, "said x")


def test_dotted_paths_and_weights_from_the_settings():
    config = Config(data=DataConfig(reward_functions=["tests.train.rewards.parity", "tests.train.test_rewards.length"]))
    reward = task_of(config).reward
    assert isinstance(reward, Rewards)
    assert (reward.functions[0], reward.names, reward.weights) == (examples.parity, ("parity", "length"), (1.0, 1.0))
    assert task_of(config).columns == ()
    assert task_of(Config(data=DataConfig(task="math"))).columns == ("answer",)
    with pytest.raises(ValueError, match=r"data.reward_functions: 'tests.train.rewards.nope' cannot be imported"):
        task_of(Config(data=DataConfig(reward_functions=["tests.train.rewards.nope"])))
    with pytest.raises(ValueError, match=r"for each of 2 reward functions, got \[1.0\]"):
        task_of(Config(data=DataConfig(reward_weights=[1.0])), [length, answered])
    with pytest.raises(TypeError, match="expected functions in reward_fns, got 'length'"):
        task_of(Config(), ["length"])
    with pytest.raises(TypeError, match=r"expected a list of functions in reward_fns, got <function length"):
        task_of(Config(), length)
    with pytest.raises(ValueError, match=r"expected data.reward_timeout > 0, got 0"):
        validate(Config(data=DataConfig(reward_timeout=0)))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda completions: None, RuntimeError, "'<lambda>': expected a list of 4 verdicts, got None"),
        (lambda completions: [0.0], RuntimeError, "'<lambda>': expected 4 verdicts, got 1"),
        (lambda completions: [math.nan] * 4, RuntimeError, "gave nan for prompt 'p' and completion 'x'"),
        (lambda completions: [math.inf] * 4, RuntimeError, "gave inf for prompt 'p'"),
        (lambda completions: ["good"] * 4, RuntimeError, "gave 'good', expected a number"),
        (
            lambda completions: 1 / 0,
            RuntimeError,
            "raised ZeroDivisionError: division by zero.*prompt of the batch: 'p'",
        ),
    ],
)
def test_wrong_verdicts_name_function_and_prompt(function, error, message):
    with pytest.raises(error, match=message):
        judged([function])


def test_an_async_function_that_raises_is_named():
    async def broken(completions):
        raise KeyError("no server")

    with pytest.raises(RuntimeError, match="'broken' raised KeyError"):
        judged([broken, slowly])


def spins(completions):
    while True:
        pass


def sleeps(completions):
    time.sleep(60)


def swallows(completions):
    while True:
        try:
            time.sleep(60)
        except Exception as error:  # a handler that is too wide
            print(error)


def backtracks(completions):
    return re.match(r"(a+)+$", "a" * 60 + "b")


async def waits(completions):
    await asyncio.sleep(60)


@pytest.mark.parametrize("function", [spins, sleeps, swallows, backtracks, waits])
def test_a_hang_ends_with_its_prompts_named(function):
    with pytest.raises(TimeoutError, match=r"'mine'.*data.reward_timeout=0.3.*prompts of the batch: 'p', 'q'"):
        judged([function], reward_timeout=0.3)
    assert judged([length])[0][0] == (1.0, None)


def test_a_hang_that_takes_no_signals_ends_the_process():
    """In a thread no signal arrives; the process ends itself and says where it hung."""
    code = """
import threading, time
from mopd_train import rewards
rewards.GRACE = 0.5
def hang():
    with rewards.time_limit(0.5):
        while True: pass
thread = threading.Thread(target=hang)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "hang" in done.stderr


def test_the_time_limit_leaves_no_timer_behind():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    with time_limit(5):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before
    seen = []
    thread = threading.Thread(target=lambda: seen.append(judged([length])[0][0]))
    thread.start()
    thread.join()
    assert seen == [(1.0, None)]
    assert json.dumps(seen)
