"""Hidden states of completions, and the loss through them."""

from __future__ import annotations

import pytest
import torch

from mopd_kernels import LMHead
from mopd_kernels.losses.divergence import dense_divergence
from mopd_train.config import Config
from mopd_train.models import check_same_tokenizer, load_model
from mopd_train.objectives import METHODS, Example, TokenBatch
from mopd_train.rollout import Rollout
from mopd_train.scoring import completion_hidden

PROMPTS = [[1, 5, 6], [1, 9], [1, 3, 3, 7, 8]]
COMPLETIONS = [[11, 12], [13, 14, 15, 2], [2]]


@pytest.fixture
def model(tiny_model):
    return load_model(str(tiny_model))


def dense_logits(model):
    """Logits that predict each completion token, one unpadded sequence at a time by the whole model."""
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0]
        rows.append(logits[len(prompt) - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("tree", [True, False])
def test_states_predict_the_completion_tokens(model, tree):
    hidden, computed = completion_hidden(model, PROMPTS, COMPLETIONS, pad_id=2, tree=tree)
    assert computed == (15 if tree else 18)  # the first token is shared; or padding to six
    torch.testing.assert_close(hidden @ model.lm_head.weight.T, dense_logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_pack_tokens", [1, 8, 11])
def test_packs_under_a_budget_change_nothing_but_the_tokens(model, max_pack_tokens):
    """Budgets below the longest sequence, 6 tokens, take one sequence each."""
    with torch.no_grad():
        hidden, computed = completion_hidden(model, PROMPTS, COMPLETIONS, 2, True, max_pack_tokens)
        whole, _ = completion_hidden(model, PROMPTS, COMPLETIONS, 2, True)
    torch.testing.assert_close(hidden, whole, rtol=1e-4, atol=1e-6)
    assert computed == {1: 17, 8: 17, 11: 16}[max_pack_tokens]
    assert completion_hidden(model, PROMPTS, COMPLETIONS, 2, True, max_pack_tokens)[1] == 15  # gradients: one pack


def batch_of(model, teacher, normalizer=7.0, tree=True):
    examples = [Example(0, p, p, Rollout(c, "", True, 1.0)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    return TokenBatch(
        examples=examples,
        student_hidden=completion_hidden(model, PROMPTS, COMPLETIONS, pad_id=2, tree=tree)[0],
        student_head=LMHead.from_model(model),
        teacher_hidden=completion_hidden(teacher, PROMPTS, COMPLETIONS, pad_id=2, tree=tree)[0].detach(),
        teacher_head=LMHead.from_model(teacher),
        normalizer=normalizer,
    )


def test_teacher_equal_to_student_gives_loss_zero(model):
    result = METHODS["mopd"].objective(batch_of(model, model), Config())
    assert result.loss.item() == pytest.approx(0.0, abs=1e-7)
    agreement, tokens = result.means["top1_agreement"]
    assert agreement == tokens == 7


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_loss_and_gradients_equal_the_dense_model(tiny_model, model, alpha, tree):
    """Through the tied embedding as well, which gets gradients from both ends of the model."""
    teacher = load_model(str(tiny_model))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    config = Config()
    config.distillation.alpha = alpha
    config.rollout.temperature = 0.7
    METHODS["mopd"].objective(batch_of(model, teacher, tree=tree), config).loss.backward()
    fused = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.no_grad():
        teacher_logits = dense_logits(teacher)
    (dense_divergence(dense_logits(model) / 0.7, teacher_logits / 0.7, alpha).sum() / 7).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fused[name], parameter.grad, rtol=2e-3, atol=2e-6)


def test_another_tokenizer_is_refused(tokenizer):
    class Shifted:
        def encode(self, text, add_special_tokens):
            return [i + 1 for i in tokenizer.encode(text, add_special_tokens=add_special_tokens)]

    check_same_tokenizer(tokenizer, tokenizer, "same")
    with pytest.raises(ValueError, match="teacher other/model has another tokenizer: 'Hello, world!' is"):
        check_same_tokenizer(tokenizer, Shifted(), "other/model")
