"""The least-memory mode: all tokens at once and no chunk of logits, for backends that make logits tile by tile.

Same results as `chunked` and `chunked_logprobs`, function by function. A `backend.Product` stands where a chunk of
logits would; the backward goes through blocks of vocabulary rows, of which d(logits) takes the memory that one
chunk of logits would have taken, and dW is written once, in its parameter's dtype.

Legend: N tokens, M kept tokens, V vocabulary rows held here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .chunked import DivergenceProblem, DivergenceRows, Saved, full_rows
from .chunked_logprobs import LogprobProblem
from .projection import Gradients, Needs, Projection
from .spec import accumulation_dtype


def require(top_k: int, context_weights: Tensor | None) -> None:
    """Raises ValueError for what needs whole rows of logits at once: top-k and mixtures of contexts."""
    if top_k or context_weights is not None:
        wanted = "top_k" if top_k else "context_weights"
        raise ValueError(f"backend 'triton-tiles' never holds a row of logits, got {wanted}: use backend='triton'")


def divergence_forward(
    problem: DivergenceProblem,
    coefficient: Tensor | None = None,  # (N,)
    needs: Needs = (False, False, False),
) -> tuple[Saved, Gradients]:
    saved = Saved.empty(problem.student_hidden, 0, 0)
    if problem.kept.numel():
        z_s, z_t = _both(problem, problem.kept)
        saved.rows[:, problem.kept] = full_rows(problem, problem.kept, z_s, z_t)
    if coefficient is None or not any(needs):
        return saved, Gradients(None, None, None)
    return saved, divergence_backward(problem, saved, coefficient, needs)


def divergence_backward(
    problem: DivergenceProblem,
    saved: Saved,
    coefficient: Tensor,  # (N,)
    needs: Needs,
) -> Gradients:
    kept, head = problem.kept[coefficient[problem.kept] != 0], problem.student
    products = None
    if kept.numel():
        z_s, z_t = _both(problem, kept)
        terms = DivergenceRows(*saved.rows[:, kept]).terms
        columns = _columns(problem.chunk, kept, head)
        products = problem.backend.divergence_products(
            z_s, z_t, terms, coefficient[kept], problem.alpha, problem.grad_filter, needs, columns
        )
    gradients = _gradients(problem.student_hidden, head, kept, products, needs)
    problem.ranks.reduce(gradients.hidden)
    return gradients


def logprobs_forward(problem: LogprobProblem) -> Tensor:
    """(3, N): log-prob of the label, entropy and logsumexp of each kept token."""
    kept, head, backend = problem.kept, problem.head, problem.backend
    dtype = accumulation_dtype(problem.hidden.dtype)
    result = problem.hidden.new_zeros(3, problem.hidden.size(0), dtype=dtype)
    if kept.numel():
        z = backend.Product(problem.hidden[kept], head)
        side = problem.ranks.side(backend.side_stats(z, problem.labels[kept], head.start))
        lse = side.logsumexp
        result[:, kept] = torch.stack([side.label - lse, side.entropy, lse])
    return result


def logprobs_backward(
    problem: LogprobProblem,
    result: Tensor,  # (3, N) of the forward
    grads: Tensor,  # (3, N)
    needs: Needs,
) -> Gradients:
    kept, head, backend = problem.kept, problem.head, problem.backend
    products = None
    if kept.numel():
        z = backend.Product(problem.hidden[kept], head)
        _, entropy, lse = result[:, kept]
        upstream, columns = tuple(grads[:, kept]), _columns(problem.chunk, kept, head)
        products = backend.logprob_products(z, lse, entropy, problem.labels[kept], head.start, upstream, needs, columns)
    gradients = _gradients(problem.hidden, head, kept, products, needs)
    problem.ranks.reduce(gradients.hidden)
    return gradients


def _both(problem: DivergenceProblem, kept: Tensor) -> tuple[object, object]:
    product = problem.backend.Product
    student = product(problem.student_hidden[kept], problem.student)
    return student, product(problem.teacher_hidden[0, kept], problem.teacher)


def _columns(chunk: int, kept: Tensor, head: Projection) -> int:
    """Vocabulary rows of d(logits), all tokens high, in the place of `chunk` tokens of logits."""
    return max(1, chunk * head.weight.size(0) // kept.numel())


def _gradients(
    hidden: Tensor,  # (N, H)
    head: Projection,
    kept: Tensor,  # (M,)
    products: tuple[Tensor | None, Tensor | None, Tensor | None] | None,  # dH (M, H), dW, db of all parameter rows
    needs: Needs,
) -> Gradients:
    if products is None:
        gradients = Gradients.empty(hidden, head, needs)
        gradients.complete(head)
        return gradients
    gradients = Gradients.empty(hidden, head, (needs[0], False, False))
    if gradients.hidden is not None and products[0] is not None:
        gradients.hidden[kept] = products[0].to(hidden.dtype)
    return replace(gradients, weight=products[1], bias=products[2])
