"""The products of a chunk: logits, dH and dW.

On CPU the vocabulary is cut into PARTS that run as one batch: threads then take whole parts. A single product of a
hundred to a few hundred tokens would be split between threads along its tokens, and each thread would pack the whole
weight for itself, which costs 4% (logits) to 12% (dH) of the processor time of two threads.

Legend: C rows of a chunk, V vocabulary rows, H hidden, P = PARTS.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = 16
LEAST_ROWS = 64  # vocabulary rows a part, below which one product is as good


def _part_rows(logits: Tensor, weight: Tensor) -> int:
    """Vocabulary rows a part; 0 where one product is better: other devices and layouts, low precision, and more
    threads than parts."""
    fits = (
        logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.float64)
        and logits.T.is_contiguous()
        and weight.is_contiguous()
        and torch.get_num_threads() <= PARTS
    )
    rows = weight.size(0) // PARTS
    return rows if fits and rows >= LEAST_ROWS else 0


def _parts(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """x (V, n) as (P, rows, n) and the rest, fewer than P rows."""
    return x[: PARTS * rows].view(PARTS, rows, -1), x[PARTS * rows :]


def logits_(
    out: Tensor,  # (C, V), overwritten with h Wᵀ + b
    hidden: Tensor,  # (C, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
) -> None:
    rows = _part_rows(out, weight)
    if rows == 0:
        if bias is None:
            torch.mm(hidden, weight.T, out=out)
        else:
            torch.addmm(bias, hidden, weight.T, out=out)
        return
    parts, rest = _parts(out.T, rows)
    weight_parts, weight_rest = _parts(weight, rows)
    torch.bmm(weight_parts, hidden.T.expand(PARTS, -1, -1), out=parts)
    torch.mm(weight_rest, hidden.T, out=rest)
    if bias is not None:
        out.add_(bias)


def hidden_gradient(
    grad: Tensor,  # (C, V)
    weight: Tensor,  # (V, H)
) -> Tensor:  # (C, H) = G W
    rows = _part_rows(grad, weight)
    if rows == 0:
        return torch.mm(grad, weight)
    parts, rest = _parts(grad.T, rows)
    weight_parts, weight_rest = _parts(weight, rows)
    return torch.bmm(parts.mT, weight_parts).sum(0).addmm_(rest.T, weight_rest)


def weight_gradient_(
    out: Tensor,  # (V, H) <- factor Gᵀ h, added to what it holds if `add`
    grad: Tensor,  # (C, V)
    hidden: Tensor,  # (C, H)
    factor: float,
    add: bool,
) -> None:
    rows, beta = _part_rows(grad, out), 1 if add else 0
    if rows == 0:
        out.addmm_(grad.T, hidden, beta=beta, alpha=factor)
        return
    parts, rest = _parts(grad.T, rows)
    out_parts, out_rest = _parts(out, rows)
    out_parts.baddbmm_(parts, hidden.expand(PARTS, -1, -1), beta=beta, alpha=factor)
    out_rest.addmm_(rest, hidden, beta=beta, alpha=factor)
