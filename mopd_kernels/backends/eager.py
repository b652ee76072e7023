"""Row kernels in plain PyTorch. Rows are taken in blocks that fit the cache, with scratch blocks allocated once a
call, so every pass but the first reads from cache and nothing of the size of a chunk is made.

The common case is not guarded: a block whose sums are not finite (0 · inf, of a logit of -inf) is done again with
the guarded closed forms of `losses`. torch.where and argmax cost as much as several exponentials here, so neither
meets a whole block.

Legend: C rows, B rows of a block, V columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..losses import divergence, logprob
from ..losses import topk as topk_loss
from ..losses.stats import MINUS_INFINITY, PairStats, SideStats, Terms

BLOCK_BYTES = {"cpu": 1 << 20}
BLOCK_BYTES_ELSEWHERE = 1 << 27  # on an accelerator a block is a launch, not a cache
GROUP = 256  # columns whose maximum is taken before the argmax


def _block_rows(z: Tensor) -> int:
    size = BLOCK_BYTES.get(z.device.type, BLOCK_BYTES_ELSEWHERE)
    return max(1, size // max(1, z.size(1) * z.element_size()))


def _blocks(z: Tensor, scratch: int = 0) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows, and `scratch` blocks of their shape to write to."""
    size = _block_rows(z)
    spare = [z.new_empty(min(size, z.size(0)), z.size(1)) for _ in range(scratch)]
    for first in range(0, z.size(0), size):
        rows = slice(first, min(first + size, z.size(0)))
        yield rows, [block[: rows.stop - rows.start] for block in spare]


def _maximum(z: Tensor) -> tuple[Tensor, Tensor]:
    """Row maxima and their lowest columns: maxima of groups first, then the argmax inside one group."""
    whole = z.size(1) // GROUP * GROUP
    if whole == 0 or z.stride(1) != 1:
        maximum, argmax = z.max(dim=1)
        return maximum, argmax
    groups = z[:, :whole].unflatten(1, (-1, GROUP)).amax(2)
    if whole < z.size(1):
        groups = torch.cat([groups, z[:, whole:].amax(1, keepdim=True)], 1)
    maximum, group = groups.max(dim=1)
    columns = group[:, None] * GROUP + torch.arange(GROUP, device=z.device)
    inside = z.gather(1, columns.clamp_(max=z.size(1) - 1)).max(dim=1).indices
    return maximum, columns.gather(1, inside[:, None])[:, 0]


def _sum_of_products(weight: Tensor, value: Tensor) -> Tensor:
    """(B,) sums over columns; zero weights count for nothing, also against infinite values."""
    total = torch.stack([torch.dot(w, v) for w, v in zip(weight, value, strict=True)])
    if bool(total.isfinite().all()):
        return total
    return (weight * torch.where(weight > 0, value, 0.0)).sum(1)


def _side(z: Tensor, labels: Tensor | None, start: int, weight: Tensor, shifted: Tensor) -> SideStats:
    """Statistics of a block; leaves exp(z - max) in `weight`."""
    maximum, argmax = _maximum(z)
    torch.sub(z, torch.where(maximum > MINUS_INFINITY, maximum, 0.0)[:, None], out=shifted)
    torch.exp(shifted, out=weight)
    label = torch.full_like(maximum, MINUS_INFINITY)
    if labels is not None:
        local = labels - start
        here = (local >= 0) & (local < z.size(1))
        picked = z.gather(1, local.clamp(0, z.size(1) - 1)[:, None])[:, 0]
        label = torch.where(here, picked, MINUS_INFINITY)
    moment = _sum_of_products(weight, shifted)
    return SideStats(maximum, weight.sum(1), moment, label, (argmax + start).to(z.dtype))


def _take(labels: Tensor | None, rows: slice) -> Tensor | None:
    return None if labels is None else labels[rows]


def _concat(parts: list[SideStats]) -> SideStats:
    return SideStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _empty_side(z: Tensor) -> SideStats:
    """A shard without valid rows: the neutral element of `merge_sides`."""
    none = z.new_full((z.size(0),), MINUS_INFINITY)
    zero = z.new_zeros(z.size(0))
    return SideStats(none, zero, zero, none, zero)


def side_stats(z: Tensor, labels: Tensor | None, start: int) -> SideStats:
    if z.size(1) == 0:
        return _empty_side(z)
    return _concat([_side(z[rows], _take(labels, rows), start, *spare) for rows, spare in _blocks(z, 2)])


