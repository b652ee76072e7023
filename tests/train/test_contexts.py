"""Peer choice and teacher prompts against groups worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from mopd_train.config import ContextConfig, ContextName
from mopd_train.contexts import CONTEXTS, Peers, choose_peers, encode_prompt, teacher_prompts
from mopd_train.peers import strangers_of
from mopd_train.rollout import Group, Prompt, Rollout


def group(tokenizer, rewards, texts=None, feedback=None):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 6 * 7?"},
    ]
    prompt = Prompt(messages, encode_prompt(messages, tokenizer, {}), {})
    texts = texts or [f"peer number {i}" for i in range(len(rewards))]
    rollouts = [
        Rollout(tokenizer.encode(text), text, True, reward, feedback)
        for text, reward in zip(texts, rewards, strict=True)
    ]
    return Group(prompt, rollouts)


def decoded(tokenizer, prompts, own):
    return tokenizer.decode(prompts[own].token_ids)


COUNTS = {
    "none": (0, 0),
    "1s": (1, 0),
    "2s": (2, 0),
    "1f": (0, 1),
    "1s1f": (1, 1),
    "2s1f": (2, 1),
    "all": (None, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_a_mixed_group(tokenizer, name):
    mixed = group(tokenizer, [1, 0, 1, 0, 1, 0])
    successes, failures = COUNTS[name]
    for own, peers in enumerate(choose_peers(mixed, ContextConfig(context=name), seed=3)):
        others_right = [i for i in (0, 2, 4) if i != own]
        others_wrong = [i for i in (1, 3, 5) if i != own]
        assert len(peers.successes) == (len(others_right) if successes is None else successes)
        assert len(peers.failures) == (len(others_wrong) if failures is None else failures)
        assert set(peers.successes) <= set(others_right)
        assert set(peers.failures) <= set(others_wrong)


def test_the_config_allows_every_context():
    assert get_args(ContextName) == tuple(CONTEXTS)


def test_a_random_peer_is_drawn_whatever_its_verdict(tokenizer):
    mixed = group(tokenizer, [1, 0, None, 0, 1])
    drawn = [choose_peers(mixed, ContextConfig(context="random_peer"), seed) for seed in range(40)]
    for own in range(5):
        seen = {peers[own].attempts for peers in drawn}
        assert seen == {(i,) for i in (0, 1, 3, 4) if i != own}  # the one without verdict cannot be labelled
    assert drawn[0] == choose_peers(mixed, ContextConfig(context="random_peer"), 0)


def test_score_ordered_labels_each_peer_with_its_verdict(tokenizer):
    texts = ["seven", "forty-two", "about forty", "forty"]
    graded = group(tokenizer, [0.0, 1.0, 0.5, 0.2], texts, feedback="look again")
    config = ContextConfig(context="score_ordered")
    assert [peers.attempts for peers in choose_peers(graded, config, 0)] == [(3, 2, 1), (0, 3, 2), (0, 3, 1), (0, 2, 1)]
    text = decoded(tokenizer, teacher_prompts(graded, tokenizer, config, {}, 0), own=0)
    wrong, right = config.failure_template, config.success_template
    blocks = [wrong.format(text="forty"), wrong.format(text="about forty"), right.format(text="forty-two")]
    assert "".join(blocks) in text
    assert "look again" not in text  # a success is shown
    assert "look again" in decoded(tokenizer, teacher_prompts(graded, tokenizer, config, {}, 0), own=1)


def test_shared_choice_gives_few_distinct_contexts(tokenizer):
    """Only rollouts that are themselves shown to others see another peer in their own place."""
    mixed = group(tokenizer, [1] * 8 + [0] * 8)
    shared = choose_peers(mixed, ContextConfig(), seed=0)
    drawn = choose_peers(mixed, ContextConfig(peer_choice="random"), seed=0)
    assert len(set(shared)) == 4  # the common one, and one for each of the two successes and the failure shown
    assert len(set(drawn)) > 8
    assert shared == choose_peers(mixed, ContextConfig(), seed=0)
    assert shared != choose_peers(mixed, ContextConfig(), seed=1)


@pytest.mark.parametrize(
    ("rewards", "context", "own", "expected"),
    [
        ([1, 1, 1], "2s1f", 1, (2, 0)),  # all succeed: successes only
        ([0, 0, 0], "2s1f", 1, (0, 1)),  # all fail: a failure only
        ([1, 0, 0], "2s1f", 0, (0, 1)),  # the only success does not see itself
        ([1, None, 0], "all", 2, (1, 0)),  # no verdict is neither success nor failure
    ],
)
def test_degenerate_groups(tokenizer, rewards, context, own, expected):
    peers = choose_peers(group(tokenizer, rewards), ContextConfig(context=context), seed=0)[own]
    assert (len(peers.successes), len(peers.failures)) == expected


def test_nothing_to_show_means_no_teacher_prompt(tokenizer):
    all_wrong = group(tokenizer, [0, 0, 0])
    assert teacher_prompts(all_wrong, tokenizer, ContextConfig(context="1s"), {}, seed=0) == [None] * 3
    lonely = group(tokenizer, [1, 0, 0])
    built = teacher_prompts(lonely, tokenizer, ContextConfig(context="2s"), {}, seed=0)
    assert [prompt is None for prompt in built] == [True, False, False]


def test_failure_only_where_no_solution(tokenizer):
    config = ContextConfig(failure_solution_condition="when_no_solution")
    assert all(not peers.failures for peers in choose_peers(group(tokenizer, [1, 1, 0, 0]), config, 0))
    assert all(peers.failures for peers in choose_peers(group(tokenizer, [0, 0, 0]), config, 0))


def test_the_message_holds_question_peers_and_instruction(tokenizer):
    texts = ["it is 42", "forty-one", "42 it is", "nothing"]
    built = teacher_prompts(group(tokenizer, [1, 0, 1, 0], texts), tokenizer, ContextConfig(), {}, seed=0)
    text = decoded(tokenizer, built, own=1)
    assert text.index("Be brief.") < text.index("What is 6 * 7?") < text.index("it is 42") < text.index("nothing")
    assert "42 it is" in text
    assert "forty-one" not in text  # its own attempt
    assert text.endswith("Now answer the question at the top yourself.<|im_end|>\n<|im_start|>assistant\n")


def test_context_none_is_the_students_own_prompt(tokenizer):
    plain = group(tokenizer, [1, 0])
    built = teacher_prompts(plain, tokenizer, ContextConfig(context="none"), {}, seed=0)
    assert [prompt.token_ids for prompt in built] == [plain.prompt.token_ids] * 2


def test_feedback_by_condition(tokenizer):
    failing = group(tokenizer, [0, 0], feedback="line 3 overflows")
    mixed = group(tokenizer, [1, 0, 0], feedback="line 3 overflows")
    by_default = ContextConfig()
    never = dataclasses.replace(by_default, feedback_condition="never")
    always = dataclasses.replace(by_default, feedback_condition="always")

    def shows(some_group, config):
        return "overflows" in decoded(tokenizer, teacher_prompts(some_group, tokenizer, config, {}, 0), own=1)

    assert (shows(failing, by_default), shows(mixed, by_default)) == (True, False)
    assert (shows(failing, never), shows(mixed, always)) == (False, True)


def test_thinking_is_removed_from_both_kinds_of_peer(tokenizer):
    texts = ["<think>secret</think>right", "<think>never closed", "x"]
    built = teacher_prompts(group(tokenizer, [1, 0, 0], texts), tokenizer, ContextConfig(), {}, seed=0)
    text = decoded(tokenizer, built, own=2)
    assert "right" in text
    assert "secret" not in text
    assert "never closed" not in text
    kept = ContextConfig(remove_thinking_from_demonstration=False)
    assert "secret" in decoded(
        tokenizer, teacher_prompts(group(tokenizer, [1, 0, 0], texts), tokenizer, kept, {}, 0), 2
    )


def test_thinking_that_the_template_opened_is_removed_too(tokenizer):
    texts = ["long reasoning here\n</think>\n\nThe answer is 42", "so and so</think>forty", "x"]
    text = decoded(tokenizer, teacher_prompts(group(tokenizer, [1, 0, 0], texts), tokenizer, ContextConfig(), {}, 0), 2)
    assert "The answer is 42" in text
    assert "forty" in text
    assert "reasoning" not in text
    assert "so and so" not in text
    assert "</think>" not in text


@pytest.mark.parametrize("context", ["2s1f", "all", "score_ordered"])
def test_peers_without_a_text_are_nobodys_peers(tokenizer, context):
    """One that ended at once and one cut off within its thinking; the others take their places."""
    texts = ["", "right", "<think>cut", " \n", "wrong", "also right"]
    some_group = group(tokenizer, [1, 1, 1, 0, 0, 1], texts)
    for seed in range(5):
        for own, peers in enumerate(choose_peers(some_group, ContextConfig(context=context), seed)):
            shown = {*peers.successes, *peers.failures, *peers.attempts}
            assert shown == {1, 4, 5} - {own}
    empty = group(tokenizer, [0, 0], ["", ""])
    assert teacher_prompts(empty, tokenizer, ContextConfig(), {}, 0) == [None, None]
    other = group(tokenizer, [1, 1], ["", "kept"])
    other.prompt.token_ids = [1, 2, 3]
    assert strangers_of(empty, [empty, other], ContextConfig()) == other.rollouts[1:]


@pytest.mark.parametrize("context", ["1s", "2s"])
def test_where_all_failed_and_no_peer_is_shown_feedback_on_the_attempt_stands_alone(tokenizer, context):
    config = ContextConfig(context=context, feedback_condition="always")
    failing = group(tokenizer, [0, 0, 0, None])
    for i, rollout in enumerate(failing.rollouts[:2]):
        rollout.feedback = f"test {i} overflows"
    built = teacher_prompts(failing, tokenizer, config, {}, 0)
    assert [prompt is None for prompt in built] == [False, False, True, True]  # no feedback; no verdict
    for own in range(2):
        text = decoded(tokenizer, built, own)
        assert f"What the checker says of the wrong answer:\ntest {own} overflows\n\nNow answer" in text
        assert f"test {1 - own}" not in text
        assert "peer number" not in text
        assert built[own].shows_feedback
    lonely = group(tokenizer, [1, 0], feedback="overflows")  # elsewhere it would tell a failure from a success
    assert [p is None for p in teacher_prompts(lonely, tokenizer, config, {}, 0)] == [True, False]
    assert "overflows" not in decoded(tokenizer, teacher_prompts(lonely, tokenizer, config, {}, 0), 1)
    one_failed = dataclasses.replace(config, context="1f")
    assert teacher_prompts(lonely, tokenizer, one_failed, {}, 0)[1] is None
    for condition in ("never", "when_no_solution"):
        without = dataclasses.replace(config, feedback_condition=condition)
        assert teacher_prompts(failing, tokenizer, without, {}, 0) == [None] * 4


def test_long_peers_are_shortened_and_the_question_never_is(tokenizer):
    texts = ["alpha " * 300, "beta " * 300, "gamma", "delta"]
    whole = group(tokenizer, [1, 0, 1, 0], texts)
    limit = 160
    built = teacher_prompts(whole, tokenizer, ContextConfig(max_reprompt_len=limit), {}, seed=0)
    for own in range(4):
        text = decoded(tokenizer, built, own)
        assert len(built[own].token_ids) <= limit
        assert "What is 6 * 7?" in text
        assert text.endswith("yourself.<|im_end|>\n<|im_start|>assistant\n")
    assert len(built[3].token_ids) > limit - 8  # the budget is used, not just kept
    assert "gamma" in decoded(tokenizer, built, own=3)  # a short peer stays whole
    with pytest.raises(ValueError, match=r"alone are \d+ tokens, over context.max_reprompt_len=20"):
        teacher_prompts(whole, tokenizer, ContextConfig(max_reprompt_len=20), {}, seed=0)


def test_an_opened_assistant_turn_stays_open(tokenizer):
    messages = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "def add(a, b):"}]
    opened = Group(
        Prompt(messages, encode_prompt(messages, tokenizer, {}), {}),
        [Rollout([5], "return a + b", True, 1.0), Rollout([6], "pass", True, 0.0)],
    )
    text = decoded(tokenizer, teacher_prompts(opened, tokenizer, ContextConfig(), {}, 0), own=1)
    assert text.endswith("<|im_start|>assistant\ndef add(a, b):")
    assert text.index("return a + b") < text.index("yourself.")


def test_peers_are_hashable_and_ordered():
    assert Peers((1, 2), (3,)) != Peers((2, 1), (3,))
