"""Groups scored under every condition: what is kept of each, and how an interrupted analysis goes on.

Legend: G rollouts of a group.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config
from ..data import step_seed
from ..rollout import Group
from .controls import composition
from .groups import SavedGroup
from .scoring import condition_prompts, score_prompts


@dataclass(frozen=True)
class ScoredGroup:
    """A group's rewards and scores; every list runs over its G rollouts."""

    key: str  # of what was scored and how; by it an interrupted analysis finds what it has done
    source: str  # file:line, or the number of the group
    question: str  # last user message
    rewards: list[float | None]
    lengths: list[int]  # tokens
    scores: dict[str, list[float | None]] = field(default_factory=dict)  # condition -> mean log-prob, nats a token
    shown: dict[str, list[list[int] | None]] = field(default_factory=dict)  # -> [successes, failures] shown
    tokens_computed: int = 0
    tokens_total: int = 0
    seconds: float = 0.0


def score_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    groups: Iterable[Group | SavedGroup],
    conditions: list[str],
    config: Config,
    known: dict[str, ScoredGroup] | None = None,  # by key: taken as they are
) -> Iterator[ScoredGroup]:
    """One ScoredGroup a group, in order. Peers are those that training drew for the same step and place."""
    for place, item in enumerate(groups):
        if isinstance(item, SavedGroup):
            group, source = item.group, f"{item.path}:{item.line}"
            seed = step_seed(config.training.seed, item.step or 0) + item.number
        else:
            group, source = item, str(place)
            seed = step_seed(config.training.seed, 0) + place
        key = _key(group, conditions, seed)
        if known and key in known:
            yield known[key]
            continue
        yield _score(model, tokenizer, group, conditions, config, seed, key, source)


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: Group,
    conditions: list[str],
    config: Config,
    seed: int,
    key: str,
    source: str,
) -> ScoredGroup:
    start = time.perf_counter()
    question = next(m["content"] for m in reversed(group.prompt.messages) if m["role"] == "user")
    rewards = [rollout.reward for rollout in group.rollouts]
    lengths = [len(rollout.token_ids) for rollout in group.rollouts]
    if len({reward for reward in rewards if reward is not None}) < 2:
        return ScoredGroup(key, source, question, rewards, lengths)
    prompts = {name: condition_prompts(group, tokenizer, name, config, seed) for name in conditions}
    scored = score_prompts(model, tokenizer, group, prompts, config)
    scores = {
        name: [None if tokens is None else float(tokens.double().mean()) for tokens in row]
        for name, row in scored.logprobs.items()
    }
    for name, row in scores.items():
        if not all(math.isfinite(score) for score in row if score is not None):
            raise FloatingPointError(f"{source}: the model gives a score of {row} under {name!r}")
    threshold = config.context.success_reward_threshold
    shown = {
        name: [None if p is None else list(composition(group, p.peers, threshold)) for p in row]
        for name, row in prompts.items()
    }
    seconds = time.perf_counter() - start
    return ScoredGroup(key, source, question, rewards, lengths, scores, shown, scored.computed, scored.total, seconds)


def _key(group: Group, conditions: list[str], seed: int) -> str:
    rollouts = [(r.token_ids, r.reward, r.feedback) for r in group.rollouts]
    text = json.dumps([group.prompt.messages, rollouts, conditions, seed])
    return hashlib.sha256(text.encode()).hexdigest()[:24]
