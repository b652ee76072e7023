"""MOPD, OPD and SDPO: the student's distribution moves towards a teacher's at every token of its own rollouts.

They differ in what the teacher reads. Sources: arXiv 2605.12652 (MOPD), arXiv 2306.13649 (on-policy distillation).
Legend: N completion tokens; q student, p teacher.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mopd_kernels import linear_divergence

from ..config import Config
from ..contexts import TeacherPrompt
from ..rollout import Group
from .batch import (
    Example,
    Loss,
    Selection,
    TokenBatch,
    engine_weights,
    student_logprobs,
    teacher_logprobs,
    token_means,
    update_weights,
)


def select(index: int, group: Group, prompts: list[TeacherPrompt | None], config: Config) -> Selection:
    """Rollouts whose teacher has something to read; the others have no loss and count nowhere. Units: tokens."""
    examples = [
        Example(index, group.prompt.token_ids, prompt.token_ids, rollout)
        for rollout, prompt in zip(group.rollouts, prompts, strict=True)
        if prompt is not None and rollout.token_ids
    ]
    return Selection(examples, sum(len(example.rollout.token_ids) for example in examples))


def distill(batch: TokenBatch, config: Config) -> Loss:
    """Σ_t w_t D(p_t, q_t) over the step's token count, or the sampled-token estimate of its gradient.

    D by distillation.alpha; w_t the importance ratios, constants.
    """
    if not config.distillation.full_logit_distillation:
        return sampled_token(batch, config)
    assert batch.teacher_hidden is not None
    assert batch.teacher_head is not None
    settings = config.distillation
    corrected = _may_be_weighted(batch, config)
    result = linear_divergence(
        batch.student_hidden,
        batch.student_head,
        batch.teacher_hidden,
        batch.teacher_head,
        alpha=settings.alpha,
        temperature=config.rollout.temperature,
        teacher_temperature=settings.teacher_temperature,
        labels=batch.labels,
        top_k=settings.distillation_topk,
        add_tail=settings.distillation_add_tail,
        reduction="none" if corrected else "mean",  # the ratios are known after the forward only
        normalizer=batch.normalizer,
        execution=settings.execution(),
    )
    assert result.student_logprobs is not None
    loss = result.loss
    weights, metrics = importance(batch, result.student_logprobs, config)
    if corrected:
        assert weights is not None
        loss = (loss * weights).sum() / batch.normalizer
    metrics |= token_means(
        entropy=result.student_entropy,
        teacher_entropy=result.teacher_entropy,
        top1_agreement=result.top1_agreement,
        student_topk_mass=result.student_topk_mass,
        teacher_topk_mass=result.teacher_topk_mass,
    )
    return Loss(loss, result.per_token, result.student_logprobs, metrics)


def sampled_token(batch: TokenBatch, config: Config) -> Loss:
    """-Σ_t w_t A_t log q_t / tokens,  A_t = log p_t - log q_t on the sampled token, a constant.

    On rollouts of q its expected gradient is that of reverse KL, term by term. step_level_kl: A_t is the mean over
    the token's step.
    """
    scored = student_logprobs(batch, config)
    temperature = config.distillation.teacher_temperature or config.rollout.temperature
    difference = teacher_logprobs(batch, config, temperature) - scored.logprobs.detach()
    advantage = _step_means(difference, batch) if config.distillation.step_level_kl else difference
    weights, metrics = importance(batch, scored.logprobs.detach(), config)
    terms = -(advantage if weights is None else advantage * weights) * scored.logprobs
    metrics |= token_means(entropy=scored.entropy, sampled_kl=-difference)
    metrics |= token_means(**{"advantage/abs_mean": advantage.abs()})
    return Loss(terms.sum() / batch.normalizer, terms.detach(), scored.logprobs.detach(), metrics)


def importance(
    batch: TokenBatch,
    logprobs: Tensor,  # (N,)
    config: Config,
) -> tuple[Tensor | None, dict[str, tuple[Tensor, float]]]:
    """The product of both ratios (None: 1 everywhere), and their means as metrics."""
    engine, update = engine_weights(batch, logprobs, config), update_weights(batch, logprobs, config)
    metrics = token_means(**{"is_ratio/engine": engine, "is_ratio/update": update})
    given = [weights for weights in (engine, update) if weights is not None]
    return (given[0] if len(given) == 1 else given[0] * given[1]) if given else None, metrics


def _may_be_weighted(batch: TokenBatch, config: Config) -> bool:
    by_engine = config.rollout.rollout_is and batch.engine_logprobs is not None
    return by_engine or (config.distillation.is_clip is not None and batch.old_logprobs is not None)


def _step_means(values: Tensor, batch: TokenBatch) -> Tensor:  # (N,) -> (N,)
    """Each value replaced by the mean over its step of its completion."""
    index, first = [], 0
    for example in batch.examples:
        assert example.steps is not None
        index += [first + step for step in example.steps]
        first += example.steps[-1] + 1
    steps = values.new_tensor(index).long()
    sums = values.new_zeros(first).index_add_(0, steps, values)
    counts = values.new_zeros(first).index_add_(0, steps, values.new_ones(len(index)))
    return (sums / counts)[steps]


def steps_of(token_ids: list[int], tokenizer: PreTrainedTokenizerBase, separator: str) -> list[int]:
    """The step of each token: a step ends with the token that completes the separator, which need not be a token of
    its own (" done.\\n\\n" often is one)."""
    steps, current, text = [], 0, ""
    for token in token_ids:
        steps.append(current)
        text += str(tokenizer.decode([token]))
        if separator in text:
            current, text = current + 1, ""
    return steps
