"""Log-probs under many contexts against one plain forward per sequence."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mopd_kernels import PrefixTree
from mopd_train.analysis.scoring import context_logprobs
from mopd_train.config import Config
from mopd_train.contexts import CONTEXTS, teacher_prompts
from mopd_train.models import load_model
from tests.train.test_contexts import group


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(str(tiny_model))


@pytest.fixture
def config():
    settings = Config()
    settings.rollout.temperature = 0.7
    return settings


@torch.no_grad()
def plainly(model, tokenizer, some_group, context, config, seed):
    """One sequence at a time through the whole model and its logits."""
    settings = dataclasses.replace(config.context, context=context)
    expected = []
    for prompt, rollout in zip(
        teacher_prompts(some_group, tokenizer, settings, {}, seed), some_group.rollouts, strict=True
    ):
        if prompt is None:
            expected.append(None)
            continue
        ids = torch.tensor(prompt.token_ids + rollout.token_ids)
        temperature = config.distillation.teacher_temperature or config.rollout.temperature
        logits = model(ids[None]).logits[0, len(prompt.token_ids) - 1 : -1] / temperature
        expected.append(logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0])
    return expected


# all contexts defined; no success, so "1s" and "2s" are undefined; a lone rollout, where only "none" is defined
@pytest.mark.parametrize("rewards", [[1, 0, 1, 0, 1], [0, 0.5, 0], [1]])
@pytest.mark.parametrize("max_tokens", [16384, 150])
def test_nine_contexts_equal_plain_forwards(model, tokenizer, config, rewards, max_tokens):
    some_group = group(tokenizer, rewards, [f"{'long ' * i}peer number {i}" for i in range(len(rewards))])
    config.training.max_pack_tokens = max_tokens
    scored = context_logprobs(model, tokenizer, some_group, list(CONTEXTS), config, 3)
    assert list(scored) == list(CONTEXTS)
    undefined = 0
    for context, rows in scored.items():
        for actual, expected in zip(rows, plainly(model, tokenizer, some_group, context, config, seed=3), strict=True):
            assert (actual is None) == (expected is None)
            undefined += expected is None
            if expected is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert undefined == {5: 0, 3: 6, 1: 8}[len(rewards)]


def test_the_teachers_own_temperature_is_that_of_its_scores(model, tokenizer, config):
    config.distillation.teacher_temperature = 0.25
    some_group = group(tokenizer, [1, 0, 1])
    scored = context_logprobs(model, tokenizer, some_group, ["2s1f"], config, 3)["2s1f"]
    for actual, expected in zip(scored, plainly(model, tokenizer, some_group, "2s1f", config, seed=3), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_everything_is_one_pack(model, tokenizer, config, monkeypatch):
    """One forward of fewer tokens than the sequences have, however many contexts."""
    computed = []
    forward = PrefixTree.forward

    def counting(tree, *arguments, **options):
        computed.append((tree.unique_tokens, tree.total_tokens))
        return forward(tree, *arguments, **options)

    monkeypatch.setattr(PrefixTree, "forward", counting)
    context_logprobs(model, tokenizer, group(tokenizer, [1, 0, 1, 0]), list(CONTEXTS), config, 0)
    [(unique, total)] = computed
    assert unique < 0.5 * total


def test_nothing_defined(model, tokenizer, config):
    assert context_logprobs(model, tokenizer, group(tokenizer, [1, 0]), ["2s"], config, 0)["2s"][0] is None
    assert context_logprobs(model, tokenizer, group(tokenizer, [0, 0]), ["1s"], config, 0) == {"1s": [None, None]}
