"""Mathematics: the final answer of a completion against the gold answer, judged by math-verify."""

from __future__ import annotations

from typing import Any

from math_verify import parse, verify


def reward(
    prompts: list[Any], completions: list[str], completion_ids: list[list[int]], *, answer: list[Any], **_: Any
) -> list[dict[str, Any]]:
    """1.0 where the completion's answer (boxed, or the last expression) equals the gold one, else 0.0."""
    return [_judge(completion, str(gold)) for completion, gold in zip(completions, answer, strict=True)]


def _judge(completion: str, gold: str) -> dict[str, Any]:
    # No timeouts: math-verify's use signals, which only work in the main thread.
    expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    if not expected:
        raise ValueError(f"gold answer {gold!r} cannot be parsed as mathematics")
    found = parse(completion, parsing_timeout=None)
    if not found:
        return {"score": 0.0, "feedback": "No answer was found in the reply."}
    if verify(expected, found, timeout_seconds=None):
        return {"score": 1.0, "feedback": "The answer is right."}
    return {"score": 0.0, "feedback": f"The answer {found[-1]} is wrong."}
