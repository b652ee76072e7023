"""Groups of rollouts: sampled by the student, judged by the task.

Legend: P prompts, G rollouts a prompt, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .sampler import Sampling, sample

Messages = list[dict[str, str]]


@dataclass
class Prompt:
    """A dataset row ready for the model; `row` keeps all its columns for the verifier."""

    messages: Messages
    token_ids: list[int]
    row: dict[str, Any]


@dataclass
class Rollout:
    """One completion: token ids as sampled, up to and with the stop token where there was one."""

    token_ids: list[int]
    text: str
    finished: bool
    reward: float | None = None  # None: the verifier gave no verdict
    feedback: str | None = None
    scores: dict[str, float | None] = field(default_factory=dict)  # of each reward function, where several judge
    logprobs: list[float] | None = None  # of each token, as the engine drew it; None: not told

    def succeeded(self, threshold: float) -> bool:
        return self.reward is not None and self.reward >= threshold

    def failed(self, threshold: float) -> bool:
        return self.reward is not None and self.reward < threshold


@dataclass
class Group:
    """One prompt and its rollouts."""

    prompt: Prompt
    rollouts: list[Rollout] = field(default_factory=list)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    sampling: Sampling,
    stop_ids: list[int],
    seed: int,
) -> list[Group]:
    """G rollouts of every prompt. The same seed and settings give the same rollouts."""
    token_ids = [prompt.token_ids for prompt in prompts]
    completions = sample(model, token_ids, sampling, stop_ids, int(tokenizer.pad_token_id), seed)
    return [
        Group(prompt, [to_rollout(ids, tokenizer, stop_ids) for ids in group])
        for prompt, group in zip(prompts, completions, strict=True)
    ]


def to_rollout(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], logprobs: list[float] | None = None
) -> Rollout:
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Rollout(ids, text, finished=ids[-1] in stop_ids, logprobs=logprobs)
