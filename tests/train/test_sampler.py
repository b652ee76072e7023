"""The sampler against transformers' generate and against the distribution it should draw from."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mopd_train.models import load_model
from mopd_train.sampler import Sampling, sample

PROMPTS = [[1, 5, 6], [1, 9], [1, 3, 3, 7, 8]]


@pytest.fixture
def model(tiny_model):
    return load_model(str(tiny_model))


def test_greedy_equals_generate_one_prompt_at_a_time(model):
    """A vanishing top_p leaves the most likely token; stops at different steps, so rows are dropped on the way."""
    free = model.generate(
        torch.tensor([PROMPTS[0]]), do_sample=False, max_new_tokens=9, eos_token_id=[-1], pad_token_id=2
    )
    stops = [2, int(free[0, 6])]  # a token the first prompt comes to
    drawn = sample(model, PROMPTS, Sampling(2, 9, 1.0, 1e-9, 64), stops, pad_id=2, seed=0)
    for prompt, group in zip(PROMPTS, drawn, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=9, eos_token_id=stops, pad_token_id=2
        )
        assert group == [expected[0, len(prompt) :].tolist()] * 2
    assert len({len(group[0]) for group in drawn}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_two_tokens_follow_the_model(temperature):
    """Chi-square of two-token completions against the model's own probabilities, over a vocabulary of seven."""
    keep, count = 7, 4000
    torch.manual_seed(1)
    shape = {"vocab_size": keep, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, initializer_range=0.4)).eval()
    drawn = sample(small, [[1, 5, 6]], Sampling(count, 2, temperature, 1.0, count), [99], pad_id=2, seed=3)[0]
    first = chances(small, [1, 5, 6], temperature)
    observed, expected = [], []
    for a in range(keep):
        second = chances(small, [1, 5, 6, a], temperature)
        for b in range(keep):
            observed.append(sum(pair == [a, b] for pair in drawn))
            expected.append(float(first[a] * second[b]) * count)
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True) if e > 5)
    cells = sum(e > 5 for e in expected)
    assert cells >= 12
    assert statistic < cells + 5 * (2 * cells) ** 0.5


def chances(model, ids, temperature):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].div(temperature).softmax(-1)


def test_batches_and_seeds(model):
    sampling = Sampling(4, 6, 1.0, 1.0, 4)
    once = sample(model, PROMPTS, sampling, [2], 2, seed=7)
    assert once == sample(model, PROMPTS, sampling, [2], 2, seed=7)
    assert once != sample(model, PROMPTS, sampling, [2], 2, seed=8)
    assert once == sample(model, PROMPTS, sampling, [2], 2, seed=[7 + i for i in range(len(PROMPTS))])
    assert once[::-1] == sample(
        model, PROMPTS[::-1], sampling, [2], 2, seed=[6 + i for i in range(len(PROMPTS), 0, -1)]
    )
    assert [len(group) for group in once] == [4, 4, 4]
    assert all(1 <= len(ids) <= 6 for group in once for ids in group)


def test_top_p_draws_only_from_the_nucleus(model):
    logits = model(torch.tensor([[1, 9]])).logits[0, -1]
    order = logits.softmax(-1).sort(descending=True)
    nucleus = set(order.indices[: int((order.values.cumsum(0) < 0.2).sum()) + 1].tolist())
    drawn = sample(model, [[1, 9]], Sampling(200, 1, 1.0, 0.2, 200), [2], 2, seed=0)[0]
    assert {ids[0] for ids in drawn} <= nucleus
