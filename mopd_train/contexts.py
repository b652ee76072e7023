"""What the teacher reads: the prompt with successful and failed peers of the same group.

The last user message becomes prompt + success blocks + failure blocks + feedback + instruction; earlier
messages and an opened assistant turn stay. The rollout's own token ids are appended by the caller, never
re-tokenised. Leave-one-out: a rollout is never its own peer. Source: arXiv 2605.12652.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import ContextConfig
from .rollout import Group, Messages, Rollout

# name -> successes and failures shown, None for every one
CONTEXTS: dict[str, tuple[int | None, int | None]] = {
    "none": (0, 0),
    "1s": (1, 0),
    "2s": (2, 0),
    "1f": (0, 1),
    "1s1f": (1, 1),
    "2s1f": (2, 1),
    "all": (None, None),
}

THINKING = re.compile(r"<think>.*?(</think>|\Z)\s*", re.DOTALL)


@dataclass(frozen=True)
class Peers:
    """Indices of the rollouts shown to the teacher of one rollout."""

    successes: tuple[int, ...]
    failures: tuple[int, ...]


@dataclass(frozen=True)
class TeacherPrompt:
    token_ids: list[int]
    peers: Peers
    shows_feedback: bool


def choose_peers(group: Group, config: ContextConfig, seed: int) -> list[Peers]:
    """Peers of every rollout: the first successes and failures that are not itself, in an order drawn from
    `seed`: one order a group (shared) or one a rollout (random)."""
    count = len(group.rollouts)
    wanted_successes, wanted_failures = CONTEXTS[config.context]
    chosen = []
    for own in range(count):
        order = list(range(count))
        rng = random.Random(seed if config.peer_choice == "shared" else f"{seed}/{own}")
        rng.shuffle(order)
        threshold = config.success_reward_threshold
        successes = [i for i in order if i != own and group.rollouts[i].succeeded(threshold)][:wanted_successes]
        failures = [i for i in order if i != own and group.rollouts[i].failed(threshold)][:wanted_failures]
        if config.failure_solution_condition == "when_no_solution" and successes:
            failures = []
        chosen.append(Peers(tuple(successes), tuple(failures)))
    return chosen


def teacher_prompts(
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    config: ContextConfig,
    chat_template_kwargs: dict[str, Any],
    seed: int,
) -> list[TeacherPrompt | None]:
    """The teacher's prompt for each rollout; None where its context has nothing to show (no loss there)."""
    built: dict[Peers, TeacherPrompt | None] = {}
    prompts = []
    for peers in choose_peers(group, config, seed):
        if peers not in built:
            built[peers] = _teacher_prompt(group, peers, tokenizer, config, chat_template_kwargs)
        prompts.append(built[peers])
    return prompts


def _teacher_prompt(
    group: Group,
    peers: Peers,
    tokenizer: PreTrainedTokenizerBase,
    config: ContextConfig,
    chat_template_kwargs: dict[str, Any],
) -> TeacherPrompt | None:
    if config.context == "none":
        return TeacherPrompt(group.prompt.token_ids, peers, shows_feedback=False)
    feedback = _feedback(group, peers, config)
    if not peers.successes and not peers.failures and not feedback:
        return None
    texts = [_shown(group.rollouts[i], config) for i in (*peers.successes, *peers.failures)]
    templates = [config.success_template] * len(peers.successes) + [config.failure_template] * len(peers.failures)
    if feedback:
        texts.append(feedback)
        templates.append(config.feedback_template)

    def encode(parts: list[str]) -> list[int]:
        blocks = "".join(template.replace("{text}", part) for template, part in zip(templates, parts, strict=True))
        messages = _with_suffix(group.prompt.messages, blocks + config.instruction_template)
        return encode_prompt(messages, tokenizer, chat_template_kwargs)

    token_ids = encode(texts)
    if len(token_ids) > config.max_reprompt_len:
        token_ids = _shortened(encode, texts, tokenizer, config.max_reprompt_len)
    return TeacherPrompt(token_ids, peers, shows_feedback=feedback is not None)


def _feedback(group: Group, peers: Peers, config: ContextConfig) -> str | None:
    """Feedback on the failures shown, where the condition asks for it."""
    unwanted = config.feedback_condition == "when_no_solution" and peers.successes
    if config.feedback_condition == "never" or unwanted:
        return None
    said = [text for i in peers.failures if (text := group.rollouts[i].feedback)]
    return "\n".join(said) or None


def _shown(rollout: Rollout, config: ContextConfig) -> str:
    text = rollout.text
    if config.remove_thinking_from_demonstration:
        text = THINKING.sub("", text)
    return text.strip()


def _with_suffix(messages: Messages, suffix: str) -> Messages:
    """The suffix joins the last user message."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    extended = {**messages[last], "content": messages[last]["content"] + suffix}
    return [*messages[:last], extended, *messages[last + 1 :]]


def _shortened(encode: Any, texts: list[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    """Cut every text to the largest common token budget that fits; a text below the budget stays whole."""
    pieces = [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def cut(budget: int) -> list[int]:
        kept = [
            text if len(ids) <= budget else tokenizer.decode(ids[:budget])
            for text, ids in zip(texts, pieces, strict=True)
        ]
        return encode(kept)

    low, high = 0, max(map(len, pieces))
    shortest = cut(low)
    if len(shortest) > limit:
        raise ValueError(
            f"question and instruction alone are {len(shortest)} tokens, over context.max_reprompt_len={limit}: "
            "raise it, or lower data.max_prompt_length"
        )
    best = shortest
    while low < high:  # the longest budget whose prompt fits
        middle = (low + high + 1) // 2
        candidate = cut(middle)
        if len(candidate) <= limit:
            low, best = middle, candidate
        else:
            high = middle - 1
    return best


def encode_prompt(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]
) -> list[int]:
    """Token ids by the chat template; a last assistant message is an opened turn to be continued."""
    opened = messages[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=not opened,
        continue_final_message=opened,
        **chat_template_kwargs,
    )
    return tokenizer.encode(text, add_special_tokens=False)
