"""One-step sums and products asked in plain words: a task on which the embedded 135M-parameter model
knows many answers but seldom gives them, so that groups of rollouts hold both successes and failures."""

from __future__ import annotations

import random
from typing import Any

HELD_OUT = 48


def rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Disjoint train and held-out rows; always the same. a + b and b + a are on the same side."""
    rng = random.Random(20260512)
    facts = [("+", a, b) for a in range(2, 21) for b in range(a, 21)]
    facts += [("*", a, b) for a in range(2, 13) for b in range(a, 13)]
    rng.shuffle(facts)
    held_out, trained = facts[:HELD_OUT], facts[HELD_OUT:]
    both_orders = [(sign, *pair) for sign, a, b in trained for pair in dict.fromkeys([(a, b), (b, a)])]
    rng.shuffle(both_orders)
    return [_row(*fact) for fact in both_orders], [_row(*fact) for fact in held_out]


def _row(sign: str, a: int, b: int) -> dict[str, Any]:
    answer = a + b if sign == "+" else a * b
    return {"prompt": f"What is {a} {sign} {b}? Answer with just the number.", "answer": str(answer)}
