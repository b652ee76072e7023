"""Scores of a verifier on rows and completions, as the trainer calls it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from mopd_train.tasks import Row


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips, saying what is absent, where data packages are not installed."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {absent}; see docs/tasks.md")


def scores(reward: Any, rows: list[Row], completions: list[str]) -> list[float]:
    names = {name for row in rows for name in row if name != "prompt"}
    columns = {name: [row.get(name) for row in rows] for name in names}
    prompts = [row.get("prompt", "") for row in rows]
    verdicts = reward(prompts=prompts, completions=completions, completion_ids=[[]] * len(rows), **columns)
    assert all(isinstance(verdict["feedback"], str) and len(verdict["feedback"]) < 400 for verdict in verdicts)
    return [verdict["score"] for verdict in verdicts]


def refused(reward: Any, rows: list[Row], completions: list[str]) -> list[tuple[Any, str]]:
    """Gold and completion where the verdict was not 1."""
    given = scores(reward, rows, completions)
    return [(row["answer"], c) for row, c, s in zip(rows, completions, given, strict=True) if s != 1.0]


def accepted(reward: Any, rows: list[Row], completions: list[str]) -> list[tuple[Any, str]]:
    """Gold and completion where the verdict was not 0."""
    given = scores(reward, rows, completions)
    return [(row["answer"], c) for row, c, s in zip(rows, completions, given, strict=True) if s != 0.0]
