"""Row kernels in plain PyTorch. The vocabulary is taken in blocks of columns, with scratch allocated once a call, so
every pass but the first reads from cache and nothing of the size of a chunk is made. Blocks are as large as the last
cache allows: each operation on one wakes the other threads, 20 to 50 us that must not count.

The common case is not guarded: sums or gradients that are not finite (0 · inf, of a logit of -inf) are done again
with the guarded closed forms of `losses`. torch.where and argmax cost as much as several exponentials here, so
neither meets a whole block.

Chunks of any layout are served; COLUMN_MAJOR is the one whose products are faster (docs/cpu.md).

Legend: C rows, V columns, B columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..losses import divergence, logprob
from ..losses import topk as topk_loss
from ..losses.stats import MINUS_INFINITY, PairStats, SideStats, Terms

COLUMN_MAJOR = True
SCRATCH_BYTES = {"cpu": 8 << 20}  # of all blocks of a call together
SCRATCH_BYTES_ELSEWHERE = 1 << 28  # on an accelerator a block is a launch, not a cache
RATIO_BLOCKS = 4  # that `divergence.mixture_ratios` makes


def _lines(z: Tensor, line: int, blocks: int) -> int:
    """How many lines of `line` values each of so many blocks has."""
    size = SCRATCH_BYTES.get(z.device.type, SCRATCH_BYTES_ELSEWHERE)
    return max(1, size // max(1, blocks * line * z.element_size()))


def _blocks(z: Tensor, scratch: int, more: int = 0) -> Iterator[tuple[slice, list[Tensor]]]:
    """Columns, and `scratch` blocks (C, B) of the layout of `z` to write to; the caller makes up to `more` himself."""
    rows, width = z.size(0), min(_lines(z, z.size(0), scratch + more), z.size(1))
    shapes = [(rows, width) if z.stride(1) == 1 else (width, rows)] * scratch
    spare = [z.new_empty(shape) if z.stride(1) == 1 else z.new_empty(shape).T for shape in shapes]
    for first in range(0, z.size(1), max(1, width)):
        columns = slice(first, min(first + width, z.size(1)))
        yield columns, [block[:, : columns.stop - columns.start] for block in spare]


def _maximum(z: Tensor) -> tuple[Tensor, Tensor]:
    """Row maxima and their lowest columns: block by block into one block, then the argmax in that one alone."""
    width = min(_lines(z, z.size(0), 2), z.size(1))
    best = z[:, :width].clone()
    for first in range(width, z.size(1), width):
        block = z[:, first : first + width]
        torch.maximum(best[:, : block.size(1)], block, out=best[:, : block.size(1)])
    maximum, offset = best.contiguous().max(dim=1)
    columns = offset[:, None] + torch.arange(0, z.size(1), width, device=z.device)
    inside = z.gather(1, columns.clamp(max=z.size(1) - 1)) == maximum[:, None]
    argmax = columns.gather(1, inside.byte().argmax(1, keepdim=True))[:, 0]
    for row in ((best == maximum[:, None]).sum(1) > 1).nonzero()[:, 0]:  # equal maxima at different offsets: rare
        argmax[row] = z[row].argmax()
    return maximum, argmax


def _expected(weight: Tensor, value: Tensor, guarded: bool) -> Tensor:
    """(C,) sums of weight · value, where guarded with 0 · inf = 0; overwrites value."""
    value.mul_(weight)
    if guarded:
        value.masked_fill_(weight <= 0, 0)
    return value.sum(1)


def _weigh(z: Tensor, origin: Tensor, weight: Tensor, shifted: Tensor) -> None:
    """shifted <- z - origin, weight <- exp(shifted)"""
    torch.sub(z, origin[:, None], out=shifted)
    torch.exp(shifted, out=weight)


def _label_logits(z: Tensor, labels: Tensor | None, start: int) -> Tensor:
    if labels is None:
        return z.new_full((z.size(0),), MINUS_INFINITY)
    local = labels - start
    picked = z.gather(1, local.clamp(0, z.size(1) - 1)[:, None])[:, 0]
    return torch.where((local >= 0) & (local < z.size(1)), picked, MINUS_INFINITY)


def _empty_side(z: Tensor) -> SideStats:
    """A shard without valid rows: the neutral element of `merge_sides`."""
    none = z.new_full((z.size(0),), MINUS_INFINITY)
    zero = z.new_zeros(z.size(0))
    return SideStats(none, zero, zero, none, zero)


def _stats(pair: list[Tensor], labels: Tensor | None, start: int, cross: bool) -> tuple[list[SideStats], Tensor]:
    """Statistics of each side, and with `cross` sum e^(a - max a) (a - b) of a = pair[-1], b = pair[0]."""
    if pair[0].size(1) == 0:
        return [_empty_side(z) for z in pair], pair[0].new_zeros(pair[0].size(0))
    maxima = [_maximum(z) for z in pair]
    origins = [torch.where(maximum > MINUS_INFINITY, maximum, 0.0) for maximum, _ in maxima]

    def sums(guarded: bool) -> Tensor:
        total = pair[0].new_zeros(2 * len(pair) + 1, pair[0].size(0))
        for columns, (weight, value) in _blocks(pair[0], 2):
            for side, (z, origin) in enumerate(zip(pair, origins, strict=True)):
                _weigh(z[:, columns], origin, weight, value)
                total[2 * side] += weight.sum(1)
                total[2 * side + 1] += _expected(weight, value, guarded)
            if cross:  # the last side's weights are still there
                torch.sub(pair[-1][:, columns], pair[0][:, columns], out=value)
                total[-1] += _expected(weight, value, guarded)
        return total

    total = sums(guarded=False)
    if not bool(total.isfinite().all()):
        total = sums(guarded=True)
    sides = [
        SideStats(maximum, sumexp, moment, _label_logits(z, labels, start), (argmax + start).to(z.dtype))
        for z, (maximum, argmax), sumexp, moment in zip(pair, maxima, total[0:-1:2], total[1:-1:2], strict=True)
    ]
    return sides, total[-1]


def side_stats(z: Tensor, labels: Tensor | None, start: int) -> SideStats:
    return _stats([z], labels, start, cross=False)[0][0]


def pair_stats(
    z_s: Tensor,  # (C, V)
    z_t: Tensor,  # (C, V)
    labels: Tensor | None,  # (C,) global
    start: int,
    alpha: float,
) -> PairStats:
    pair = [z_t, z_s] if alpha == 1 else [z_s, z_t]
    sides, cross = _stats(pair, labels, start, cross=alpha in (0, 1))
    student, teacher = reversed(sides) if alpha == 1 else sides
    return PairStats(student, teacher, cross if alpha in (0, 1) else None)


def mixture_sums(z_s: Tensor, z_t: Tensor, lse_s: Tensor, lse_t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    def sums(guarded: bool) -> Tensor:
        total = z_s.new_zeros(2, z_s.size(0))
        for columns, (log_q, log_p) in _blocks(z_s, 2, RATIO_BLOCKS):
            torch.sub(z_s[:, columns], lse_s[:, None], out=log_q)
            torch.sub(z_t[:, columns], lse_t[:, None], out=log_p)
            student, teacher = divergence.mixture_ratios(log_q, log_p, alpha)
            total[0] += _expected(log_q.exp_(), student, guarded)
            total[1] += _expected(log_p.exp_(), teacher, guarded)
            del student, teacher  # before the next block makes its own
        return total

    total = sums(guarded=False)
    if not bool(total.isfinite().all()):
        total = sums(guarded=True)
    return total[0], total[1]


def mix_(log_p: Tensor, z: Tensor, lse: Tensor, log_weight: Tensor) -> None:
    for columns, (term,) in _blocks(z, 1):
        torch.add(z[:, columns], (log_weight - lse)[:, None], out=term)
        torch.logaddexp(log_p[:, columns], term, out=log_p[:, columns])


def _store(z: Tensor, grad: Tensor, coefficient: Tensor | None, cap: float | None) -> None:
    """z <- coefficient grad (1 - (z / cap)^2)"""
    if cap is not None:
        grad.mul_(z.div_(cap).square_().neg_().add_(1))
    if coefficient is None:
        z.copy_(grad)
    else:
        torch.mul(grad, coefficient[:, None], out=z)


def _gradient(z_s: Tensor, z_t: Tensor, terms: Terms, alpha: float, weight: Tensor, value: Tensor) -> Tensor:
    """`divergence.grad_of_logprobs` of a block, NaN where 0 meets infinity; overwrites weight and value."""
    if alpha == 1:
        constant = terms.student_lse - terms.teacher_lse + terms.student_kl
        torch.sub(z_s, z_t, out=value).sub_(constant[:, None])
        return value.mul_(torch.sub(z_s, terms.student_lse[:, None], out=weight).exp_())
    log_q = torch.sub(z_s, terms.student_lse[:, None], out=weight)
    log_p = torch.sub(z_t, terms.teacher_lse[:, None], out=value)
    if alpha == 0:
        return log_q.exp_().sub_(log_p.exp_())
    ratio = divergence.mixture_ratios(log_q, log_p, alpha)[0]
    return ratio.sub_(terms.student_kl[:, None]).mul_(log_q.exp_()).mul_(1 - alpha)


def divergence_grad_(
    z_s: Tensor,  # (C, V), overwritten
    z_t: Tensor,  # (C, V)
    terms: Terms,
    coefficient: Tensor,  # (C,)
    alpha: float,
    cap: float | None,
    grad_filter: float,
) -> None:
    more = (0 if alpha in (0, 1) else RATIO_BLOCKS) + (grad_filter > 0)
    for columns, (weight, value) in _blocks(z_s, 2, more):
        student, teacher = z_s[:, columns], z_t[:, columns]
        grad = _gradient(student, teacher, terms, alpha, weight, value)
        if not bool(grad.sum().isfinite()):
            log_q, log_p = student - terms.student_lse[:, None], teacher - terms.teacher_lse[:, None]
            grad = divergence.grad_of_logprobs(log_q, log_p, terms.student_kl, alpha)
        if grad_filter > 0:
            grad = torch.nn.functional.hardshrink(grad, grad_filter)
        _store(student, grad, coefficient, cap)
        del grad  # before the next block makes its own


def logprob_grad_(
    z: Tensor,  # (C, V), overwritten
    lse: Tensor,
    entropy: Tensor,
    labels: Tensor,  # (C,) global
    start: int,
    grads: tuple[Tensor, Tensor, Tensor],  # of log-prob, entropy and logsumexp, each (C,)
    cap: float | None,
) -> None:
    if z.size(1) == 0:
        return
    local = labels - start
    here, place = (local >= 0) & (local < z.size(1)), local.clamp(0, z.size(1) - 1)[:, None]
    one_hot = torch.where(here, grads[0], 0.0)[:, None]
    if cap is not None:
        one_hot = one_hot * (1 - (z.gather(1, place) / cap).square())
    for columns, (log_q, spare) in _blocks(z, 2):
        torch.sub(z[:, columns], lse[:, None], out=log_q)
        grad = logprob.unguarded_grad_(log_q, entropy, *grads, out=spare)
        if not bool(grad.sum().isfinite()):
            grad = logprob.grad_of_logprobs(z[:, columns] - lse[:, None], entropy, *grads)
        _store(z[:, columns], grad, None, cap)
        del grad
    z.scatter_add_(1, place, one_hot)


def topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values (C, k), largest first, and columns; among equals at the k-th place the lowest columns."""
    parts = [topk_loss.largest(rows.contiguous(), k) for rows in z.split(_lines(z, z.size(1), 3))]
    return torch.cat([values for values, _ in parts]), torch.cat([columns for _, columns in parts])
