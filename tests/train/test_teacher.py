"""Second models: what is loaded, how it moves, what it says, and where its weights are."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mopd_kernels import LMHead
from mopd_train.config import Config
from mopd_train.models import load_model
from mopd_train.objectives import METHODS, Example, TokenBatch
from mopd_train.rollout import Rollout
from mopd_train.scoring import completion_hidden
from mopd_train.teacher import SecondModel, build_teacher, moves, update_ema
from tests.train.test_scoring import COMPLETIONS, PROMPTS, dense_logits

EXAMPLES = [Example(0, p, p, Rollout(c, "", True, 1.0)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


@pytest.fixture
def model(tiny_model):
    return load_model(str(tiny_model))


def config_of(tiny_model: Path, method: str = "mopd", **distillation: object) -> Config:
    config = Config(method=method)  # type: ignore[arg-type]
    config.model.model_name_or_path = str(tiny_model)
    for key, value in distillation.items():
        assert hasattr(config.distillation, key)
        setattr(config.distillation, key, value)
    return config


def moved(model, scale=0.05):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model


def second_model(teacher, student, config):
    @torch.no_grad()
    def states(model, batch):
        prompts, completions = [e.teacher_prompt_ids for e in batch], [e.rollout.token_ids for e in batch]
        return completion_hidden(model, prompts, completions, 2, config.training.tree)

    rows = min(model.lm_head.weight.size(0) for model in (student, teacher) if model is not None)
    return SecondModel(teacher, student, config, states, LMHead.from_model, nullcontext, student.dtype, rows)


def scores(teacher, student, config):
    return second_model(teacher, student, config).scores([EXAMPLES[:2], EXAMPLES[2:]])


def logits(scored):
    return torch.cat([s.hidden.float() @ s.head.weight.float().T for s in scored])


def test_ema_moves_by_its_rate_and_keeps_ties(tiny_model, model):
    config = config_of(tiny_model)
    teacher = build_teacher(config, model, tokenizer=None)
    before = teacher.model.norm.weight.clone()
    embedding = teacher.get_input_embeddings().weight.clone()
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
        model.get_input_embeddings().weight.mul_(3.0)
    update_ema(teacher, model, rate=0.25)
    torch.testing.assert_close(teacher.model.norm.weight, before + 0.25)
    torch.testing.assert_close(teacher.get_input_embeddings().weight, embedding * 1.5)
    assert teacher.lm_head.weight is teacher.get_input_embeddings().weight
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("method", "regularization", "expected", "moving"),
    [
        ("mopd", "ema", "copy", True),
        ("sdpo", "frozen", "copy", False),
        ("mopd", "trust-region", "copy", False),
        ("mopd", "self", "student", False),
        ("dpo", "self", "copy", False),  # its reference has nothing to do with the teacher's settings
        ("dpo", "ema", "copy", False),
        ("grpo", "ema", None, False),
        ("simpo", "ema", None, False),
        ("sft", "ema", None, False),
    ],
)
def test_a_method_loads_what_it_needs(tiny_model, model, method, regularization, expected, moving):
    config = config_of(tiny_model, method, teacher_regularization=regularization)
    teacher = build_teacher(config, model, tokenizer=None)
    assert {None: None, model: "student"}.get(teacher, "copy") == expected
    assert moves(config) is moving


def test_a_moving_average_keeps_float32(tiny_model):
    """0.05 of a small step vanishes in bfloat16: the same update leaves a bfloat16 copy where it was."""
    config = config_of(tiny_model)
    config.model.dtype = "bfloat16"
    student = load_model(str(tiny_model), "bfloat16")
    teacher = build_teacher(config, student, tokenizer=None)
    rounded = load_model(str(tiny_model), "bfloat16")
    assert teacher.dtype == torch.float32
    with torch.no_grad():
        student.model.norm.weight.mul_(1.01)
    for copy in (teacher, rounded):
        update_ema(copy, student, rate=0.05)
    change = (student.model.norm.weight.float() - 1) * 0.05
    torch.testing.assert_close(teacher.model.norm.weight, 1 + change)
    assert torch.equal(rounded.model.norm.weight, torch.ones_like(rounded.model.norm.weight))


@pytest.mark.parametrize("tree", [True, False])
def test_trust_region_mixes_logits_under_the_teachers_context(tiny_model, model, tree):
    config = config_of(tiny_model, teacher_regularization="trust-region", teacher_update_rate=0.3)
    config.training.tree = tree
    teacher = build_teacher(config, model, tokenizer=None)
    moved(model)
    scored = list(scores(teacher, model, config))
    with torch.no_grad():
        dense = 0.7 * dense_logits(teacher) + 0.3 * dense_logits(model)
    torch.testing.assert_close(logits(scored), dense, rtol=1e-4, atol=1e-4)
    assert scored[0].head is scored[1].head  # the wide weight is built once a step
    assert (dense_logits(teacher) - dense_logits(model)).abs().max() > 0.1


def test_trust_region_refuses_a_softcap(tiny_model, model):
    model.config.final_logit_softcapping = 30.0
    config = config_of(tiny_model, teacher_regularization="trust-region")
    with pytest.raises(ValueError, match=r"mixes logits, which a softcap \(here 30.0\) does not allow"):
        build_teacher(config, model, tokenizer=None)


@pytest.mark.parametrize("padding", [0, 128, 3000])
def test_a_larger_teacher_with_a_padded_vocabulary(tiny_model, tokenizer, model, tmp_path, padding):
    """Another hidden size; rows past the student's do not count, on either side."""
    torch.manual_seed(1)
    rows = len(tokenizer) + padding
    larger = LlamaConfig(
        vocab_size=rows, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(larger).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = config_of(tiny_model, teacher_regularization="frozen", teacher_model_name_or_path=str(tmp_path), alpha=0.0)
    teacher = build_teacher(config, model, tokenizer)
    (scored,) = second_model(teacher, model, config).scores([EXAMPLES])
    hidden, _ = completion_hidden(model, PROMPTS, COMPLETIONS, 2, True)
    batch = TokenBatch(EXAMPLES, hidden, LMHead.from_model(model), 7.0, scored.hidden, scored.head)
    loss = METHODS["mopd"].objective(batch, config).loss
    with torch.no_grad():
        p = dense_logits(teacher)[:, : len(tokenizer)].double().log_softmax(-1)
        q = dense_logits(model).double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum() / 7
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_teacher_in_another_precision(tiny_model, model):
    config = config_of(tiny_model, teacher_regularization="frozen", teacher_dtype="bfloat16")
    teacher = build_teacher(config, model, tokenizer=None)
    assert teacher.dtype == torch.bfloat16
    (scored,) = second_model(teacher, model, config).scores([EXAMPLES])
    hidden, _ = completion_hidden(moved(model), PROMPTS, COMPLETIONS, 2, True)
    batch = TokenBatch(EXAMPLES, hidden, LMHead.from_model(model), 7.0, scored.hidden, scored.head)
    loss = METHODS["mopd"].objective(batch, config).loss
    p = (scored.hidden.double() @ teacher.lm_head.weight.double().T).softmax(-1)
    q = dense_logits(model).detach().double().softmax(-1)
    m = (p + q) / 2
    expected = (p * (p / m).log() + q * (q / m).log()).sum() / 2 / 7
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_offloaded_weights_are_not_needed_once_a_step_is_scored(tiny_model, model):
    """The weights' home is `meta` here: what reads them after the block finds no values. One visit scores all."""
    plain = config_of(tiny_model)
    expected = logits(scores(build_teacher(plain, model, tokenizer=None), model, plain))
    config = config_of(tiny_model, teacher_offload=True)
    teacher = build_teacher(config, model, tokenizer=None)
    second = second_model(teacher, model, config)
    second.home = torch.device("meta")
    seen = []
    teacher.base_model.register_forward_hook(lambda *_: seen.append(next(teacher.parameters()).device.type))
    results = second.scores([EXAMPLES[:2], EXAMPLES[2:]])
    first = next(results)
    assert seen == ["cpu", "cpu"]
    assert next(teacher.parameters()).device.type == "meta"
    torch.testing.assert_close(logits([first, *results]), expected)
    assert len(seen) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading to the CPU needs an accelerator to leave")
def test_offload_frees_the_accelerator(tiny_model):
    student = load_model(str(tiny_model), device="cuda")
    config = config_of(tiny_model, teacher_offload=True)
    teacher = build_teacher(config, student, tokenizer=None)
    for scored in scores(teacher, student, config):
        assert {p.device.type for p in teacher.parameters()} == {"cpu"}
        assert scored.hidden.device.type == scored.head.weight.device.type == "cuda"
    update_ema(teacher, student, rate=0.5)
    assert {p.device.type for p in teacher.parameters()} == {"cpu"}


def test_without_a_second_model_nothing_is_scored(tiny_model, model):
    config = config_of(tiny_model, "grpo")
    assert list(scores(build_teacher(config, model, None), model, config)) == [None, None]
