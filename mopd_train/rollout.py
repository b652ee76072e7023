"""Groups of rollouts: sampled by the student, judged by the task.

Legend: P prompts, G rollouts a prompt, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

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

    def succeeded(self, threshold: float) -> bool:
        return self.reward is not None and self.reward >= threshold

    def failed(self, threshold: float) -> bool:
        return self.reward is not None and self.reward < threshold


@dataclass
class Group:
    """One prompt and its rollouts."""

    prompt: Prompt
    rollouts: list[Rollout] = field(default_factory=list)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; top_p = 1 samples the whole distribution at `temperature`."""

    num_generations: int
    max_completion_length: int
    temperature: float
    top_p: float
    batch_size: int


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    sampling: Sampling,
    stop_ids: list[int],
    seed: int,
) -> list[Group]:
    """G rollouts of every prompt. The same seed and batch size give the same rollouts."""
    torch.manual_seed(seed)
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_new_tokens=sampling.max_completion_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop_ids,
    )
    groups = [Group(prompt) for prompt in prompts]
    slots = [group for group in groups for _ in range(sampling.num_generations)]
    for first in range(0, len(slots), sampling.batch_size):
        batch = slots[first : first + sampling.batch_size]
        ids, mask = left_padded([group.prompt.token_ids for group in batch], int(tokenizer.pad_token_id), model.device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for group, completion in zip(batch, output[:, ids.size(1) :].tolist(), strict=True):
            group.rollouts.append(_rollout(completion, tokenizer, set(stop_ids)))
    return groups


def left_padded(
    sequences: list[list[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:  # (B, T) ids and mask
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (longest - len(s)) + s for s in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def _rollout(completion: list[int], tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]) -> Rollout:
    """Cut after the first stop token; what follows is padding."""
    end = next((i for i, token in enumerate(completion) if token in stop_ids), None)
    ids = completion if end is None else completion[: end + 1]
    return Rollout(ids, tokenizer.decode(ids, skip_special_tokens=True), finished=end is not None)
