"""The loop over chunks of tokens: logits of a chunk exist, are reduced to a few floats per row or turned
into d(logits) in place, and are overwritten by the next chunk.

Per chunk: z_s = project(h_s), z_t = project(h_t); row statistics; value; and where gradients are wanted
    dH = G W (scale / tau),   dW += Gᵀ h (scale / tau),   db += Σ G (scale / tau)

Legend: N tokens, C chunk, V vocabulary rows held here, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .losses import divergence
from .losses.stats import SideStats, Terms
from .spec import accumulation_dtype

DEFAULT_BUDGET = {"cpu": 64 << 20}
DEFAULT_BUDGET_ELSEWHERE = 1 << 30


@dataclass(frozen=True)
class Projection:
    """A head cut to its valid rows, with its temperature: z = cap(scale·(h Wᵀ + b)) / tau."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None
    temperature: float
    start: int = 0

    @property
    def cap(self) -> float | None:
        """Bound of |z|, or None without a softcap."""
        return None if self.softcap is None else self.softcap / self.temperature

    @property
    def slope(self) -> float:
        """dz/du where the cap is not active, u = h Wᵀ + b."""
        return self.scale / self.temperature

    def into(self, out: Tensor, low: Tensor | None, hidden: Tensor) -> Tensor:
        """z of `hidden` (C, H), written into `out` (C, V)."""
        hidden = hidden * self.slope if self.slope != 1 else hidden
        bias = None if self.bias is None else self.bias * self.slope
        product = out if low is None else low
        if bias is None:
            torch.mm(hidden, self.weight.T, out=product)
        else:
            torch.addmm(bias, hidden, self.weight.T, out=product)
        if low is not None:
            out.copy_(low)
        if self.cap is not None:
            out.div_(self.cap).tanh_().mul_(self.cap)
        return out


class Buffers:
    """Chunk buffers, allocated once a call and reused by every chunk."""

    def __init__(self, chunk: int, columns: int, like: Tensor, count: int) -> None:
        dtype = accumulation_dtype(like.dtype)
        self.logits = [torch.empty(chunk, columns, dtype=dtype, device=like.device) for _ in range(count)]
        self.low = None if like.dtype == dtype else torch.empty(chunk, columns, dtype=like.dtype, device=like.device)

    def project(self, index: int, projection: Projection, hidden: Tensor) -> Tensor:
        rows = hidden.size(0)
        low = None if self.low is None else self.low[:rows]
        return projection.into(self.logits[index][:rows], low, hidden)


@dataclass
class Gradients:
    """dH by chunk and dW, db accumulated over chunks in float32 (float64 for float64)."""

    hidden: Tensor | None  # (N, H)
    weight: Tensor | None  # (V, H) accumulation dtype
    bias: Tensor | None  # (V,)

    @classmethod
    def zeros(cls, hidden: Tensor, projection: Projection, needs: tuple[bool, bool, bool]) -> Gradients:
        dtype = accumulation_dtype(hidden.dtype)
        weight = projection.weight
        return cls(
            torch.zeros_like(hidden) if needs[0] else None,
            torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs[1] else None,
            torch.zeros(weight.size(0), dtype=dtype, device=weight.device) if needs[2] else None,
        )

    def add(self, rows: Tensor, grad: Tensor, hidden: Tensor, projection: Projection, low: Tensor | None) -> None:
        """Take d/dz `grad` (C, V) of the tokens `rows`, whose inputs are `hidden`."""
        slope = projection.slope
        if self.bias is not None:
            self.bias.add_(grad.sum(0), alpha=slope)
        if self.weight is not None:
            self.weight.addmm_(grad.T, hidden.to(grad.dtype), alpha=slope)
        if self.hidden is not None:
            product = grad if low is None else low.copy_(grad)
            self.hidden[rows] = (product @ projection.weight).mul_(slope)


