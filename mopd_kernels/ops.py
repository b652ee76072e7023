"""The public functions: check, flatten, call the operator, give the result its names.

Legend: N tokens, V vocabulary, Hs/Ht student/teacher hidden size.
"""

from __future__ import annotations

from torch import Tensor

from . import checks, operators
from .chunked import DivergenceRows
from .spec import Divergence, Execution, LMHead, LogProbs, accumulation_dtype

REDUCTIONS = ("mean", "sum", "none")


def linear_divergence(
    student_hidden: Tensor,  # (N, Hs) or (..., Hs)
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,  # (N, Ht) or (..., Ht)
    teacher_head: LMHead | Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    labels: Tensor | None = None,  # (N,) or (...)
    token_weights: Tensor | None = None,  # (N,) or (...)
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
    normalizer: what "mean" divides by, e.g. the global token count; default: tokens that were not left out.

    Gradients reach student_hidden and the student head's weight and bias. Teacher tensors, labels and
    weights are constants. Sums are accumulated in float32 (float64 for float64 inputs).
    Raises ValueError or TypeError for inputs that do not fit together, before any work.

    Sources: arXiv 2306.13649 (generalised JSD), arXiv 2605.12652 (MOPD).
    """
    execution = execution or Execution()
    student, teacher = checks.as_head(student_head), checks.as_head(teacher_head)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.alpha(alpha)
    checks.temperature("temperature", temperature)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    checks.temperature("teacher_temperature", teacher_temperature)
    checks.hidden("student_hidden", student_hidden, student)
    checks.hidden("teacher_hidden", teacher_hidden, teacher)
    batch = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != batch:
        raise ValueError(
            f"expected teacher_hidden of the student's tokens {tuple(batch)}, got {tuple(teacher_hidden.shape[:-1])}"
        )
    labels = checks.flat("labels", labels, batch)
    weights = checks.flat("token_weights", token_weights, batch)
    if weights is not None and weights.requires_grad:
        raise ValueError('token_weights are constants here: detach them, or weight the result of reduction="none"')

    rows_used = checks.common_vocabulary(student, teacher)
    checks.labels(labels, rows_used)
    dtype = accumulation_dtype(student_hidden.dtype)
    weights = None if weights is None else weights.to(dtype)
    needs = checks.needs_grad(student_hidden, student)
    arguments = (
        student_hidden.flatten(0, -2),
        student.weight,
        student.bias,
        teacher_hidden.detach().flatten(0, -2),
        teacher.weight.detach(),
        None if teacher.bias is None else teacher.bias.detach(),
        labels,
        weights,
        [student.softcap or 0.0, student.scale, temperature],
        [teacher.softcap or 0.0, teacher.scale, teacher_temperature],
        rows_used,
        float(alpha),
        execution.backend or "",
        execution.chunk_tokens or 0,
        execution.memory_budget or 0,
        execution.grad_filter,
        needs,
    )
    save = execution.save
    if save == "auto":
        save = "statistics" if reduction == "none" else "gradients"
    if reduction == "none" and save == "gradients":
        raise ValueError('Execution.save="gradients" needs a scalar loss, got reduction="none": use "statistics"')
    if any(needs) and save == "gradients":
        loss, rows, _, _, _ = operators.divergence_with_grads(*arguments)
    else:
        rows = operators.divergence(*arguments)
        weighted = rows[0] if weights is None else rows[0] * weights
        loss = weighted.view(batch) if reduction == "none" else weighted.sum()
    if reduction == "mean":
        loss = loss / checks.denominator(normalizer, labels, weights, loss, student_hidden)
    result = DivergenceRows(*(row.view(batch) for row in rows.detach()))
    return Divergence(
        loss=loss,
        per_token=result.value,
        student_entropy=result.student_entropy,
        teacher_entropy=result.teacher_entropy,
        top1_agreement=result.agreement,
        student_logprobs=None if labels is None else result.student_logprobs,
        teacher_logprobs=None if labels is None else result.teacher_logprobs,
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
    Differentiable in hidden, weight and bias through all three results; the backward recomputes the logits
    chunk by chunk (1 + 3 products). float32 accumulation (float64 for float64).
    """
    execution = execution or Execution()
    head = checks.as_head(head)
    checks.temperature("temperature", temperature)
    checks.hidden("hidden", hidden, head)
    batch = hidden.shape[:-1]
    flat_labels = checks.flat("labels", labels, batch)
    assert flat_labels is not None
    rows_used = head.vocab_size or head.weight.size(0)
    checks.labels(flat_labels, rows_used)
    result = operators.logprobs(
        hidden.flatten(0, -2),
        head.weight,
        head.bias,
        flat_labels,
        [head.softcap or 0.0, head.scale, temperature],
        rows_used,
        execution.backend or "",
        execution.chunk_tokens or 0,
        execution.memory_budget or 0,
        checks.needs_grad(hidden, head),
    )
    return LogProbs(*(row.view(batch) for row in result))
