"""The real vLLM, colocated and served, against the trainer's own model.

float32 on both sides: rounding is near 4e-5, a stale engine is off by more than a hundred times as much.
"""

from __future__ import annotations

import pytest
import torch
from transformers import TopPLogitsWarper

from mopd_train import setup
from mopd_train.contexts import encode_prompt
from mopd_train.rollout import Prompt
from mopd_train.sampler import Sampling
from mopd_train.train import train_step
from tests.vllm.conftest import disturb, largest_gap

pytestmark = pytest.mark.vllm
TOLERANCE, STALE = 1e-3, 0.05
SAMPLING = Sampling(4, 16, 1.0, 1.0, 64)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = ["What is 7 * 8? Answer with just the number.", "Name three rivers of Europe."]
    messages = [[{"role": "user", "content": text}] for text in texts]
    return [Prompt(one, encode_prompt(one, tokenizer, {}), {}) for one in messages]


def test_logprobs_follow_the_student_through_two_pushes(engine, student, prompts):
    engine.update_weights(student)
    assert largest_gap(student, engine.generate(prompts, SAMPLING, [2], 0)) < TOLERANCE
    for push in range(2):
        disturb(student.parameters(), seed=push)
        assert largest_gap(student, engine.generate(prompts, SAMPLING, [2], 0)) > STALE, "the control without a push"
        engine.update_weights(student)
        assert largest_gap(student, engine.generate(prompts, SAMPLING, [2], 0)) < TOLERANCE


def test_a_tied_head_is_pushed_with_its_embedding(engine, student, prompts):
    assert student.lm_head.weight is student.model.embed_tokens.weight
    engine.update_weights(student)
    disturb([student.lm_head.weight])
    assert largest_gap(student, engine.generate(prompts, SAMPLING, [2], 0)) > STALE
    engine.update_weights(student)
    assert largest_gap(student, engine.generate(prompts, SAMPLING, [2], 0)) < TOLERANCE


def test_logprobs_are_those_of_the_sampling_distribution(engine, student, prompts):
    """Temperature, then the nucleus of top_p with its mass renormalised."""
    engine.update_weights(student)
    cooled = engine.generate(prompts, Sampling(4, 16, 0.7, 1.0, 64), [2], 0)
    assert largest_gap(student, cooled, lambda logits: logits / 0.7) < TOLERANCE
    nucleus = engine.generate(prompts, Sampling(4, 16, 0.7, 0.8, 64), [2], 0)
    assert largest_gap(student, nucleus, lambda logits: TopPLogitsWarper(0.8)(None, logits / 0.7)) < TOLERANCE
    assert largest_gap(student, nucleus, lambda logits: logits / 0.7) > STALE


def test_completions_end_with_their_stop_token(engine, student, tokenizer, prompts):
    engine.update_weights(student)
    free = engine.generate(prompts, Sampling(1, 16, 1.0, 1e-6, 64), [2], 0)[0].rollouts[0].token_ids
    stops = [2, free[2]]
    groups = engine.generate(prompts, Sampling(1, 16, 1.0, 1e-6, 64), stops, 0)
    first = groups[0].rollouts[0]
    end = free.index(stops[1]) + 1
    assert (first.token_ids, first.finished) == (free[:end], True)
    assert first.text == tokenizer.decode(free[:end], skip_special_tokens=True)
    assert largest_gap(student, groups[:1], lambda logits: TopPLogitsWarper(1e-6)(None, logits)) < TOLERANCE
    short = engine.generate(prompts, Sampling(3, 2, 1.0, 1.0, 64), [2], 0)
    assert [len(group.rollouts) for group in short] == [3, 3]
    assert all(r.finished == (r.token_ids[-1] == 2) and len(r.token_ids) <= 2 for g in short for r in g.rollouts)


def test_seeds(engine, student, prompts):
    engine.update_weights(student)

    def drawn(seed):
        groups = engine.generate([prompts[1], prompts[1]], SAMPLING, [2], seed)
        return [[r.token_ids for r in group.rollouts] for group in groups]

    once = drawn(1)
    assert once == drawn(1)
    assert once != drawn(2)
    assert once[0] != once[1], "equal prompts of a batch draw different numbers"
    assert len({tuple(ids) for ids in once[0]}) > 1


def test_training_steps_push_the_weights(engine, config, tmp_path, monkeypatch):
    """Two steps at a rate that moves the model; then one whose push is left out, as the control."""
    monkeypatch.setattr(setup, "check_rollout_engine", lambda config: None)
    monkeypatch.setattr(setup, "build_rollout_engine", lambda *arguments: engine)
    monkeypatch.setattr(config.training, "output_dir", str(tmp_path / "run"))
    monkeypatch.setattr(config.training, "report_to", [])
    monkeypatch.setattr(config.training, "learning_rate", 1e-3)
    monkeypatch.setattr(config.training, "warmup_steps", 1)
    monkeypatch.setattr(config.context, "context", "none")
    monkeypatch.setattr(config.rollout, "num_prompts", 2)
    monkeypatch.setattr(config.rollout, "num_generations", 2)
    monkeypatch.setattr(config.rollout, "temperature", 0.8)
    run = setup.set_up(config)
    with torch.no_grad():
        disturb(run.teacher.parameters())  # something to learn
    gaps = [train_step(run, step)["rollout/logprob_gap"] for step in (1, 2)]
    assert max(gaps) < TOLERANCE / 10, gaps
    monkeypatch.setattr(engine, "update_weights", lambda model: None)
    assert train_step(run, 3)["rollout/logprob_gap"] > STALE / 2
