"""torch custom operators with fake implementations and autograd formulas.

Two serve `linear_divergence`: `mopd::divergence_with_grads` computes the loss and its gradients together
(4 products), `mopd::divergence` computes values and leaves a few floats per token, from which its backward
recomputes (2 + 4 products). They take plain tensors and numbers, so that torch.compile can carry them:

    *_logits   [softcap or 0, scale, temperature] of a head
    vocabulary rows used of both heads; the rest is padding
    backend    "" chooses by device;  chunk_tokens, memory_budget: 0 is "not given"
    needs      which of dH, dW, db are wanted; an unwanted one costs no product and comes back empty
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import backends, chunked
from .checks import kept_mask
from .chunked import DivergenceProblem, DivergenceRows, Gradients, LogprobProblem, Projection
from .spec import accumulation_dtype


@custom_op("mopd::divergence_with_grads", mutates_args=())
def divergence_with_grads(
    student_hidden: Tensor,  # (N, Hs)
    student_weight: Tensor,  # (Vs, Hs)
    student_bias: Tensor | None,
    teacher_hidden: Tensor,  # (N, Ht)
    teacher_weight: Tensor,  # (Vt, Ht)
    teacher_bias: Tensor | None,
    labels: Tensor | None,  # (N,)
    token_weights: Tensor | None,  # (N,)
    student_logits: list[float],
    teacher_logits: list[float],
    vocabulary: int,
    alpha: float,
    backend: str,
    chunk_tokens: int,
    memory_budget: int,
    grad_filter: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss = sum_i w_i d_i, stacked DivergenceRows (9, N), dH, dW, db of the loss."""
    problem = _divergence_problem(**locals())
    weights = _weights(token_weights, student_hidden)
    rows, gradients = chunked.divergence_forward(problem, weights, _triple(needs))
    loss = (rows[0] * weights).sum()
    return loss, rows, *_padded(gradients, student_hidden, student_weight, student_bias)


@custom_op("mopd::divergence", mutates_args=())
def divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    student_logits: list[float],
    teacher_logits: list[float],
    vocabulary: int,
    alpha: float,
    backend: str,
    chunk_tokens: int,
    memory_budget: int,
    grad_filter: float,
    needs: list[bool],
) -> Tensor:
    """Stacked DivergenceRows (9, N); gradients flow through row 0, the divergence of each token."""
    return chunked.divergence_forward(_divergence_problem(**locals()))[0]


