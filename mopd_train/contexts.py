"""What the teacher reads: the prompt with peers of the same group, as text and as token ids.

The last user message becomes prompt + success blocks + failure blocks + summaries + feedback + instruction; earlier
messages and an opened assistant turn stay. The rollout's own token ids are appended by the caller, never
re-tokenised. Source: arXiv 2605.12652.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import ContextConfig
from .peers import CONTEXTS, Peers, choose_peers, shown_text, strangers_of
from .rollout import Group, Messages, Rollout

__all__ = ["CONTEXTS", "Peers", "TeacherPrompt", "choose_peers", "encode_prompt", "step_contexts", "teacher_prompts"]

# Summaries of the rollouts named by (place of the group, place in the group).
Summarizer = Callable[[list[tuple[int, int]]], dict[tuple[int, int], str]]


@dataclass(frozen=True)
class TeacherPrompt:
    token_ids: list[int]
    peers: Peers
    shows_feedback: bool


def step_contexts(
    groups: list[Group],
    tokenizer: PreTrainedTokenizerBase,
    config: ContextConfig,
    chat_template_kwargs: dict[str, Any],
    seed: int,
    summarize: Summarizer | None = None,
    batch: Sequence[Group] | None = None,  # the step's groups on all processes, for controls
) -> list[list[TeacherPrompt | None]]:
    """`teacher_prompts` of all groups of a step; every summary that one of them shows is made once."""
    strangers: list[list[Rollout]] = [[] for _ in groups]
    if config.peer_control_mode != "none":
        strangers = [strangers_of(group, batch or groups, config) for group in groups]
    made: dict[tuple[int, int], str] = {}
    if config.summary_k and summarize is not None:
        chosen = [choose_peers(group, config, seed + i, strangers[i]) for i, group in enumerate(groups)]
        shown = {(i, j) for i, group in enumerate(chosen) for peers in group for j in peers.summaries}
        made = summarize(sorted(shown))
    return [
        teacher_prompts(
            group, tokenizer, config, chat_template_kwargs, seed + i, strangers[i],
            {j: text for (place, j), text in made.items() if place == i},
        )
        for i, group in enumerate(groups)
    ]  # fmt: skip


def teacher_prompts(
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    config: ContextConfig,
    chat_template_kwargs: dict[str, Any],
    seed: int,
    strangers: Sequence[Rollout] = (),  # successes of other prompts
    summaries: Mapping[int, str] | None = None,  # by place in the group
) -> list[TeacherPrompt | None]:
    """The teacher's prompt for each rollout; None where its context has nothing to show (no loss there).

    Without `summaries` those asked for are excerpts.
    """
    chosen = choose_peers(group, config, seed, strangers)
    return prompts_showing(chosen, group, tokenizer, config, chat_template_kwargs, strangers, summaries)


def prompts_showing(
    chosen: list[Peers],  # one entry a rollout
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    config: ContextConfig,
    chat_template_kwargs: dict[str, Any],
    strangers: Sequence[Rollout] = (),
    summaries: Mapping[int, str] | None = None,
) -> list[TeacherPrompt | None]:
    """The same for peers that the caller chose."""
    blocks = {peers: _blocks(group, peers, tokenizer, config, strangers, summaries or {}) for peers in set(chosen)}
    built: dict[tuple[Peers, str | None], TeacherPrompt | None] = {}
    prompts = []
    for rollout, peers in zip(group.rollouts, chosen, strict=True):
        feedback = _feedback(blocks[peers], config) if blocks[peers] else _own_feedback(rollout, group, config)
        key = peers, feedback
        if key not in built:
            built[key] = _teacher_prompt(group, *key, blocks[peers], tokenizer, config, chat_template_kwargs)
        prompts.append(built[key])
    return prompts


@dataclass(frozen=True)
class _Block:
    """One labelled text that the teacher reads."""

    template: str
    text: str
    rollout: Rollout
    right: bool  # shown as a success


def _blocks(
    group: Group,
    peers: Peers,
    tokenizer: PreTrainedTokenizerBase,
    config: ContextConfig,
    strangers: Sequence[Rollout],
    summaries: Mapping[int, str],
) -> list[_Block]:
    rollouts, threshold = group.rollouts, config.success_reward_threshold
    labelled = [(rollouts[i], True) for i in peers.successes] + [(strangers[i], True) for i in peers.strangers]
    labelled += [(rollouts[i], False) for i in peers.failures]
    labelled += [(rollouts[i], rollouts[i].succeeded(threshold)) for i in peers.attempts]
    blocks = [
        _Block(
            config.success_template if right else config.failure_template, shown_text(rollout, config), rollout, right
        )
        for rollout, right in labelled
    ]
    for i in peers.summaries:
        right = rollouts[i].succeeded(threshold)
        template = config.success_summary_template if right else config.failure_summary_template
        text = summaries.get(i) or excerpt(shown_text(rollouts[i], config), tokenizer, config.summary_max_tokens)
        blocks.append(_Block(template, text, rollouts[i], right))
    return blocks


def _teacher_prompt(
    group: Group,
    peers: Peers,
    feedback: str | None,
    blocks: list[_Block],
    tokenizer: PreTrainedTokenizerBase,
    config: ContextConfig,
    chat_template_kwargs: dict[str, Any],
) -> TeacherPrompt | None:
    if config.context == "none" and not config.summary_k:
        return TeacherPrompt(group.prompt.token_ids, peers, shows_feedback=False)
    if not blocks and feedback is None:
        return None
    texts, templates = [block.text for block in blocks], [block.template for block in blocks]
    if feedback is not None:
        texts.append(feedback)
        templates.append(config.feedback_template)

    def encode(parts: list[str]) -> list[int]:
        filled = "".join(template.replace("{text}", part) for template, part in zip(templates, parts, strict=True))
        messages = with_suffix(group.prompt.messages, filled + config.instruction_template)
        return encode_prompt(messages, tokenizer, chat_template_kwargs)

    token_ids = fitted(encode, texts, tokenizer, config.max_reprompt_len)
    return TeacherPrompt(token_ids, peers, shows_feedback=feedback is not None)


def _feedback(blocks: list[_Block], config: ContextConfig) -> str | None:
    """Feedback on the failures shown, where the condition asks for it."""
    unwanted = config.feedback_condition == "when_no_solution" and any(block.right for block in blocks)
    if config.feedback_condition == "never" or unwanted:
        return None
    said = [block.rollout.feedback for block in blocks if not block.right]
    return "\n".join(text for text in said if text) or None


def _own_feedback(rollout: Rollout, group: Group, config: ContextConfig) -> str | None:
    """Where there is no peer to show: feedback on the attempt that is scored. Only where no rollout of the group
    succeeded: elsewhere it would tell failures from successes."""
    threshold = config.success_reward_threshold
    if config.feedback_condition != "always" or any(other.succeeded(threshold) for other in group.rollouts):
        return None
    return (rollout.feedback or None) if rollout.failed(threshold) else None


def excerpt(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """The first tokens of a text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return text if len(ids) <= tokens else str(tokenizer.decode(ids[:tokens]))


def with_suffix(messages: Messages, suffix: str) -> Messages:
    """The suffix joins the last user message."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    extended = {**messages[last], "content": messages[last]["content"] + suffix}
    return [*messages[:last], extended, *messages[last + 1 :]]


def fitted(
    encode: Callable[[list[str]], list[int]], texts: list[str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[int]:
    """encode(texts); if that is over the limit, every text is cut to the largest common token budget that fits, and
    a text below the budget stays whole."""
    whole = encode(texts)
    if len(whole) <= limit:
        return whole
    pieces = [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def cut(budget: int) -> list[int]:
        kept = [
            text if len(ids) <= budget else str(tokenizer.decode(ids[:budget]))
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
