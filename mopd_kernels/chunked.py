"""The loop over chunks of tokens: logits of a chunk exist, are reduced to a few floats per row or turned
into d(logits) in place, and are overwritten by the next chunk.

Per chunk: z_s = project(h_s); z_t = project(h_t), or log Σ_k w_k p_k of K contexts, one after another in one
more buffer; row statistics, merged over ranks that share the vocabulary; value; and where gradients are wanted
d(loss)/d(z_s) in place of z_s, then dH, dW and db.

Legend: N tokens, M kept tokens, C chunk, K contexts, V vocabulary rows held here, H hidden, k top-k support.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .losses import divergence, topk
from .losses.stats import MINUS_INFINITY, PairStats, SideStats, Terms, merge_sides
from .projection import Buffers, Gradients, Needs, Projection
from .spec import accumulation_dtype
from .vocab_parallel import Ranks

DEFAULT_BUDGET = {"cpu": 80 << 20}
DEFAULT_BUDGET_ELSEWHERE = 1 << 30
ROW_MULTIPLE = 16


def chunk_rows(tokens: int, columns: int, like: Tensor, requested: int, budget: int, buffers: int) -> int:
    """Rows a chunk: as many as the budget holds, evened out so that no last chunk is small, and whole vectors
    where that fits. 0 is "not given"."""
    if requested == 0:
        item = accumulation_dtype(like.dtype).itemsize
        row_bytes = columns * (buffers * item + (0 if item == like.element_size() else like.element_size()))
        budget = budget or DEFAULT_BUDGET.get(like.device.type, DEFAULT_BUDGET_ELSEWHERE)
        requested = max(1, budget // max(1, row_bytes))
    chunks = -(-tokens // requested)
    even = -(-tokens // max(1, chunks))
    return min(requested, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE)


def chunks(kept: Tensor, size: int) -> Iterator[Tensor]:
    """Indices of the kept tokens, `size` at a time."""
    for first in range(0, kept.numel(), max(1, size)):
        yield kept[first : first + size]


@dataclass(frozen=True)
class DivergenceProblem:
    """One call of `linear_divergence` after all checks: heads cut to equal rows, tokens flattened."""

    student_hidden: Tensor  # (N, Hs)
    student: Projection
    teacher_hidden: Tensor  # (K, N, Ht)
    teacher: Projection
    labels: Tensor | None  # (N,)
    log_weights: Tensor | None  # (K, N) of the contexts; None for K = 1
    kept: Tensor  # (M,) indices of the tokens that count
    alpha: float
    top_k: int  # 0: full vocabulary
    add_tail: bool
    backend: ModuleType
    ranks: Ranks
    chunk: int
    grad_filter: float

    def buffers(self, count: int) -> Buffers:
        column_major = getattr(self.backend, "COLUMN_MAJOR", False)
        return Buffers(self.chunk, self.student.weight.size(0), self.student_hidden, count, column_major)

    @property
    def buffer_count(self) -> int:
        return 2 if self.log_weights is None else 3


class DivergenceRows(NamedTuple):
    """Per-token results, (N,) each in the accumulation dtype, 0 for tokens left out; stacked in this order."""

    value: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    student_mass: Tensor
    teacher_mass: Tensor
    student_lse: Tensor  # with top-k, of the entries outside the support
    teacher_lse: Tensor
    student_kl: Tensor

    @property
    def terms(self) -> Terms:
        return Terms(self.student_lse, self.teacher_lse, self.student_kl)


class Saved(NamedTuple):
    """What the backward needs, a few numbers a token: no statistic is computed or exchanged twice."""

    rows: Tensor  # DivergenceRows (R, N)
    context_lse: Tensor  # (K, N), or (0, N) without contexts
    support: Tensor  # (N, k) int64 global indices, or (N, 0)
    bucket_grads: Tensor  # (N, k + 1) d(value)/d(logits) of the support, then of the tail as a whole; or (N, 0)

    @classmethod
    def empty(cls, hidden: Tensor, contexts: int, top_k: int) -> Saved:
        """contexts: 0 for a plain teacher."""
        tokens, dtype = hidden.size(0), accumulation_dtype(hidden.dtype)
        return cls(
            hidden.new_zeros(len(DivergenceRows._fields), tokens, dtype=dtype),
            hidden.new_zeros(contexts, tokens, dtype=dtype),
            hidden.new_zeros(tokens, top_k, dtype=torch.int64),
            hidden.new_zeros(tokens, top_k + 1 if top_k else 0, dtype=dtype),
        )

    def at(self, index: Tensor) -> Saved:
        return Saved(self.rows[:, index], self.context_lse[:, index], self.support[index], self.bucket_grads[index])

    def put(self, index: Tensor, chunk: Saved) -> None:
        self.rows[:, index] = chunk.rows
        self.context_lse[:, index] = chunk.context_lse
        self.support[index] = chunk.support
        self.bucket_grads[index] = chunk.bucket_grads


def divergence_forward(
    problem: DivergenceProblem,
    coefficient: Tensor | None = None,  # (N,) d(loss)/d(value) of each token; None leaves the gradients out
    needs: Needs = (False, False, False),
) -> tuple[Saved, Gradients]:
    """Rows of every token, and with `coefficient` the gradients from the same logits."""
    hidden, contexts = problem.student_hidden, 0 if problem.log_weights is None else problem.log_weights.size(0)
    saved = Saved.empty(hidden, contexts, problem.top_k)
    gradients = Gradients.empty(hidden, problem.student, needs)
    buffers = problem.buffers(problem.buffer_count)
    step = _topk_step if problem.top_k else _full_step
    for index in chunks(problem.kept, problem.chunk):
        z_s = buffers.project(0, problem.student, hidden[index])
        z_t, context_lse = _teacher_logits(problem, buffers, index, None)
        chunk = step(problem, index, z_s, z_t)._replace(context_lse=context_lse)
        saved.put(index, chunk)
        if coefficient is not None and any(needs):
            _add_gradients(problem, gradients, buffers, index, chunk, coefficient[index], z_s, z_t)
    gradients.complete(problem.student)
    problem.ranks.reduce(gradients.hidden)
    return saved, gradients


def divergence_backward(
    problem: DivergenceProblem,
    saved: Saved,
    coefficient: Tensor,  # (N,)
    needs: Needs,
) -> Gradients:
    """Gradients from saved row statistics: logits are computed anew, statistics are not. With top-k the
    teacher's logits are not needed, without its tail the student's neither."""
    hidden, kept = problem.student_hidden, problem.kept
    problem = replace(problem, kept=kept[coefficient[kept] != 0])
    gradients = Gradients.empty(hidden, problem.student, needs)
    buffers = problem.buffers(1 if problem.top_k else problem.buffer_count)
    for index in chunks(problem.kept, problem.chunk):
        chunk, z_s = saved.at(index), buffers.logits(0, index.numel())
        if not problem.top_k or problem.add_tail:
            buffers.project(0, problem.student, hidden[index])
        z_t = z_s if problem.top_k else _teacher_logits(problem, buffers, index, chunk.context_lse)[0]
        _add_gradients(problem, gradients, buffers, index, chunk, coefficient[index], z_s, z_t)
    gradients.complete(problem.student)
    problem.ranks.reduce(gradients.hidden)
    return gradients


def _teacher_logits(
    problem: DivergenceProblem,
    buffers: Buffers,
    index: Tensor,
    context_lse: Tensor | None,  # (K, C) where known
) -> tuple[Tensor, Tensor]:
    """z_t (C, V) and the contexts' logsumexps (K, C): the plain teacher's logits, or log Σ_k w_k p_k."""
    log_weights = problem.log_weights
    if log_weights is None:
        z_t = buffers.project(1, problem.teacher, problem.teacher_hidden[0, index])
        return z_t, z_t.new_empty(0, index.numel())
    mixture, lses = buffers.logits(1, index.numel()), []
    for context, log_weight in enumerate(log_weights[:, index]):
        z_k = buffers.project(1 if context == 0 else 2, problem.teacher, problem.teacher_hidden[context, index])
        if context_lse is None:
            lse = problem.ranks.logsumexp(problem.backend.side_stats(z_k, None, problem.teacher.start))
        else:
            lse = context_lse[context]
        if context == 0:
            mixture.add_((log_weight - lse)[:, None])
        else:
            problem.backend.mix_(mixture, z_k, lse, log_weight)
        lses.append(lse)
    return mixture, torch.stack(lses)


def _full_step(problem: DivergenceProblem, index: Tensor, z_s: Tensor, z_t: Tensor) -> Saved:
    return Saved.empty(z_s, 0, 0)._replace(rows=full_rows(problem, index, z_s, z_t))


def full_rows(problem: DivergenceProblem, index: Tensor, z_s: Any, z_t: Any) -> Tensor:
    """DivergenceRows (R, C) over the full vocabulary, of logits in the form that the backend takes them."""
    backend, ranks, alpha = problem.backend, problem.ranks, problem.alpha
    labels = None if problem.labels is None else problem.labels[index]
    stats = ranks.pair(backend.pair_stats(z_s, z_t, labels, problem.student.start, alpha), alpha)
    kls = None
    if stats.cross is None:
        lse = stats.student.logsumexp, stats.teacher.logsumexp
        kls = ranks.sums(*backend.mixture_sums(z_s, z_t, *lse, alpha))
    value, terms = divergence.value_and_terms(stats, kls, alpha)
    return _rows(stats, labels, value, None, terms)


def _topk_step(problem: DivergenceProblem, index: Tensor, z_s: Tensor, z_t: Tensor) -> Saved:
    """Overwrites the support's entries of z_s and z_t with -inf, to take statistics of the rest."""
    backend, ranks, start = problem.backend, problem.ranks, problem.student.start
    labels = None if problem.labels is None else problem.labels[index]
    values, columns = backends.topk(backend)(z_s, min(problem.top_k, z_s.size(1)))
    support = ranks.support(topk.Support(values, z_t.gather(1, columns), columns + start), problem.top_k)
    for z in (z_s, z_t):
        _scatter_(ranks, z, support.indices - start, torch.full_like(support.student, MINUS_INFINITY))
    rest = PairStats(backend.side_stats(z_s, labels, start), backend.side_stats(z_t, labels, start), None)
    rest = ranks.pair(rest, problem.alpha)
    top = [topk.support_side(z, support.indices, labels) for z in support[:2]]
    whole = PairStats(_merge(top[0], rest.student), _merge(top[1], rest.teacher), None)
    tail_lse = rest.student.logsumexp, rest.teacher.logsumexp
    bucket = topk.buckets(support, whole[:2], rest[:2], problem.add_tail)
    value, grads = topk.value_and_grad(bucket.log_q, bucket.log_p, problem.alpha)
    if not problem.add_tail:
        grads = torch.nn.functional.pad(grads, (0, 1))
    if problem.student.cap is not None:
        grads[:, :-1] *= 1 - (support.student / problem.student.cap).square()
    terms = Terms(*tail_lse, torch.zeros_like(value))
    rows = _rows(whole, labels, value, bucket, terms)
    return Saved.empty(z_s, 0, 0)._replace(rows=rows, support=support.indices, bucket_grads=grads)