@custom_op("mopd::divergence_backward", mutates_args=())
def divergence_backward(
    grad: Tensor,  # (N,)
    rows: Tensor,  # (9, N) of `divergence`
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    student_logits: list[float],
    teacher_logits: list[float],
    vocabulary: int,
    alpha: float,
    backend: str,
    chunk_tokens: int,
    memory_budget: int,
    grad_filter: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dH, dW, db of sum_i grad_i d_i, from saved row statistics."""
    arguments = {name: value for name, value in locals().items() if name not in ("grad", "rows")}
    gradients = chunked.divergence_backward(_divergence_problem(**arguments), rows, grad, _triple(needs))
    return _padded(gradients, student_hidden, student_weight, student_bias)


@custom_op("mopd::logprobs", mutates_args=())
def logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,
    labels: Tensor,  # (N,)
    logits: list[float],
    vocabulary: int,
    backend: str,
    chunk_tokens: int,
    memory_budget: int,
    needs: list[bool],
) -> Tensor:
    """(3, N): log-prob of the label, entropy, logsumexp."""
    return chunked.logprobs_forward(_logprob_problem(**locals()))


@custom_op("mopd::logprobs_backward", mutates_args=())
def logprobs_backward(
    grads: Tensor,  # (3, N)
    result: Tensor,  # (3, N) of `logprobs`
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logits: list[float],
    vocabulary: int,
    backend: str,
    chunk_tokens: int,
    memory_budget: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dH, dW, db of sum(grads * result)."""
    arguments = {name: value for name, value in locals().items() if name not in ("grads", "result")}
    gradients = chunked.logprobs_backward(_logprob_problem(**arguments), result, grads, _triple(needs))
    return _padded(gradients, hidden, weight, bias)


def _divergence_problem(**a: Any) -> DivergenceProblem:
    hidden, labels, weights = a["student_hidden"], a["labels"], a["token_weights"]
    vocabulary, kept = a["vocabulary"], _kept(a["student_hidden"], labels, weights)
    chunk = chunked.chunk_rows(kept.numel(), vocabulary, hidden, a["chunk_tokens"], a["memory_budget"], buffers=2)
    return DivergenceProblem(
        student_hidden=hidden,
        student=_projection(a["student_weight"], a["student_bias"], a["student_logits"], vocabulary),
        teacher_hidden=a["teacher_hidden"],
        teacher=_projection(a["teacher_weight"], a["teacher_bias"], a["teacher_logits"], vocabulary),
        labels=labels,
        kept=kept,
        alpha=a["alpha"],
        backend=backends.pick(a["backend"], hidden),
        chunk=chunk,
        grad_filter=a["grad_filter"],
    )


def _logprob_problem(**a: Any) -> LogprobProblem:
    hidden, labels, vocabulary = a["hidden"], a["labels"], a["vocabulary"]
    kept = _kept(hidden, labels, None)
    return LogprobProblem(
        hidden=hidden,
        head=_projection(a["weight"], a["bias"], a["logits"], vocabulary),
        labels=labels,
        kept=kept,
        backend=backends.pick(a["backend"], hidden),
        chunk=chunked.chunk_rows(kept.numel(), vocabulary, hidden, a["chunk_tokens"], a["memory_budget"], buffers=1),
    )


def _projection(weight: Tensor, bias: Tensor | None, logits: list[float], rows: int) -> Projection:
    softcap, scale, temperature = logits
    return Projection(weight[:rows], None if bias is None else bias[:rows], scale, softcap or None, temperature)


def _kept(hidden: Tensor, labels: Tensor | None, weights: Tensor | None) -> Tensor:
    mask = kept_mask(labels, weights)
    return torch.arange(hidden.size(0), device=hidden.device) if mask is None else mask.nonzero()[:, 0]


def _weights(token_weights: Tensor | None, hidden: Tensor) -> Tensor:
    dtype = accumulation_dtype(hidden.dtype)
    return hidden.new_ones(hidden.size(0), dtype=dtype) if token_weights is None else token_weights


def _triple(needs: list[bool]) -> tuple[bool, bool, bool]:
    return needs[0], needs[1], needs[2]


def _padded(gradients: Gradients, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in their parameters' shapes: rows past the vocabulary are 0, unwanted ones empty.

    A float16 weight's gradient stays in float32 until it is scaled: sums over tokens may pass 65504.
    """

    def pad(grad: Tensor | None, like: Tensor | None) -> Tensor:
        if grad is None or like is None:
            return hidden.new_empty(0)
        if grad.size(0) < like.size(0):
            full = grad.new_zeros(like.shape)
            full[: grad.size(0)] = grad
            grad = full
        return grad if like.dtype == torch.float16 else grad.to(like.dtype)

    return pad(gradients.hidden, hidden), pad(gradients.weight, weight), pad(gradients.bias, bias)


def _fake_padded(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> list[Tensor]:
    def like(tensor: Tensor | None, wanted: bool, dtype: torch.dtype | None = None) -> Tensor:
        if tensor is None or not wanted:
            return hidden.new_empty(0)
        return tensor.new_empty(tensor.shape, dtype=dtype)

    wide = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    return [like(hidden, needs[0]), like(weight, needs[1], wide), like(bias, needs[2], wide)]


@divergence_with_grads.register_fake
def _(student_hidden, student_weight, student_bias, *rest):  # type: ignore[no-untyped-def]
    rows = _fake_rows(student_hidden, len(DivergenceRows._fields))
    return rows.new_empty(()), rows, *_fake_padded(student_hidden, student_weight, student_bias, rest[-1])


@divergence.register_fake
def _(student_hidden, *rest):  # type: ignore[no-untyped-def]
    return _fake_rows(student_hidden, len(DivergenceRows._fields))


@divergence_backward.register_fake
def _(grad, rows, student_hidden, student_weight, student_bias, *rest):  # type: ignore[no-untyped-def]
    return tuple(_fake_padded(student_hidden, student_weight, student_bias, rest[-1]))


@logprobs.register_fake
def _(hidden, *rest):  # type: ignore[no-untyped-def]
    return _fake_rows(hidden, 3)


@logprobs_backward.register_fake
def _(grads, result, hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    return tuple(_fake_padded(hidden, weight, bias, rest[-1]))


def _fake_rows(hidden: Tensor, count: int) -> Tensor:
    return hidden.new_empty(count, hidden.size(0), dtype=accumulation_dtype(hidden.dtype))


def _scaled(saved: Tensor, wanted: bool, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """In place: a second gradient-sized buffer would cost as much as the parameter. Autograd's own version
    counter turns a second backward into an error."""
    return saved.mul_(factor.to(saved.dtype)).to(dtype) if wanted else None


def _setup_with_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.count = inputs[-1], len(inputs)
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _backward_with_grads(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = ctx.saved_tensors
    grads = (
        _scaled(hidden, ctx.needs[0], grad_loss, ctx.dtypes[0]),
        _scaled(weight, ctx.needs[1], grad_loss, ctx.dtypes[1]),
        _scaled(bias, ctx.needs[2], grad_loss, ctx.dtypes[1]),
    )
    return grads + (None,) * (ctx.count - 3)


def _setup_recompute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Inputs are tensors first, then numbers; both go to the backward operator as they came."""
    ctx.tensors = [isinstance(value, Tensor) for value in inputs]
    ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(output, *(value for value in inputs if isinstance(value, Tensor)))


def _saved_inputs(ctx: Any) -> tuple[Tensor, list[Any]]:
    output, *tensors = ctx.saved_tensors
    remaining = iter(tensors)
    inputs = [
        next(remaining) if is_tensor else value for is_tensor, value in zip(ctx.tensors, ctx.constants, strict=True)
    ]
    return output, inputs


def _recomputed(inputs: list[Any], grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    needs = inputs[-1]
    wanted = [grad.to(inputs[min(i, 1)].dtype) if needs[i] else None for i, grad in enumerate(grads)]
    return (*wanted, *[None] * (len(inputs) - 3))


def _backward_divergence(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    rows, inputs = _saved_inputs(ctx)
    return _recomputed(inputs, divergence_backward(grad_rows[0], rows, *inputs))


def _backward_logprobs(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
    result, inputs = _saved_inputs(ctx)
    return _recomputed(inputs, logprobs_backward(grads, result, *inputs))


divergence_with_grads.register_autograd(_backward_with_grads, setup_context=_setup_with_grads)
divergence.register_autograd(_backward_divergence, setup_context=_setup_recompute)
logprobs.register_autograd(_backward_logprobs, setup_context=_setup_recompute)
