"""Competitive programming: the code in a completion against tests, in the sandbox.

1.0 where every test passes, else 0.0 with the first failure as feedback. For tests of inputs and outputs only the
inputs enter the sandbox. An assert program (HumanEval) runs in a second sandbox and calls the candidate in the
first one through us: the candidate never shares a process, a user or a file with what judges it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from ..sandbox import START_SECONDS, Result, Sandbox, SessionEnded
from .answers import without_thinking
from .code_compare import same_output, same_value
from .code_layouts import adapt as adapt
from .code_layouts import load_human_eval as load_human_eval
from .functions import rows as rows

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
SHOWN = 400  # characters of an input or an output that feedback quotes
Verdict = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """How one completion is judged."""

    tests: list[dict[str, Any]] | None
    check: str | None
    entry_point: str | None
    prelude: str


@lru_cache(maxsize=1)
def default_sandbox() -> Sandbox:
    from ..config import SandboxConfig

    return Sandbox(SandboxConfig())


def bind(config: Config) -> Callable[..., list[Verdict | None]]:
    """The reward function under a run's limits. SandboxUnavailable if code cannot be run safely here; ValueError if a
    run could end by data.reward_timeout while its slowest completions are still within limits."""
    limits, timeout = config.sandbox, config.data.reward_timeout
    starting = 2 * START_SECONDS  # of an assert program's sandbox and the candidate's
    longest = limits.batch_seconds + limits.completion_seconds + starting
    if timeout <= longest:
        raise ValueError(
            f"judging a batch may take {longest:g} s (sandbox.batch_seconds={limits.batch_seconds:g}, then "
            f"completion_seconds={limits.completion_seconds:g} and {starting:g} to start sandboxes), got "
            f"data.reward_timeout={timeout:g}, which would end the run: raise it, or lower sandbox.batch_seconds"
        )
    return partial(reward_in, Sandbox(limits))


def reward_in(sandbox: Sandbox, /, **arguments: Any) -> list[Verdict | None]:
    """`reward` in this sandbox, also where a column of the dataset has that name."""
    return reward(**arguments | {"sandbox": sandbox})


def reward(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    *,
    sandbox: Sandbox | None = None,
    tests: list[Any] | None = None,
    test: list[Any] | None = None,
    entry_point: list[Any] | None = None,
    prelude: list[Any] | None = None,
    **_: Any,
) -> list[Verdict | None]:
    """Verdicts of all completions, judged in parallel; equal code for the same problem runs once. Columns: as in
    code_layouts. None: not judged within sandbox.batch_seconds."""
    sandbox = sandbox or default_sandbox()
    absent = [None] * len(prompts)
    columns = [column or absent for column in (tests, test, entry_point, prelude)]
    keys, jobs = [], {}
    for prompt, completion, *row in zip(prompts, completions, *columns, strict=True):
        problem, code = Problem(row[0], row[1], row[2], row[3] or ""), extract_code(prompt, completion)
        keys.append((id(row[0]), *row[1:], code))
        jobs[keys[-1]] = (problem, code)
    judged = sandbox.map(lambda job: judge(sandbox, *job), list(jobs.values()))
    verdicts = dict(zip(jobs, judged, strict=True))
    late = sum(verdicts[key] is None for key in keys)
    if late:
        limit = sandbox.config.batch_seconds
        logger.warning("%d of %d completions have no verdict: sandbox.batch_seconds=%g", late, len(keys), limit)
    return [verdicts[key] for key in keys]


def extract_code(prompt: Any, completion: str) -> str:
    """The last fenced block of the completion, or all of it where there is none; thinking is removed first.
    Where the prompt opened a block in the assistant's turn, that block, from its beginning."""
    reply = without_thinking(completion)
    last = prompt[-1] if isinstance(prompt, list) and prompt else {}
    opened = last["content"] if last.get("role") == "assistant" else ""
    if opened.count("```") % 2:
        found = BLOCK.match(opened + reply, opened.rindex("```"))
        return found[1] if found else reply
    blocks = BLOCK.findall(reply)
    return blocks[-1] if blocks else reply


def judge(sandbox: Sandbox, problem: Problem, code: str) -> Verdict:
    if not code.strip():
        return failed("The reply has no code.")
    source = f"{problem.prelude}\n{code}" if problem.prelude else code
    try:
        if problem.check is not None:
            return run_check(sandbox, problem, source)
        return run_tests(sandbox, problem, source)
    except SessionEnded as ended:
        return failed(f"The code could not be run ({ended.result.status}).\n{ended.result.error}")


def run_tests(sandbox: Sandbox, problem: Problem, source: str) -> Verdict:
    """Inputs in, answers out, compared here; the first failure ends it."""
    name = problem.entry_point
    with sandbox.session("call" if name else "program", source, name or "") as session:
        for number, test in enumerate(problem.tests or [], start=1):
            given, expected = test["input"], test["output"]
            if name:
                result = session.call(**given) if isinstance(given, dict) else session.call(*given)
                right, got = same_value(result.value, expected), result.value
            else:
                result = session.test(given)
                right, got = same_output(result.stdout, expected), result.stdout
            if result.status != "ok" or not right:
                return failed(describe(number, given, expected, got, result))
    return {"score": 1.0, "feedback": "All tests passed."}


def run_check(sandbox: Sandbox, problem: Problem, source: str) -> Verdict:
    """An assert program in one sandbox asks the candidate in another, value by value."""
    name, program = problem.entry_point or "", f"{problem.prelude}\n{problem.check}"
    with sandbox.session("call", source, name) as candidate:
        try:
            with sandbox.session("check", program, name) as referee:
                reply = referee.ask({"start": True})
                while reply["status"] == "call":
                    arguments = {"args": reply["args"], "kwargs": reply["kwargs"]}
                    answer = candidate.ask(arguments)
                    reply = referee.ask({key: answer.get(key) for key in ("status", "value", "error")})
        except SessionEnded as ended:
            return failed(f"A test ended with {ended.result.status}.\n{ended.result.error}")
    if reply["status"] == "ok":
        return {"score": 1.0, "feedback": "All tests passed."}
    return failed(f"A test failed.\n{reply['error']}")


def failed(feedback: str) -> Verdict:
    return {"score": 0.0, "feedback": feedback.strip()}


def describe(number: int, given: Any, expected: Any, got: Any, result: Result) -> str:
    """The failing test as a programmer would want it."""
    lines = [f"Test {number} failed.", f"Input: {_cut(given)}", f"Expected: {_cut(expected)}"]
    if result.status == "ok":
        lines.append(f"Got: {_cut(got)}")
    elif result.status == "timeout":
        lines.append("The time limit was exceeded.")
    elif result.status == "memory":
        lines.append("The memory limit was exceeded.")
    else:
        lines.append(f"It ended with {result.status}: {result.error}")
    return "\n".join(lines)


def _cut(value: Any) -> str:
    try:
        text = (value if isinstance(value, str) else repr(value)).strip()
    except ValueError:  # Python refuses to print an int of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