def _merge(first: SideStats, second: SideStats) -> SideStats:
    return merge_sides(SideStats(*(torch.stack(pair) for pair in zip(first, second, strict=True))))[0]


def _rows(stats: PairStats, labels: Tensor | None, value: Tensor, bucket: topk.Buckets | None, terms: Terms) -> Tensor:
    student, teacher = stats.student, stats.teacher
    nothing = torch.zeros_like(value)
    return torch.stack(
        DivergenceRows(
            value,
            nothing if labels is None else student.label - student.logsumexp,
            nothing if labels is None else teacher.label - teacher.logsumexp,
            student.entropy,
            teacher.entropy,
            (student.argmax == teacher.argmax).to(value.dtype),
            nothing if bucket is None else bucket.student_mass,
            nothing if bucket is None else bucket.teacher_mass,
            *terms,
        )
    )


def _add_gradients(
    problem: DivergenceProblem,
    gradients: Gradients,
    buffers: Buffers,
    index: Tensor,
    saved: Saved,
    coefficient: Tensor,
    z_s: Tensor,
    z_t: Tensor,
) -> None:
    """Overwrites both logits. A backend that can pack what `grad_filter` keeps has its own, sparse products."""
    hidden, head = problem.student_hidden[index], problem.student
    pack = getattr(problem.backend, "divergence_grad_kept_", None)
    if pack is None or problem.grad_filter == 0 or problem.top_k > 0 or buffers.low is not None:
        _to_gradient_(problem, saved, coefficient, z_s, z_t)
    else:
        terms = DivergenceRows(*saved.rows).terms
        kept = pack(z_s, z_t, terms, coefficient, problem.alpha, head.cap, problem.grad_filter)
        if kept is not None:
            gradients.add_kept(index, kept, hidden, head)
            return
    gradients.add(index, z_s, hidden, head, buffers, getattr(problem.backend, "add_product_", None))


