"""What a step reports: its groups, its phases, and rows whose loss is not finite."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .contexts import TeacherPrompt
from .rollout import Group, Rollout


def group_metrics(
    groups: list[Group], contexts: list[list[TeacherPrompt | None]], threshold: float
) -> dict[str, float]:
    """Rewards are averaged by group; groups without any verdict are left out."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [torch.tensor([r.reward for r in g.rollouts if r.reward is not None]) for g in groups]
    rewards = [values for values in rewards if values.numel()]
    shown = [prompt for prompts in contexts for prompt in prompts if prompt is not None]
    spread = [float(values.std(correction=0)) for values in rewards]
    return {
        "reward": mean([float(values.mean()) for values in rewards]),
        "reward_std": mean(spread),
        "frac_reward_zero_std": mean([float(s == 0) for s in spread]),
        "completions/mean_length": mean([len(r.token_ids) for r in rollouts]),
        "completions/clipped_ratio": mean([float(not r.finished) for r in rollouts]),
        "self_distillation/success_group_fraction": mean(
            [float(any(r.succeeded(threshold) for r in g.rollouts)) for g in groups]
        ),
        "self_distillation/reprompt_sample_fraction": len(shown) / len(rollouts),
        "self_distillation/teacher_prompt_length/mean": mean([len(prompt.token_ids) for prompt in shown]),
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


def logprob_gap(rollouts: list[Rollout], ours: torch.Tensor) -> float:
    """Sum over tokens of |engine's log-prob - ours (N,)|: float rounding, unless the engine's weights are stale or
    top_p < 1, whose nucleus only the engine renormalises over."""
    theirs = torch.tensor([value for rollout in rollouts for value in rollout.logprobs or []], device=ours.device)
    return float((theirs - ours.detach()).abs().sum())


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
