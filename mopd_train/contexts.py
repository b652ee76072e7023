"""What the teacher reads: the prompt with successful and failed peers of the same group.

The last user message becomes prompt + success blocks + failure blocks + feedback + instruction; earlier
messages and an opened assistant turn stay. The rollout's own token ids are appended by the caller, never
re-tokenised. Leave-one-out: a rollout is never its own peer. Source: arXiv 2605.12652.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import ContextConfig
from .rollout import Group, Messages, Rollout

THINKING = re.compile(r"<think>.*?(</think>|\Z)\s*", re.DOTALL)


@dataclass(frozen=True)
class Peers:
    """Indices of the rollouts shown to the teacher of one rollout, in the order in which they stand."""

    successes: tuple[int, ...]
    failures: tuple[int, ...]
    attempts: tuple[int, ...] = ()  # chosen whatever the verdict; each is labelled with its own


@dataclass(frozen=True)
class TeacherPrompt:
    token_ids: list[int]
    peers: Peers
    shows_feedback: bool


# Peers out of the other judged rollouts of the group, which come in drawn order; threshold of success.
Chooser = Callable[[Group, list[int], float], Peers]


def counted(successes: int | None, failures: int | None) -> Chooser:
    """The first so many successes, then failures; None for every one."""

    def choose(group: Group, others: list[int], threshold: float) -> Peers:
        right = [i for i in others if group.rollouts[i].succeeded(threshold)]
        wrong = [i for i in others if group.rollouts[i].failed(threshold)]
        return Peers(tuple(right[:successes]), tuple(wrong[:failures]))

    return choose


def random_peer(group: Group, others: list[int], threshold: float) -> Peers:
    """The first in drawn order: a control for showing any peer at all."""
    return Peers((), (), tuple(others[:1]))


def score_ordered(group: Group, others: list[int], threshold: float) -> Peers:
    """Every peer from the lowest reward to the highest, so that the best stands nearest to the answer."""
    return Peers((), (), tuple(sorted(others, key=lambda i: group.rollouts[i].reward or 0.0)))


CONTEXTS: dict[str, Chooser] = {
    "none": counted(0, 0),
    "1s": counted(1, 0),
    "2s": counted(2, 0),
    "1f": counted(0, 1),
    "1s1f": counted(1, 1),
    "2s1f": counted(2, 1),
    "all": counted(None, None),
    "random_peer": random_peer,
    "score_ordered": score_ordered,
}


def choose_peers(group: Group, config: ContextConfig, seed: int) -> list[Peers]:
    """Peers of every rollout, among the judged rollouts that are not itself, in an order drawn from `seed`: one
    order a group (shared) or one a rollout (random)."""
    choose, chosen = CONTEXTS[config.context], []
    for own in range(len(group.rollouts)):
        order = list(range(len(group.rollouts)))
        rng = random.Random(seed if config.peer_choice == "shared" else f"{seed}/{own}")
        rng.shuffle(order)
        others = [i for i in order if i != own and group.rollouts[i].reward is not None]
        peers = choose(group, others, config.success_reward_threshold)
        if config.failure_solution_condition == "when_no_solution" and peers.successes:
            peers = replace(peers, failures=())
        chosen.append(peers)
    return chosen


def teacher_prompts(
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    config: ContextConfig,
    chat_template_kwargs: dict[str, Any],
    seed: int,
) -> list[TeacherPrompt | None]:
    """The teacher's prompt for each rollout; None where its context has nothing to show (no loss there)."""
    return prompts_showing(choose_peers(group, config, seed), group, tokenizer, config, chat_template_kwargs)


def prompts_showing(
    chosen: list[Peers],  # one entry a rollout
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    config: ContextConfig,
    chat_template_kwargs: dict[str, Any],
) -> list[TeacherPrompt | None]:
    """The same for peers that the caller chose."""
    built: dict[Peers, TeacherPrompt | None] = {}
    prompts = []
    for peers in chosen:
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
    shown = [group.rollouts[i] for i in (*peers.successes, *peers.failures, *peers.attempts)]
    if not shown:
        return None
    right = [rollout.succeeded(config.success_reward_threshold) for rollout in shown]
    feedback = _feedback(shown, right, config)
    texts = [_shown(rollout, config) for rollout in shown]
    templates = [config.success_template if succeeded else config.failure_template for succeeded in right]
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


def _feedback(shown: list[Rollout], right: list[bool], config: ContextConfig) -> str | None:
    """Feedback on the failures shown, where the condition asks for it."""
    unwanted = config.feedback_condition == "when_no_solution" and any(right)
    if config.feedback_condition == "never" or unwanted:
        return None
    said = [rollout.feedback for rollout, succeeded in zip(shown, right, strict=True) if not succeeded]
    return "\n".join(text for text in said if text) or None


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
