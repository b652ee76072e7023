"""The public functions: check, flatten, call the operator, give the result its names.

Legend: N tokens, V vocabulary, Hs/Ht student/teacher hidden size, K contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from . import (
    autograd,  # noqa: F401  registers the operators' gradients
    checks,
    operators,
    vocab_parallel,
)
from .chunked import DivergenceRows
from .operators import DivergenceArguments, LogprobArguments
from .spec import Divergence, Execution, LMHead, LogProbs, accumulation_dtype

REDUCTIONS = ("mean", "sum", "none")

Arguments = TypeVar("Arguments")


def linear_divergence(
    student_hidden: Tensor,  # (N, Hs) or (..., Hs)
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,  # (N, Ht) or (..., Ht); (K, N, Ht) or (K, ..., Ht) for K contexts
    teacher_head: LMHead | Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    labels: Tensor | None = None,  # (N,) or (...)
    token_weights: Tensor | None = None,  # (N,) or (...)
    context_weights: Tensor | None = None,  # (K,), (K, N) or (K, ...)
    top_k: int | None = None,
    add_tail: bool = True,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    execution: Execution | None = None,
) -> Divergence:
    """Divergence of teacher and student token distributions, from hidden states, without [N, V] logits.

    With q, p the softmax of z = cap(scale·(h Wᵀ + b)) / temperature of student and teacher:
        alpha = 0   forward KL  Σ p (log p - log q)
        alpha = 1   reverse KL  Σ q (log q - log p)
        between     Jensen-Shannon (1-alpha) KL(q||M) + alpha KL(p||M), M = (1-alpha) q + alpha p
    and loss = Σ_i token_weights_i · divergence_i ("sum"), that over `normalizer` ("mean"), or the
    weighted terms themselves ("none").

    labels: adds the labels' log-probs under both sides to the result; tokens labelled -100 are left out.
    token_weights: constants, known up front. Tokens of weight 0 are dropped before any product.
    context_weights: non-negative; divided by their sum over K, so that the teacher is the arithmetic mixture
        p = Σ_k w_k p_k of the contexts' distributions. Default: equal weights. A sum of 0 on a token that counts is
        refused on CPU, and NaN on an accelerator. Costs 3 Hs + K Ht, not K (3 Hs + Ht).
    top_k: the divergence on the student's k largest entries, both sides normalised by their full logsumexp; the
        rest is one more entry log(1 - Σ) (`add_tail`), or left out and both sides renormalised. With
        Execution.grad_filter the filter then sees the gradient behind the softcap.
    normalizer: > 0, what "mean" divides by, e.g. the global token count; default: tokens that were not left out.

    Heads with a VocabShard share their vocabulary over ranks; all ranks call this together and get equal
    results, the hidden gradient summed over ranks and their own rows' weight gradients.

    Gradients reach student_hidden and the student head's weight and bias, once (no double backward). Teacher
    tensors, labels and weights are constants. Hidden states, weights and biases of both sides have one dtype and
    device. Sums are accumulated in float32 (float64 for float64 inputs), under autocast as well.
    Raises ValueError or TypeError for inputs that do not fit together, before any work.

    Sources: arXiv 2306.13649 (generalised JSD), arXiv 2605.12652 (MOPD).
    """
    execution = execution or Execution()

    def checked() -> tuple[DivergenceArguments, str]:
        student, teacher = checks.as_head(student_head), checks.as_head(teacher_head)
        checks.choice("reduction", reduction, REDUCTIONS)
        checks.between("alpha", alpha)
        checks.positive("temperature", temperature)
        checks.positive("teacher_temperature", temperature if teacher_temperature is None else teacher_temperature)
        checks.top_k(top_k)
        checks.normalizer(normalizer)
        checks.hidden("student_hidden", student_hidden, student)
        checks.hidden("teacher_hidden", teacher_hidden, teacher)
        checks.one_kind(student_hidden, teacher_hidden)
        checks.token_weights(token_weights)
        batch = student_hidden.shape[:-1]
        vocabulary = checks.common_vocabulary(student, teacher)
        flat_labels = checks.flat("labels", labels, student_hidden)
        flat_weights = checks.flat("token_weights", token_weights, student_hidden)
        kept = None if context_weights is None else checks.kept_mask(flat_labels, flat_weights)
        contexts, weights = checks.contexts(teacher_hidden.detach(), context_weights, batch, kept)
        dtype = accumulation_dtype(student_hidden.dtype)
        arguments = DivergenceArguments(
            student_hidden=student_hidden.flatten(0, -2),
            student_weight=student.weight,
            student_bias=student.bias,
            teacher_hidden=contexts,
            teacher_weight=teacher.weight.detach(),
            teacher_bias=None if teacher.bias is None else teacher.bias.detach(),
            labels=None if flat_labels is None else checks.labels(flat_labels, vocabulary),
            token_weights=None if flat_weights is None else flat_weights.to(dtype),
            context_weights=None if weights is None else weights.to(dtype),
            student_logits=_logits(student, temperature),
            teacher_logits=_logits(teacher, temperature if teacher_temperature is None else teacher_temperature),
            vocabulary=vocabulary,
            start=0 if student.shard is None else student.shard.start,
            group=_group(student),
            alpha=float(alpha),
            top_k=top_k or 0,
            add_tail=add_tail,
            backend=execution.backend or "",
            chunk_tokens=execution.chunk_tokens or 0,
            memory_budget=execution.memory_budget or 0,
            grad_filter=execution.grad_filter,
            needs=checks.needs_grad(student_hidden, student),
        )
        return arguments, checks.save(execution, reduction, student_hidden.dtype)

    arguments, save = _together(checked, student_head, teacher_head)
    loss, rows = _weighted_divergence(arguments, save, reduction == "none")
    batch = student_hidden.shape[:-1]
    if reduction == "none":
        loss = loss.view(batch)
    if reduction == "mean":
        loss = loss / checks.denominator(normalizer, arguments.labels, arguments.token_weights, loss, student_hidden)
    result = DivergenceRows(*(row.view(batch) for row in rows.detach()))
    return Divergence(
        loss=loss,
        per_token=result.value,
        student_entropy=result.student_entropy,
        teacher_entropy=result.teacher_entropy,
        top1_agreement=result.agreement,
        student_logprobs=None if labels is None else result.student_logprobs,
        teacher_logprobs=None if labels is None else result.teacher_logprobs,
        student_topk_mass=None if top_k is None else result.student_mass,
        teacher_topk_mass=None if top_k is None else result.teacher_mass,
    )


def linear_logprobs(
    hidden: Tensor,  # (N, H) or (..., H)
    head: LMHead | Tensor,
    labels: Tensor,  # (N,) or (...)
    *,
    temperature: float = 1.0,
    execution: Execution | None = None,
) -> LogProbs:
    """log softmax(z)[label], entropy and logsumexp of every token, without [N, V] logits.

    z = cap(scale·(h Wᵀ + b)) / temperature. Tokens labelled -100 are left out: they cost nothing and hold 0.
    Differentiable once in hidden, weight and bias through all three results; the backward recomputes the logits
    chunk by chunk (1 + 3 products). float32 accumulation (float64 for float64). Heads with a VocabShard as in
    `linear_divergence`.
    """
    execution = execution or Execution()

    def checked() -> LogprobArguments:
        given = checks.as_head(head)
        checks.positive("temperature", temperature)
        checks.hidden("hidden", hidden, given)
        flat_labels = checks.flat("labels", labels, hidden)
        assert flat_labels is not None
        vocabulary = given.vocab_size or given.weight.size(0)
        return LogprobArguments(
            hidden=hidden.flatten(0, -2),
            weight=given.weight,
            bias=given.bias,
            labels=checks.labels(flat_labels, vocabulary),
            logits=_logits(given, temperature),
            vocabulary=vocabulary,
            start=0 if given.shard is None else given.shard.start,
            group=_group(given),
            backend=execution.backend or "",
            chunk_tokens=execution.chunk_tokens or 0,
            memory_budget=execution.memory_budget or 0,
            needs=checks.needs_grad(hidden, given),
        )

    result = operators.logprobs(*_together(checked, head))
    return LogProbs(*(row.view(hidden.shape[:-1]) for row in result))


def grouped_logprobs(
    hidden: Tensor,  # (K, N, H) or (K, ..., H)
    head: LMHead | Tensor,
    labels: Tensor,  # (N,) or (...)
    *,
    temperature: float = 1.0,
    execution: Execution | None = None,
) -> LogProbs:  # of (K, N) or (K, ...)
    """`linear_logprobs` of the same labels under K contexts: the labels are given once."""

    def repeated() -> Tensor:
        if hidden.ndim < 3 or labels.shape != hidden.shape[1:-1]:
            raise ValueError(
                f"expected hidden (K, ..., H) and labels (...), got {tuple(hidden.shape)} and {tuple(labels.shape)}"
            )
        return labels.expand(hidden.shape[:-1])

    return linear_logprobs(hidden, head, _together(repeated, head), temperature=temperature, execution=execution)


def _weighted_divergence(arguments: DivergenceArguments, save: str, per_token: bool) -> tuple[Tensor, Tensor]:
    """Σ_i w_i d_i, or (N,) of its terms, and the stacked rows."""
    if any(arguments.needs) and save == "gradients":
        loss, rows, *_ = operators.divergence_with_grads(*arguments)
        return loss, rows
    rows, *_ = operators.divergence(*arguments)
    weights = arguments.token_weights
    weighted = rows[0] if weights is None else rows[0] * weights
    return weighted if per_token else weighted.sum(), rows


def _together(checked: Callable[[], Arguments], *heads: LMHead | Tensor) -> Arguments:
    """The checked arguments; if this rank refuses them, the ranks that it shares a vocabulary with hear of it."""
    try:
        return checked()
    except (TypeError, ValueError):
        shared = [head for head in heads if isinstance(head, LMHead) and head.shard is not None]
        if shared:
            vocab_parallel.refuse(shared[0].shard.group, shared[0].weight.device)  # type: ignore[union-attr]
        raise


def _logits(head: LMHead, temperature: float) -> list[float]:
    return [head.softcap or 0.0, head.scale, temperature]


def _group(head: LMHead) -> str:
    return "" if head.shard is None else vocab_parallel.group_name(head.shard.group)
