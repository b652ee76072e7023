"""Sums of two small numbers asked in plain words: a task on which the embedded 135M-parameter model knows
most answers but seldom gives them, so that groups of rollouts hold both successes and failures."""

from __future__ import annotations

import random
import re
from typing import Any

HELD_OUT = 32
NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")


def rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Disjoint train and held-out rows; always the same. a + b and b + a are on the same side."""
    rng = random.Random(20260512)
    pairs = [(a, b) for a in range(2, 16) for b in range(a, 16)]
    rng.shuffle(pairs)
    held_out, trained = pairs[:HELD_OUT], pairs[HELD_OUT:]
    both_orders = [pair for a, b in trained for pair in dict.fromkeys([(a, b), (b, a)])]
    rng.shuffle(both_orders)
    return [_row(*pair) for pair in both_orders], [_row(*pair) for pair in held_out]


def _row(a: int, b: int) -> dict[str, Any]:
    return {"prompt": f"What is {a} + {b}? Answer with just the number.", "answer": str(a + b)}


def reward(
    prompts: list[Any], completions: list[str], completion_ids: list[list[int]], *, answer: list[str], **_: Any
) -> list[dict[str, Any]]:
    """1.0 where the last number of the completion is the answer, else 0.0.

    Stricter than comparing expressions by value: "15 + 19" restates the question and equals its answer.
    """
    verdicts = []
    for completion, gold in zip(completions, answer, strict=True):
        numbers = NUMBER.findall(completion)
        if not numbers:
            verdicts.append({"score": 0.0, "feedback": "The reply has no number."})
        elif numbers[-1] == gold:
            verdicts.append({"score": 1.0, "feedback": "The answer is right."})
        else:
            verdicts.append({"score": 0.0, "feedback": f"The answer {numbers[-1]} is wrong."})
    return verdicts
