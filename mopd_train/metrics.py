"""What a step reports: its groups, its phases, and rows whose loss is not finite."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .contexts import TeacherPrompt
from .rollout import Group, Rollout


def group_metrics(groups: list[Group], threshold: float) -> dict[str, float]:
    """Rewards are averaged by group; groups without any verdict are left out. `reward_std` is the sample deviation, as
    in TRL, and 0 where all rewards are equal or only one is known, as for advantages."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    judged = [[r.reward for r in g.rollouts if r.reward is not None] for g in groups]
    rewards = [values for values in judged if values]
    spread = [statistics.stdev(values) if len(set(values)) > 1 else 0.0 for values in rewards]
    names = dict.fromkeys(name for r in rollouts for name in r.scores)
    given = {name: [score for r in rollouts if (score := r.scores.get(name)) is not None] for name in names}
    return {
        **(
            {f"rewards/{name}/mean": mean(scores) for name, scores in given.items() if scores} if len(names) > 1 else {}
        ),
        "reward": mean([float(torch.tensor(values).mean()) for values in rewards]),
        "reward_std": mean(spread),
        "frac_reward_zero_std": mean([float(s == 0) for s in spread]),
        "completions/mean_length": mean([len(r.token_ids) for r in rollouts]),
        "completions/clipped_ratio": mean([float(not r.finished) for r in rollouts]),
        "self_distillation/success_group_fraction": mean(
            [float(any(r.succeeded(threshold) for r in g.rollouts)) for g in groups]
        ),
    }


def context_metrics(contexts: list[list[TeacherPrompt | None]]) -> dict[str, float]:
    """What the teachers read: the share of rollouts for which there was something, and how much."""
    shown = [prompt for prompts in contexts for prompt in prompts if prompt is not None]
    peers = [prompt.peers for prompt in shown]
    return {
        "self_distillation/reprompt_sample_fraction": len(shown) / sum(map(len, contexts)),
        "self_distillation/teacher_prompt_length/mean": mean([len(prompt.token_ids) for prompt in shown]),
        "self_distillation/successes/mean": mean([len(p.successes) + len(p.strangers) for p in peers]),
        "self_distillation/failures/mean": mean([len(p.failures) for p in peers]),
        "self_distillation/unrelated/mean": mean([len(p.strangers) for p in peers]),
        "self_distillation/summaries/mean": mean([len(p.summaries) for p in peers]),
        "self_distillation/feedback_fraction": mean([float(prompt.shows_feedback) for prompt in shown]),
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def check_finite(per_token: torch.Tensor, rollouts: list[Rollout], step: int, rank: int) -> None:
    """FloatingPointError that names the rollouts to which non-finite entries of `per_token` (N,) belong."""
    bad = (~torch.isfinite(per_token)).nonzero()[:, 0].tolist()
    if bad:
        ends, total = [], 0
        for rollout in rollouts:
            total += len(rollout.token_ids)
            ends.append(total)
        rows = sorted({next(i for i, end in enumerate(ends) if token < end) for token in bad})
        texts = [rollouts[row].text for row in rows[:3]]
        raise FloatingPointError(
            f"non-finite loss at step {step}, rank {rank}, in {len(bad)} tokens of rollouts {rows} of the micro-batch "
            f"(first: {texts!r:.300}); nothing was updated, the last checkpoint is intact"
        )


class Clock:
    """Seconds by phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        return {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
