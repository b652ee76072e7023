"""Controls that fill the context's blocks with other texts, and summaries, against groups worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from mopd_train.config import ContextConfig
from mopd_train.contexts import step_contexts, teacher_prompts
from mopd_train.metrics import context_metrics
from mopd_train.peers import choose_peers, strangers_of
from mopd_train.rollout import Rollout
from mopd_train.summaries import PeerSummaries, shares
from tests.train.test_contexts import decoded, group


def with_lengths(some_group, lengths):
    for rollout, length in zip(some_group.rollouts, lengths, strict=True):
        rollout.token_ids = [7] * length
    return some_group


def strangers(*lengths: int) -> list[Rollout]:
    return [Rollout([7] * length, f"stranger {i}", True, 1.0) for i, length in enumerate(lengths)]


def control(mode: str, match: str = "block", **more: object) -> ContextConfig:
    return ContextConfig(peer_control_mode=mode, peer_control_match=match, **more)  # type: ignore[arg-type]


def test_random_peers_fill_the_same_slots_whatever_their_verdict(tokenizer):
    mixed = group(tokenizer, [1, 1, 1, 0, 0, 0])
    under_success, under_failure = set(), set()
    for seed in range(60):
        peers = choose_peers(mixed, control("random_peer"), seed)[0]
        assert (len(peers.successes), len(peers.failures)) == (2, 1)
        shown = (*peers.successes, *peers.failures)
        assert len(set(shown)) == 3
        assert 0 not in shown
        under_success |= set(peers.successes)
        under_failure |= set(peers.failures)
    assert under_success == under_failure == {1, 2, 3, 4, 5}


def test_random_peers_keep_the_label_of_the_slot(tokenizer):
    config = control("random_peer", context="1f")
    trio = group(tokenizer, [0, 0, 1], ["own", "wrong one", "right one"])
    texts = {decoded(tokenizer, teacher_prompts(trio, tokenizer, config, {}, seed), 0) for seed in range(20)}
    label = config.failure_template.split("{text}")[0]
    assert any(label + "right one" in text for text in texts)
    assert any(label + "wrong one" in text for text in texts)
    assert not any("A correct answer" in text for text in texts)


def test_random_peers_matched_in_tokens_take_the_nearest_length(tokenizer):
    """Successes of 10, 20, 30 tokens, failures of 11, 21, 31: the success shown is its own nearest; once it is taken,
    the failure's block goes to whatever is nearest of the rest."""
    lengths = [1, 10, 20, 30, 11, 21, 31]
    graded = with_lengths(group(tokenizer, [1, 1, 1, 1, 0, 0, 0]), lengths)
    config = control("random_peer", "token", context="1s1f")
    seen = set()
    for seed in range(30):
        before = choose_peers(graded, dataclasses.replace(config, peer_control_mode="none"), seed)[0]
        after = choose_peers(graded, config, seed)[0]
        assert after.successes == before.successes
        wanted, (taken,), (filled,) = lengths[before.failures[0]], after.successes, after.failures
        distances = {i: abs(lengths[i] - wanted) for i in range(1, 7) if i != taken}
        assert distances[filled] == min(distances.values())
        seen.add(filled)
    assert len(seen) == 3


def test_unrelated_blocks_come_from_other_prompts(tokenizer):
    mixed = group(tokenizer, [1, 1, 1, 0])
    config = control("unrelated_prompt")
    for seed in range(10):
        for own, peers in enumerate(choose_peers(mixed, config, seed, strangers(5, 5, 5, 5))):
            assert (peers.successes, peers.failures) == ((), ())
            assert len(set(peers.strangers)) == (2 if own == 3 else 3)  # the only failure sees no failure
    shared = choose_peers(mixed, config, 0, strangers(5, 5, 5, 5))
    assert len({peers.strangers[:2] for peers in shared}) == 1  # drawn once a group: prefixes stay shared
    text = decoded(tokenizer, teacher_prompts(mixed, tokenizer, config, {}, 0, strangers(5, 5, 5, 5)), 0)
    assert text.count("A correct answer") == 3
    assert text.count("stranger") == 3
    assert "peer number" not in text
    assert teacher_prompts(mixed, tokenizer, config, {}, 0, []) == [None] * 4


