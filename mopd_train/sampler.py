"""Sampling G completions of each prompt: every prompt is computed once, and a finished completion costs nothing more.

Legend: P prompts, G completions a prompt, R live rows, T tokens of a completion at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper, TopPLogitsWarper

from .padding import padded


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; top_p = 1 samples the whole distribution at `temperature`."""

    num_generations: int
    max_completion_length: int
    temperature: float
    top_p: float
    batch_size: int

    def warpers(self) -> LogitsProcessorList:
        chosen = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(self.top_p))
        return chosen


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    sampling: Sampling,
    stop_ids: list[int],
    pad_id: int,
    seed: int | list[int],  # one a prompt, or that of the first
) -> list[list[list[int]]]:
    """Token ids of G completions a prompt, each with its stop token if it came to one.

    Prompt i draws from a generator of its own, seeded `seed + i` or `seed[i]`: its completions depend on neither the
    other prompts nor the batch, so they may be cut over processes. `batch_size` bounds the live rows, rounded to whole
    groups of G.
    """
    per_batch = max(1, sampling.batch_size // sampling.num_generations)
    seeds = seed if isinstance(seed, list) else range(seed, seed + len(prompts))
    completions = []
    for first in range(0, len(prompts), per_batch):
        batch = prompts[first : first + per_batch]
        draws = _draws(sampling, seeds[first : first + per_batch]).to(model.device)
        rows = _sample_batch(model, batch, sampling, torch.tensor(stop_ids, device=model.device), pad_id, draws)
        completions += [rows[i : i + sampling.num_generations] for i in range(0, len(rows), sampling.num_generations)]
    return completions


def _draws(sampling: Sampling, seeds: Sequence[int]) -> Tensor:  # (P * G, T)
    """Uniform numbers for every token that may be drawn, in float64: float32 cannot reach tails of a large vocabulary.
    Made on the CPU, so that all devices draw alike."""
    shape = (sampling.num_generations, sampling.max_completion_length)
    return torch.cat(
        [torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def _sample_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    sampling: Sampling,
    stop_ids: Tensor,
    pad_id: int,
    draws: Tensor,  # (P * G, T)
) -> list[list[int]]:  # P * G
    count, warpers = sampling.num_generations, sampling.warpers()
    ids, mask = padded(prompts, pad_id, model.device, "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = DynamicCache(config=model.config)
    logits = _last_logits(model, ids, mask, positions, cache).repeat_interleave(count, dim=0)
    cache.batch_repeat_interleave(count)
    mask = mask.repeat_interleave(count, dim=0)
    position = positions[:, -1].repeat_interleave(count)
    live = torch.arange(len(prompts) * count, device=model.device)
    completions: list[list[int]] = [[] for _ in range(len(live))]
    for step in range(sampling.max_completion_length):
        scores = warpers(ids, logits.float())  # type: ignore[arg-type]
        tokens = _inverse_cdf(scores.softmax(-1), draws[live, step])
        for row, token in zip(live.tolist(), tokens.tolist(), strict=True):
            completions[row].append(token)
        going_on = ~torch.isin(tokens, stop_ids)
        if step + 1 == sampling.max_completion_length or not going_on.any():
            break
        if not going_on.all():
            cache.batch_select_indices(going_on.nonzero()[:, 0])
            mask, position, tokens, live = mask[going_on], position[going_on], tokens[going_on], live[going_on]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position + 1
        logits = _last_logits(model, tokens[:, None], mask, position[:, None], cache)
    return completions


def _inverse_cdf(probabilities: Tensor, draws: Tensor) -> Tensor:  # (R, V), (R,) -> (R,)
    """The first token whose cumulative probability exceeds the draw; never one of probability 0."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    target = draws[:, None] * cumulative[:, -1:]  # rounding leaves the last sum beside 1
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _last_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:  # (R, V)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
