"""One sentence on a peer's approach: out of its own text, else from the student, else its first tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import ContextConfig
from .contexts import encode_prompt, excerpt, fitted, shown_text, with_suffix
from .rollout import Group

OPENING = "<summary>"
SUMMARY = re.compile(r"<summary>(.*?)</summary>", re.DOTALL)

# Completions of prompts of token ids, at most so many tokens each, one seed each.
Sampler = Callable[[list[list[int]], int, list[int]], list[list[int]]]


@dataclass
class PeerSummaries:
    """Summaries of a step's rollouts; each is made once, however many teachers read it. What is drawn for one depends
    on the seed of its group and its place there alone: not on the processes, nor on what else is asked."""

    groups: list[Group]
    tokenizer: PreTrainedTokenizerBase
    config: ContextConfig
    chat_template_kwargs: dict[str, Any]
    sampler: Sampler
    seed: int  # of the first group; the next one has the next
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("tag", "asked", "excerpt"), 0))

    def __call__(self, places: list[tuple[int, int]]) -> dict[tuple[int, int], str]:
        """By (place of the group, place in the group). Where a rollout's own text has a tag, that; the others are
        asked for in one batch, in an assistant turn opened with the tag."""
        texts = {(i, j): shown_text(self.groups[i].rollouts[j], self.config) for i, j in places}
        made = {place: found for place, text in texts.items() if (found := _tagged(text))}
        self.counts["tag"] += len(made)
        asked = [place for place in places if place not in made]
        if asked:
            prompts = [self._request(self.groups[i], texts[i, j]) for i, j in asked]
            seeds = [summary_seed(self.seed + i, j) for i, j in asked]
            for place, ids in zip(asked, self.sampler(prompts, self.config.summary_max_tokens, seeds), strict=True):
                reply = _tagged(OPENING + str(self.tokenizer.decode(ids, skip_special_tokens=True)))
                self.counts["asked" if reply else "excerpt"] += 1
                made[place] = reply or excerpt(texts[place], self.tokenizer, self.config.summary_max_tokens)
        return made

    def _request(self, group: Group, text: str) -> list[int]:
        def encode(texts: list[str]) -> list[int]:
            messages = with_suffix(group.prompt.messages, self.config.summary_request.replace("{text}", texts[0]))
            last = max(i for i, message in enumerate(messages) if message["role"] == "user")
            opened = [*messages[: last + 1], {"role": "assistant", "content": OPENING}]
            return encode_prompt(opened, self.tokenizer, self.chat_template_kwargs)

        return fitted(encode, [text], self.tokenizer, self.config.max_reprompt_len)


def summary_seed(group_seed: int, place: int) -> int:
    """Apart from the seeds of rollouts, whose very draws a plain sum would repeat."""
    return random.Random(f"summary/{group_seed}/{place}").getrandbits(63)


def shares(counts: Mapping[str, float]) -> dict[str, float]:
    """Of the step's summaries by where they come from."""
    total = sum(counts.values())
    return {f"summaries/{name}": count / total for name, count in counts.items()} if total else {}


def _tagged(text: str) -> str | None:
    match = SUMMARY.search(text)
    return (match.group(1).strip() or None) if match else None
