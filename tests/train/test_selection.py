"""Which rollouts of a group have a loss, and what they add to the normalizer."""

from __future__ import annotations

import pytest

from mopd_train.contexts import TeacherPrompt
from mopd_train.objectives import METHODS
from mopd_train.peers import Peers
from mopd_train.rollout import Group, Prompt, Rollout
from tests.train.test_objectives import config_of


def group_of(rewards: list[float | None]) -> Group:
    """Rollout i has i + 1 tokens."""
    return Group(Prompt([], [1, 2], {}), [Rollout([5] * (i + 1), "", True, r) for i, r in enumerate(rewards)])


@pytest.mark.parametrize(
    ("method", "rewards", "chosen", "units"),
    [
        ("grpo", [1, 0, None, 0.5], [0, 1], 1 + 2 + 4),  # mean 0.5: the last has no advantage but counts
        ("grpo", [1, 1, 1], [], 6),
        ("grpo", [1, None], [], 1),
        ("dpo", [1, 0, None, 0], [0, 1, 3], 2),
        ("simpo", [0.2, 0.5, 0.9], [0, 1, 2], 3),
        ("dpo", [0, 0, 0], [], 0),
        ("sft", [1, 0, 1, None], [0, 2], 2),
        ("sft", [0, 0.99], [], 0),
    ],
)
def test_which_rollouts_have_a_loss(method, rewards, chosen, units):
    group = group_of(rewards)
    selection = METHODS[method].select(0, group, [None] * len(rewards), config_of())
    assert [len(example.rollout.token_ids) - 1 for example in selection.examples] == chosen
    assert selection.units == units


def test_sft_counts_tokens_without_length_normalization():
    assert METHODS["sft"].select(0, group_of([1, 0, 1]), [], config_of(sft_length_normalize=False)).units == 1 + 3


@pytest.mark.parametrize("method", ["mopd", "grpo", "dpo", "simpo", "sft"])
def test_an_empty_completion_has_no_loss(method):
    group = group_of([1, 0, 1])
    group.rollouts[2].token_ids = []
    prompts = [TeacherPrompt([1], Peers((), ()), False)] * 3
    examples = METHODS[method].select(0, group, prompts, config_of()).examples
    assert examples
    assert all(example.rollout.token_ids for example in examples)
