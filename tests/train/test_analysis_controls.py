"""Label-leak controls against groups worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from mopd_train.analysis.controls import MATCHED, composition, matched_peers
from mopd_train.analysis.scoring import condition_prompts
from mopd_train.config import Config, ContextConfig
from mopd_train.contexts import CONTEXTS, choose_peers
from tests.train.test_contexts import group


def shown(some_group, chosen):
    return [composition(some_group, peers, 1.0) for peers in chosen]


def chosen_for(some_group, context, seed=3):
    return choose_peers(some_group, ContextConfig(context=context), seed)


def test_all_leaks_and_matched_does_not(tokenizer):
    """Three successes, two failures: a success sees 2 and 2, a failure 3 and 1; matched, all see 2 and 1."""
    mixed = group(tokenizer, [1, 0, 1, 0, 1])
    for context in ("all", "score_ordered"):
        chosen = chosen_for(mixed, context)
        assert shown(mixed, chosen) == [(2, 2), (3, 1), (2, 2), (3, 1), (2, 2)]
        matched = matched_peers(mixed, chosen, 1.0)
        assert shown(mixed, matched) == [(2, 1)] * 5
        for own, (before, after) in enumerate(zip(chosen, matched, strict=True)):
            for old, new in zip(dataclasses.astuple(before), dataclasses.astuple(after), strict=True):
                assert own not in new
                assert list(new) == [i for i in old if i in new]  # the order stays


def test_two_successes_wanted_of_two(tokenizer):
    """A success can be shown one, a failure two; matched, all are shown one."""
    mixed = group(tokenizer, [1, 0, 1, 0])
    chosen = chosen_for(mixed, "2s1f")
    assert shown(mixed, chosen) == [(1, 1), (2, 1), (1, 1), (2, 1)]
    assert shown(mixed, matched_peers(mixed, chosen, 1.0)) == [(1, 1)] * 4


@pytest.mark.parametrize("context", ["1s", "1f", "1s1f", "2s1f"])
def test_what_is_equal_already_stays(tokenizer, context):
    mixed = group(tokenizer, [1, 0, 1, 0, 1])
    chosen = chosen_for(mixed, context)
    assert matched_peers(mixed, chosen, 1.0) == chosen


def test_rollouts_without_a_verdict_do_not_decide(tokenizer):
    """The unjudged one is shown both successes; the judged ones set the measure."""
    some = group(tokenizer, [1, 1, None, 0, 0])
    chosen = chosen_for(some, "all")
    assert shown(some, chosen)[2] == (2, 2)
    assert shown(some, matched_peers(some, chosen, 1.0)) == [(1, 1)] * 5
    nobody = group(tokenizer, [None, None])
    assert matched_peers(nobody, chosen_for(nobody, "all"), 1.0) == chosen_for(nobody, "all")


def test_a_lone_success_leaves_nothing_to_match(tokenizer):
    lone = group(tokenizer, [1, 0, 0])
    assert [p is None for p in condition_prompts(lone, tokenizer, "1s", Config(), 0)] == [True, False, False]
    assert condition_prompts(lone, tokenizer, "1s" + MATCHED, Config(), 0) == [None] * 3


def test_every_context_can_be_matched(tokenizer):
    mixed = group(tokenizer, [1, 0, 1, 0.5, 1, 0, 0])
    for context in CONTEXTS:
        for seed in range(4):
            assert len(set(shown(mixed, matched_peers(mixed, chosen_for(mixed, context, seed), 1.0)))) == 1