def _to_gradient_(problem: DivergenceProblem, saved: Saved, coefficient: Tensor, z_s: Tensor, z_t: Tensor) -> None:
    """z_s <- coefficient d(value)/d(z_s before the cap)"""
    terms = DivergenceRows(*saved.rows).terms
    if problem.top_k == 0:
        cap = problem.student.cap
        problem.backend.divergence_grad_(z_s, z_t, terms, coefficient, problem.alpha, cap, problem.grad_filter)
        return
    filtered = problem.grad_filter > 0
    grads = saved.bucket_grads if filtered else saved.bucket_grads * coefficient[:, None]
    columns = saved.support - problem.student.start
    if problem.add_tail:
        _scatter_(problem.ranks, z_s, columns, torch.full_like(grads[:, :-1], MINUS_INFINITY))
        _tail_gradient_(problem, z_s, terms.student_lse, grads[:, -1])
    else:
        z_s.zero_()
    _scatter_(problem.ranks, z_s, columns, grads[:, :-1])
    if filtered:
        torch.hardshrink(z_s, problem.grad_filter, out=z_s)
        z_s.mul_(coefficient[:, None])


def _tail_gradient_(problem: DivergenceProblem, z: Tensor, tail_lse: Tensor, tail: Tensor) -> None:
    """z <- G_tail softmax(z) of z without the support: the gradient of G_tail · lse."""
    nothing = torch.zeros_like(tail)
    lse = torch.where(tail_lse > MINUS_INFINITY, tail_lse, float("inf"))
    labels = torch.zeros_like(tail, dtype=torch.int64)
    grads = (nothing, nothing, tail)
    problem.backend.logprob_grad_(z, lse, nothing, labels, problem.student.start, grads, problem.student.cap)


def _scatter_(ranks: Ranks, z: Tensor, columns: Tensor, values: Tensor) -> None:
    """z[i, columns[i, j]] = values[i, j] where the column is held here."""
    if ranks.group is None:
        z.scatter_(1, columns, values)
        return
    row, place = ((columns >= 0) & (columns < z.size(1))).nonzero(as_tuple=True)
    z[row, columns[row, place]] = values[row, place]