def chunk_rows(tokens: int, columns: int, like: Tensor, requested: int, budget: int, buffers: int) -> int:
    """Rows a chunk: as many as the budget holds, evened out so that no last chunk is small. 0 is "not given"."""
    if requested == 0:
        item = accumulation_dtype(like.dtype).itemsize
        row_bytes = columns * (buffers * item + (0 if item == like.element_size() else like.element_size()))
        budget = budget or DEFAULT_BUDGET.get(like.device.type, DEFAULT_BUDGET_ELSEWHERE)
        requested = max(1, budget // max(1, row_bytes))
    chunks = -(-tokens // requested)
    return -(-tokens // max(1, chunks))


def chunks(kept: Tensor, size: int) -> Iterator[Tensor]:
    """Indices of the kept tokens, `size` at a time."""
    for first in range(0, kept.numel(), max(1, size)):
        yield kept[first : first + size]


@dataclass(frozen=True)
class DivergenceProblem:
    """One call of `linear_divergence` after all checks: heads cut to equal rows, tokens flattened."""

    student_hidden: Tensor  # (N, Hs)
    student: Projection
    teacher_hidden: Tensor  # (N, Ht)
    teacher: Projection
    labels: Tensor | None  # (N,)
    kept: Tensor  # (M,) indices of the tokens that count
    alpha: float
    backend: ModuleType
    chunk: int
    grad_filter: float

    def buffers(self) -> Buffers:
        return Buffers(self.chunk, self.student.weight.size(0), self.student_hidden, count=2)


class DivergenceRows(NamedTuple):
    """Per-token results, (N,) each in the accumulation dtype, 0 for tokens left out; stacked in this order."""

    value: Tensor
    student_logprobs: Tensor
    teacher_logprobs: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    student_lse: Tensor
    teacher_lse: Tensor
    student_kl: Tensor

    @property
    def terms(self) -> Terms:
        return Terms(self.student_lse, self.teacher_lse, self.student_kl)


def divergence_forward(
    problem: DivergenceProblem,
    coefficient: Tensor | None = None,  # (N,) d(loss)/d(value) of each token; None leaves the gradients out
    needs: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Gradients]:
    """Stacked DivergenceRows (9, N), and with `coefficient` the gradients from the same logits."""
    hidden = problem.student_hidden
    rows = hidden.new_zeros(len(DivergenceRows._fields), hidden.size(0), dtype=accumulation_dtype(hidden.dtype))
    gradients = Gradients.zeros(problem.student_hidden, problem.student, needs)
    buffers = problem.buffers()
    for index in chunks(problem.kept, problem.chunk):
        z_s, z_t = _both_logits(problem, buffers, index)
        chunk = _divergence_rows(problem, index, z_s, z_t)
        rows[:, index] = torch.stack(chunk)
        if coefficient is not None and any(needs):
            _divergence_gradients(problem, gradients, buffers, index, z_s, z_t, chunk.terms, coefficient[index])
    return rows, gradients


def divergence_backward(
    problem: DivergenceProblem,
    rows: Tensor,  # (9, N) of the forward
    coefficient: Tensor,  # (N,)
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients from saved row statistics: both logits are computed anew, the statistics are not."""
    problem = replace(problem, kept=problem.kept[coefficient[problem.kept] != 0])
    gradients = Gradients.zeros(problem.student_hidden, problem.student, needs)
    buffers = problem.buffers()
    for index in chunks(problem.kept, problem.chunk):
        z_s, z_t = _both_logits(problem, buffers, index)
        terms = DivergenceRows(*rows[:, index]).terms
        _divergence_gradients(problem, gradients, buffers, index, z_s, z_t, terms, coefficient[index])
    return gradients


def _both_logits(problem: DivergenceProblem, buffers: Buffers, index: Tensor) -> tuple[Tensor, Tensor]:
    z_s = buffers.project(0, problem.student, problem.student_hidden[index])
    return z_s, buffers.project(1, problem.teacher, problem.teacher_hidden[index])


def _divergence_rows(problem: DivergenceProblem, index: Tensor, z_s: Tensor, z_t: Tensor) -> DivergenceRows:
    backend, alpha = problem.backend, problem.alpha
    labels = None if problem.labels is None else problem.labels[index]
    stats = backend.pair_stats(z_s, z_t, labels, problem.student.start, alpha)
    student, teacher = stats.student, stats.teacher
    kls = None
    if stats.cross is None:
        kls = backend.mixture_sums(z_s, z_t, student.logsumexp, teacher.logsumexp, alpha)
    value, terms = divergence.value_and_terms(stats, kls, alpha)
    nothing = torch.zeros_like(value)
    return DivergenceRows(
        value,
        nothing if labels is None else student.label - terms.student_lse,
        nothing if labels is None else teacher.label - terms.teacher_lse,
        student.entropy,
        teacher.entropy,
        (student.argmax == teacher.argmax).to(value.dtype),
        *terms,
    )


def _divergence_gradients(
    problem: DivergenceProblem,
    gradients: Gradients,
    buffers: Buffers,
    index: Tensor,
    z_s: Tensor,
    z_t: Tensor,
    terms: Terms,
    coefficient: Tensor,
) -> None:
    cap = problem.student.cap
    problem.backend.divergence_grad_(z_s, z_t, terms, coefficient, problem.alpha, cap, problem.grad_filter)
    low = None if buffers.low is None else buffers.low[: index.numel()]
    gradients.add(index, z_s, problem.student_hidden[index], problem.student, low)


@dataclass(frozen=True)
class LogprobProblem:
    """One call of `linear_logprobs` after all checks."""

    hidden: Tensor  # (N, H)
    head: Projection
    labels: Tensor  # (N,)
    kept: Tensor  # (M,)
    backend: ModuleType
    chunk: int

    def buffers(self) -> Buffers:
        return Buffers(self.chunk, self.head.weight.size(0), self.hidden, count=1)


def logprobs_forward(problem: LogprobProblem) -> Tensor:
    """(3, N): log-prob of the label, entropy and logsumexp of each kept token."""
    dtype = accumulation_dtype(problem.hidden.dtype)
    result = problem.hidden.new_zeros(3, problem.hidden.size(0), dtype=dtype)
    buffers = problem.buffers()
    for index in chunks(problem.kept, problem.chunk):
        z = buffers.project(0, problem.head, problem.hidden[index])
        side: SideStats = problem.backend.side_stats(z, problem.labels[index], problem.head.start)
        lse = side.logsumexp
        result[:, index] = torch.stack([side.label - lse, side.entropy, lse])
    return result


def logprobs_backward(
    problem: LogprobProblem,
    result: Tensor,  # (3, N) of the forward
    grads: Tensor,  # (3, N)
    needs: tuple[bool, bool, bool],
) -> Gradients:
    gradients = Gradients.zeros(problem.hidden, problem.head, needs)
    buffers = problem.buffers()
    for index in chunks(problem.kept, problem.chunk):
        hidden = problem.hidden[index]
        z = buffers.project(0, problem.head, hidden)
        upstream = tuple(grads[:, index])
        _, entropy, lse = result[:, index]
        problem.backend.logprob_grad_(
            z, lse, entropy, problem.labels[index], problem.head.start, upstream, problem.head.cap
        )
        low = None if buffers.low is None else buffers.low[: index.numel()]
        gradients.add(index, z, hidden, problem.head, low)
    return gradients