def test_unrelated_blocks_matched_in_tokens_stop_where_the_budget_is_used(tokenizer):
    """Rollout 0 would see two successes and a failure of 10 tokens each: strangers of 8 tokens, four to pass 30."""
    mixed = with_lengths(group(tokenizer, [1, 1, 1, 0]), [1, 10, 10, 10])
    peers = choose_peers(mixed, control("unrelated_prompt", "token"), 0, strangers(*[8] * 6))
    assert len(peers[0].strangers) == 4
    assert len(peers[3].strangers) in (2, 3)  # two successes of 1 + 10 or 10 + 10 tokens


@pytest.mark.parametrize(
    ("match", "own_successes", "expected"),
    [
        ("block", [1, 1, 1, 1, 0], (3, 0)),  # three other successes fill the failure's block as well
        ("block", [1, 1, 0, 0, 0], (1, 1)),  # 1s1f of the context: one success is left, one comes from elsewhere
        ("token", [1, 1, 0, 0, 0], (1, 2)),  # 20 tokens: 10 of its own, two strangers of 8
    ],
)
def test_successes_only_are_topped_up_from_other_prompts(tokenizer, match, own_successes, expected):
    some = with_lengths(group(tokenizer, own_successes), [10] * 5)
    peers = choose_peers(some, control("success_only_matched", match), 1, strangers(8, 8, 8, 8))[0]
    assert (len(peers.successes), len(peers.strangers)) == expected
    assert peers.failures == ()
    assert all(own_successes[i] for i in peers.successes)


def test_strangers_are_successes_of_other_prompts(tokenizer):
    groups = [group(tokenizer, rewards) for rewards in ([1, 0], [1, 1, None], [1, 0])]
    groups[1].prompt.token_ids = [1, 2, 3]
    assert (
        strangers_of(groups[0], groups, ContextConfig()) == groups[1].rollouts[:2]
    )  # group 2 is the same prompt as group 0
    assert strangers_of(groups[1], groups, ContextConfig()) == [groups[0].rollouts[0], groups[2].rollouts[0]]


def test_a_step_hands_each_group_the_others_successes(tokenizer):
    groups = [group(tokenizer, [1, 0], [f"{name} right", f"{name} wrong"]) for name in ("a", "b")]
    groups[1].prompt.messages[1]["content"] = "What is 5 * 5?"
    groups[1].prompt.token_ids = groups[1].prompt.token_ids[:-1]
    contexts = step_contexts(groups, tokenizer, control("unrelated_prompt"), {}, 0)
    assert "b right" in decoded(tokenizer, contexts[0], 1)
    assert "a right" in decoded(tokenizer, contexts[1], 1)
    metrics = context_metrics(contexts)
    assert metrics["self_distillation/unrelated/mean"] == 1
    assert metrics["self_distillation/reprompt_sample_fraction"] == 1


class Recorder:
    """Answers requests for summaries from a list, and keeps what it was asked."""

    def __init__(self, tokenizer, replies):
        self.tokenizer, self.replies, self.asked, self.seeds = tokenizer, list(replies), [], []

    def __call__(self, prompts, tokens, seeds):
        self.seeds += seeds
        self.asked += [(self.tokenizer.decode(prompt), tokens) for prompt in prompts]
        return [self.tokenizer.encode(self.replies.pop(0)) for _ in prompts]


def test_summaries_come_from_the_text_the_student_or_an_excerpt(tokenizer):
    texts = [
        "<think>hm</think>own words <summary> multiply </summary>",
        "long answer without a tag",
        "first second third fourth fifth sixth",
        "the own rollout",
    ]
    config = ContextConfig(context="none", summary_k=3, summary_max_tokens=3)
    groups = [group(tokenizer, [1, 1, 1, 0], texts)]
    recorder = Recorder(tokenizer, ["add up</summary> and more", "never closed"])
    summaries = PeerSummaries(groups, tokenizer, config, {}, recorder, 0)
    contexts = step_contexts(groups, tokenizer, config, {}, 0, summaries)
    text = decoded(tokenizer, contexts[0], 3)
    label = config.success_summary_template.split("{text}")[0]
    assert {part.split("\n\n")[0] for part in text.split(label)[1:]} == {"multiply", "add up", "first second third"}
    assert shares(summaries.counts) == {f"summaries/{name}": 1 / 3 for name in ("tag", "asked", "excerpt")}
    assert len(recorder.asked) == 2  # once a rollout, though three teachers read each of them
    request, tokens = recorder.asked[0]
    assert tokens == 3
    assert "What is 6 * 7?" in request
    assert "long answer without a tag" in request
    assert request.endswith("<|im_start|>assistant\n<summary>")


