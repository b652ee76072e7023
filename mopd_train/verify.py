"""Running a task's verifier over groups: rewards and feedback land on the rollouts."""

from __future__ import annotations

import math

from .rollout import Group
from .tasks import RewardFunction


def judge(groups: list[Group], reward: RewardFunction, task_name: str) -> None:
    """Set reward and feedback of every rollout. A verifier that raises, answers the wrong number of times or
    gives NaN stops the run with the offending prompt named: a wrong reward would train on noise."""
    flat = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    if not flat:  # a process without prompts
        return
    columns = {key: [prompt.row.get(key) for prompt, _ in flat] for key in {k for p, _ in flat for k in p.row}}
    columns.pop("prompt", None)
    try:
        verdicts = reward(
            [prompt.messages for prompt, _ in flat],
            [rollout.text for _, rollout in flat],
            [rollout.token_ids for _, rollout in flat],
            **columns,
        )
    except Exception as error:
        raise RuntimeError(
            f"verifier of task {task_name!r} raised {type(error).__name__}: {error} (first prompt of the batch: "
            f"{flat[0][0].messages[-1]['content']!r:.200})"
        ) from error
    if len(verdicts) != len(flat):
        raise ValueError(f"verifier of task {task_name!r}: expected {len(flat)} verdicts, got {len(verdicts)}")
    for (prompt, rollout), verdict in zip(flat, verdicts, strict=True):
        score = verdict.get("score") if isinstance(verdict, dict) else verdict
        rollout.feedback = verdict.get("feedback") if isinstance(verdict, dict) else None
        if score is not None and not math.isfinite(float(score)):
            raise ValueError(
                f"verifier of task {task_name!r} gave {score} for prompt {prompt.messages[-1]['content']!r:.200} and "
                f"completion {rollout.text!r:.200}; return None for 'no verdict'"
            )
        rollout.reward = None if score is None else float(score)
