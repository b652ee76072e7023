"""From hidden states to a chunk of logits, and from d(logits) back to the gradients of the head and trunk.

    z = cap(scale·(h Wᵀ + b)) / tau
    dH = G W (scale / tau),   dW += Gᵀ h (scale / tau),   db += Σ G (scale / tau),   G = d(loss)/d(z before the cap)

Legend: N tokens, C chunk, V vocabulary rows held here, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import products
from .spec import accumulation_dtype

Needs = tuple[bool, bool, bool]  # which of dH, dW, db are wanted
AddProduct = Callable[[Tensor, Tensor, Tensor, float, bool], None]


@dataclass(frozen=True)
class Projection:
    """A head cut to its valid rows, with its temperature."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None
    temperature: float
    start: int  # global vocabulary index of row 0
    parameter_rows: int  # of the weight before the cut

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
        products.logits_(out if low is None else low, hidden, self.weight, bias)
        if low is not None:
            out.copy_(low)
        if self.cap is not None:
            out.div_(self.cap).tanh_().mul_(self.cap)
        return out


class Buffers:
    """Chunk buffers (C, V), allocated once a call and reused by every chunk; a smaller last chunk is as contiguous.

    column_major: the values of a vocabulary row are neighbours, strides (1, C), as the backend's kernels want it.
    """

    def __init__(self, chunk: int, columns: int, like: Tensor, count: int, column_major: bool = False) -> None:
        def empty(dtype: torch.dtype) -> Tensor:
            return torch.empty(chunk * columns, dtype=dtype, device=like.device)

        dtype = accumulation_dtype(like.dtype)
        self.columns, self.column_major = columns, column_major
        self.wide = [empty(dtype) for _ in range(count)]
        self.low = None if like.dtype == dtype else empty(like.dtype)

    def logits(self, index: int, rows: int) -> Tensor:
        """Buffer `index` as a chunk of `rows` (<= chunk) tokens."""
        return self._chunk(self.wide[index], rows)

    def project(self, index: int, projection: Projection, hidden: Tensor) -> Tensor:
        rows = hidden.size(0)
        return projection.into(self.logits(index, rows), self._low(rows), hidden)

    def lowered(self, grad: Tensor) -> Tensor:
        """`grad` in the dtype of the head, in which its product with W is taken."""
        low = self._low(grad.size(0))
        return grad if low is None else low.copy_(grad)

    def _low(self, rows: int) -> Tensor | None:
        return None if self.low is None else self._chunk(self.low, rows)

    def _chunk(self, buffer: Tensor, rows: int) -> Tensor:
        values = buffer[: rows * self.columns]
        return values.view(self.columns, rows).T if self.column_major else values.view(rows, self.columns)


@dataclass
class Gradients:
    """dH by chunk and dW, db accumulated over chunks in float32 (float64 for float64).

    All are contiguous. dW and db have all rows of their parameters; padding rows stay 0. dW is written by its first
    chunk, not zeroed before: it may be larger than all the buffers.
    """

    hidden: Tensor | None  # (N, H)
    weight: Tensor | None  # (V, H) accumulation dtype
    bias: Tensor | None  # (V,)
    first: bool = True  # dW has not been written

    @classmethod
    def empty(cls, hidden: Tensor, head: Projection, needs: Needs) -> Gradients:
        dtype, rows = accumulation_dtype(hidden.dtype), head.parameter_rows
        return cls(
            hidden.new_zeros(hidden.shape) if needs[0] else None,
            hidden.new_empty(rows, hidden.size(1), dtype=dtype) if needs[1] else None,
            hidden.new_zeros(rows, dtype=dtype) if needs[2] else None,
        )

    def complete(self, head: Projection) -> None:
        """Zero what no chunk has written."""
        if self.weight is not None:
            self.weight[0 if self.first else head.weight.size(0) :].zero_()

    def add(
        self,
        rows: Tensor,
        grad: Tensor,  # (C, V) d/dz of the tokens `rows`
        hidden: Tensor,  # (C, H) their inputs
        projection: Projection,
        buffers: Buffers,
        add_product: AddProduct | None = None,  # of the backend, see backends
    ) -> None:
        """In low precision dW is a product of float32 operands, exact and slow on GPUs, but for a backend that
        can add a product of low-precision operands to float32."""
        slope, valid = projection.slope, grad.size(1)
        low = grad if buffers.low is None else None
        if self.bias is not None:
            self.bias[:valid].add_(grad.sum(0), alpha=slope)
        if self.weight is not None and (low is not None or add_product is None):
            products.weight_gradient_(self.weight[:valid], grad, hidden.to(grad.dtype), slope, not self.first)
        elif self.weight is not None and add_product is not None:
            low = buffers.lowered(grad)
            add_product(self.weight[:valid], low, hidden, slope, not self.first)
        self.first = False
        if self.hidden is not None:
            low = buffers.lowered(grad) if low is None else low
            self.hidden[rows] = products.hidden_gradient(low, projection.weight).mul_(slope)

    def add_kept(self, rows: Tensor, kept: Any, hidden: Tensor, projection: Projection) -> None:
        """`add` of a gradient that a backend returned as its kept entries."""
        valid = projection.weight.size(0)
        if self.first and self.weight is not None:
            self.weight.zero_()
            self.first = False
        grad_hidden = None if self.hidden is None else hidden.new_empty(hidden.shape)
        grad_weight = None if self.weight is None else self.weight[:valid]
        grad_bias = None if self.bias is None else self.bias[:valid]
        kept.products(hidden, projection.weight, projection.slope, grad_hidden, grad_weight, grad_bias)
        if self.hidden is not None and grad_hidden is not None:
            self.hidden[rows] = grad_hidden
