"""Reward functions that tests name by dotted path."""

from __future__ import annotations

from typing import Any


def parity(prompts: list[Any], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 where the first token id is even: a random model is right about half of the time."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def right(prompts: list[Any], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def wrong(prompts: list[Any], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def raises(prompts: list[Any], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    raise KeyError("no such unit test")


def not_a_number(prompts: list[Any], completions: list[str], completion_ids: list[Any], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)