def pair_stats(
    z_s: Tensor,  # (C, V)
    z_t: Tensor,  # (C, V)
    labels: Tensor | None,  # (C,) global
    start: int,
    alpha: float,
) -> PairStats:
    if z_s.size(1) == 0:
        return PairStats(_empty_side(z_s), _empty_side(z_t), z_s.new_zeros(z_s.size(0)) if alpha in (0, 1) else None)
    order = (1, 0) if alpha == 1 else (0, 1)  # the side that weights the cross moment last: its weights stay
    sides: tuple[list[SideStats], list[SideStats]] = ([], [])
    crosses = []
    for rows, (weight, spare) in _blocks(z_s, 2):
        pair = z_s[rows], z_t[rows]
        for side in order:
            sides[side].append(_side(pair[side], _take(labels, rows), start, weight, spare))
        if alpha in (0, 1):
            difference = torch.sub(pair[order[1]], pair[order[0]], out=spare)
            crosses.append(_sum_of_products(weight, difference))
    return PairStats(_concat(sides[0]), _concat(sides[1]), torch.cat(crosses) if crosses else None)


def mixture_sums(z_s: Tensor, z_t: Tensor, lse_s: Tensor, lse_t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    parts = []
    for rows, (log_q, log_p, log_m) in _blocks(z_s, 3):
        torch.sub(z_s[rows], lse_s[rows, None], out=log_q)
        torch.sub(z_t[rows], lse_t[rows, None], out=log_p)
        divergence.log_mixture(log_q, log_p, alpha, out=log_m)
        parts.append([_sum_of_products(side.exp(), side - log_m) for side in (log_q, log_p)])
    student, teacher = zip(*parts, strict=True)
    return torch.cat(student), torch.cat(teacher)


def mix_(log_p: Tensor, z: Tensor, lse: Tensor, log_weight: Tensor) -> None:
    for rows, (term,) in _blocks(z, 1):
        torch.add(z[rows], (log_weight - lse)[rows, None], out=term)
        torch.logaddexp(log_p[rows], term, out=log_p[rows])


def _store(z: Tensor, rows: slice, grad: Tensor, cap: float | None) -> None:
    """z <- grad (1 - (z / cap)^2)"""
    if cap is None:
        z[rows] = grad
    else:
        z[rows].div_(cap).square_().neg_().add_(1).mul_(grad)


def _gradient(log_q: Tensor, log_p: Tensor, student_kl: Tensor, alpha: float, out: Tensor) -> Tensor:
    """`divergence.grad_of_logprobs` of a block, in `out`; overwrites log_q and log_p."""
    if alpha == 0:
        return torch.sub(log_q.exp_(), log_p.exp_(), out=out)
    if alpha == 1:
        torch.sub(log_q, log_p, out=out)
    else:
        divergence.log_mixture(log_q, log_p, alpha, out=out)
        torch.sub(log_q, out, out=out)
    out.sub_(student_kl[:, None]).mul_(log_q.exp_())
    return out if alpha == 1 else out.mul_(1 - alpha)


def divergence_grad_(
    z_s: Tensor,  # (C, V), overwritten
    z_t: Tensor,  # (C, V)
    terms: Terms,
    coefficient: Tensor,  # (C,)
    alpha: float,
    cap: float | None,
    grad_filter: float,
) -> None:
    for rows, (log_q, log_p, spare) in _blocks(z_s, 3):
        torch.sub(z_s[rows], terms.student_lse[rows, None], out=log_q)
        torch.sub(z_t[rows], terms.teacher_lse[rows, None], out=log_p)
        grad = _gradient(log_q, log_p, terms.student_kl[rows], alpha, spare)
        if not bool(grad.sum().isfinite()):
            log_q, log_p = z_s[rows] - terms.student_lse[rows, None], z_t[rows] - terms.teacher_lse[rows, None]
            grad = divergence.grad_of_logprobs(log_q, log_p, terms.student_kl[rows], alpha)
        if grad_filter > 0:
            grad = torch.nn.functional.hardshrink(grad, grad_filter)
        _store(z_s, rows, grad.mul_(coefficient[rows, None]), cap)


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
    for rows, (log_q, spare) in _blocks(z, 2):
        on_logprob, on_entropy, on_lse = (g[rows] for g in grads)
        torch.sub(z[rows], lse[rows, None], out=log_q)
        grad = logprob.unguarded_grad_(log_q, entropy[rows], on_logprob, on_entropy, on_lse, out=spare)
        if not bool(grad.sum().isfinite()):
            grad = logprob.grad_of_logprobs(z[rows] - lse[rows, None], entropy[rows], on_logprob, on_entropy, on_lse)
        local = labels[rows] - start
        here = (local >= 0) & (local < z.size(1))
        chosen = torch.where(here, on_logprob, 0.0)[:, None]
        grad.scatter_add_(1, local.clamp(0, z.size(1) - 1)[:, None], chosen)
        _store(z, rows, grad, cap)


def topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values (C, k), largest first, and columns; among equals at the k-th place the lowest columns."""
    parts = [topk_loss.largest(z[rows], k) for rows, _ in _blocks(z)]
    return torch.cat([values for values, _ in parts]), torch.cat([columns for _, columns in parts])
