"""Liger and Cut Cross-Entropy on the same inputs, where their definition is ours; docs/comparison.md has the rest.

Both come with the `bench` extra and are skipped without it.
"""

from __future__ import annotations

import pytest
import torch

from mopd_kernels import LMHead, linear_divergence, linear_logprobs

N, H, V = 24, 16, 50


def liger(beta=0.5, **options):
    losses = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    return losses.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=8, **options
    )


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    labels = torch.randint(0, V, (N,))
    labels[::5] = -100
    teacher = torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), *teacher, labels


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_liger_agrees_on_equal_vocabularies(alpha, temperature):
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    theirs = liger(alpha, temperature=temperature)(hidden, weight, teacher_hidden, teacher_weight, labels)
    expected = torch.autograd.grad(theirs, [hidden, weight])
    ours = linear_divergence(
        hidden, weight, teacher_hidden, teacher_weight, alpha=alpha, temperature=temperature, labels=labels
    ).loss
    torch.testing.assert_close(ours, theirs)
    for mine, grad in zip(torch.autograd.grad(ours, [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(mine, grad, rtol=1e-4, atol=1e-6)


def test_liger_counts_padding_as_tokens_of_logit_zero():
    """Seven rows of zeros at the end of the teacher's weight, past the tokenizer's vocabulary."""
    hidden, weight, teacher_hidden, teacher_weight, labels = (
        0.2 * value if value.ndim == 2 else value for value in inputs()
    )
    padded = torch.cat([teacher_weight, torch.zeros(7, H)])
    true = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, labels=labels).loss
    ours = linear_divergence(hidden, weight, teacher_hidden, padded, labels=labels).loss
    theirs = liger()(hidden, weight, teacher_hidden, padded, labels)
    torch.testing.assert_close(ours, true)
    assert abs(theirs - true) > 0.05 * true


def test_liger_is_nan_where_a_probability_is_zero():
    hidden, weight, teacher_hidden, teacher_weight, labels = inputs()
    bias = torch.zeros(V)
    bias[3] = float("-inf")
    theirs = liger()(hidden, weight, teacher_hidden, teacher_weight, labels.clamp(min=4), bias, bias)
    student, teacher = LMHead(weight, bias), LMHead(teacher_weight, bias)
    ours = linear_divergence(hidden, student, teacher_hidden, teacher).loss
    there = bias.isfinite()
    without = linear_divergence(hidden, weight[there], teacher_hidden, teacher_weight[there]).loss
    assert theirs.isnan()
    torch.testing.assert_close(ours, without)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_cut_cross_entropy_agrees(softcap):
    module = pytest.importorskip("cut_cross_entropy", reason="cut-cross-entropy is not installed")
    hidden, weight, _, _, labels = inputs()
    with torch.compiler.set_stance("force_eager"):
        theirs = module.linear_cross_entropy(hidden, weight, labels, softcap=softcap, impl="torch_compile")
    ours = -linear_logprobs(hidden, LMHead(weight, softcap=softcap), labels).logprobs.sum() / (labels != -100).sum()
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, [hidden, weight]) for loss in (ours, theirs)]
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