def test_a_summary_draws_the_same_on_one_process_and_on_two(tokenizer):
    """Three groups at once, or the third on a process of its own, whose first group has the third one's seed."""
    config = ContextConfig(context="none", summary_k=2)
    groups = [group(tokenizer, [1, 1], [f"plain {i}", f"other {i}"]) for i in range(3)]
    one, two = (Recorder(tokenizer, ["s</summary>"] * 6) for _ in range(2))
    PeerSummaries(groups, tokenizer, config, {}, one, 1009)([(0, 1), (1, 0), (2, 0), (2, 1)])
    PeerSummaries(groups[2:], tokenizer, config, {}, two, 1009 + 2)([(0, 0), (0, 1)])
    assert one.seeds[2:] == two.seeds
    assert len(set(one.seeds)) == 4
    assert not set(one.seeds) & set(range(1009, 1009 + 8))  # from which rollouts are drawn


def test_summaries_stand_after_whole_peers_and_are_none_of_them(tokenizer):
    texts = [f"text {i} <summary>gist {i}</summary>" for i in range(5)]
    config = ContextConfig(context="1s", summary_k=2)
    whole = group(tokenizer, [1, 1, 1, 1, 0], texts)
    peers = choose_peers(whole, config, 0)[4]
    assert len(peers.summaries) == 2
    assert not set(peers.summaries) & set(peers.successes)
    summaries = PeerSummaries([whole], tokenizer, config, {}, Recorder(tokenizer, []), 0)
    text = decoded(tokenizer, step_contexts([whole], tokenizer, config, {}, 0, summaries)[0], 4)
    places = [text.index(f"text {peers.successes[0]}"), *(text.index(f"answer:\ngist {i}") for i in peers.summaries)]
    assert places == sorted(places)
    assert all(f"text {i}" not in text for i in peers.summaries)


@pytest.mark.parametrize(("source", "expected"), [("success", {1, 2}), ("failure", {3, 4}), ("all", {1, 2, 3, 4})])
def test_which_peers_are_summarised(tokenizer, source, expected):
    mixed = group(tokenizer, [1, 1, 1, 0, 0, None])
    config = ContextConfig(context="none", summary_k=9, summary_source=source)
    assert set(choose_peers(mixed, config, 0)[0].summaries) == expected


def test_a_summarised_failure_is_labelled_so(tokenizer):
    config = ContextConfig(context="none", summary_k=1, summary_source="failure")
    failing = group(tokenizer, [0, 0], ["a <summary>x y</summary>", "b"])
    summaries = PeerSummaries([failing], tokenizer, config, {}, Recorder(tokenizer, []), 0)
    text = decoded(tokenizer, step_contexts([failing], tokenizer, config, {}, 0, None)[0], 1)
    assert "Summary of another wrong answer:\na <summary>x y</summary>" in text  # no summarizer: an excerpt
    made = summaries([(0, 0)])
    assert made == {(0, 0): "x y"}


def test_a_request_for_a_summary_is_cut_to_the_budget(tokenizer):
    config = ContextConfig(context="none", summary_k=1, max_reprompt_len=120)
    long = group(tokenizer, [1, 1], ["alpha " * 400, "beta " * 400])
    recorder = Recorder(tokenizer, ["s</summary>"] * 2)
    PeerSummaries([long], tokenizer, config, {}, recorder, 0)([(0, 0), (0, 1)])
    for request, _ in recorder.asked:
        assert 100 < len(tokenizer.encode(request)) <= 120
        assert "What is 6 * 7?" in request
        assert request.endswith("<summary>")
