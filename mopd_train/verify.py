"""Running a task's verifier over groups: rewards and feedback land on the rollouts."""

from __future__ import annotations

import math
from typing import Any

from .rewards import shown
from .rollout import Group
from .tasks import RewardFunction


def judge(groups: list[Group], reward: RewardFunction, task_name: str) -> None:
    """Set reward, feedback and the scores of single reward functions of every rollout.

    A verifier that raises, hangs, answers the wrong number of times or gives NaN stops the run with the offending
    prompt named: a wrong reward would train on noise.
    """
    flat = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    if not flat:  # a process without prompts
        return
    columns = {key: [prompt.row.get(key) for prompt, _ in flat] for key in {k for p, _ in flat for k in p.row}}
    columns.pop("prompt", None)
    arguments = {
        **columns,
        "prompts": [prompt.messages for prompt, _ in flat],
        "completions": [rollout.text for _, rollout in flat],
        "completion_ids": [rollout.token_ids for _, rollout in flat],
    }
    try:
        verdicts = reward(**arguments)
    except TimeoutError as error:
        asked = ", ".join(dict.fromkeys(shown(prompt.messages)[:80] for prompt, _ in flat))
        raise TimeoutError(f"verifier of task {task_name!r}: {error}; prompts of the batch: {asked:.2000}") from error
    except Exception as error:
        raise RuntimeError(
            f"verifier of task {task_name!r} raised {type(error).__name__}: {error} (first prompt of the batch: "
            f"{shown(flat[0][0].messages)})"
        ) from error
    if len(verdicts) != len(flat):
        raise ValueError(f"verifier of task {task_name!r}: expected {len(flat)} verdicts, got {len(verdicts)}")
    for (prompt, rollout), verdict in zip(flat, verdicts, strict=True):
        told: dict[str, Any] = verdict if isinstance(verdict, dict) else {"score": verdict}
        score, rollout.feedback, rollout.scores = told.get("score"), told.get("feedback"), told.get("scores", {})
        if score is not None and not math.isfinite(float(score)):
            raise ValueError(
                f"verifier of task {task_name!r} gave {score} for prompt {shown(prompt.messages)} and "
                f"completion {rollout.text!r:.200}; return None for 'no verdict'"
            )
        rollout.reward = None if score is None else float(score)
