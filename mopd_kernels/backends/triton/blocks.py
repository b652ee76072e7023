"""Blocks of vocabulary rows: d(logits) of a block exists, goes into dH, dW and db, and is overwritten by the next.

Blocks run over the vocabulary and not over tokens: dW of a block is then complete after one product and needs no
float32 copy of the weight's size; what is accumulated is dH, which is small.

Legend: N tokens, V vocabulary, H hidden, B vocabulary rows of a block, m and n tokens and rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .accumulate import Activity, accumulate
from .products import GROUP, Product

Needs = tuple[bool, bool, bool]  # which of dH, dW, db are wanted
Products = tuple[Tensor | None, Tensor | None, Tensor | None]  # dH, dW, db


@triton.jit
def store_tile(slope, grad, bias_parts, row, mask, column, block, first, columns, stride, HAS_DBIAS: tl.constexpr):
    """d(logits) of a tile into its block, and its column sums."""
    here = column < columns
    inside = (column - first).to(tl.int64)
    place = grad + row.to(tl.int64)[:, None] * stride + inside[None, :]
    tl.store(place, slope.to(grad.dtype.element_ty), mask=mask[:, None] & here[None, :])
    if HAS_DBIAS:
        sums = tl.sum(tl.where(mask[:, None], slope, 0.0), 0)
        tl.store(bias_parts + block * stride + inside, sums, mask=here)


class Block:
    """Buffers of one block of vocabulary rows, reused by the next."""

    def __init__(self, z: Product, tile: configs.Tile, columns: int, filtered: bool, bias: bool) -> None:
        tokens, like = z.hidden.size(0), z.hidden
        self.tile, self.columns = tile, columns
        self.row_blocks, self.tiles = triton.cdiv(tokens, tile.m), columns // tile.n
        self.grad = like.new_empty(tokens, columns)
        self.flags = like.new_empty(self.row_blocks, self.tiles, dtype=torch.int8) if filtered else None
        self.bias_parts = like.new_empty(self.row_blocks, columns, dtype=torch.float32) if bias else None

    def arguments(self, first: int, width: int) -> dict[str, Any]:
        return {
            "grad": self.grad,
            "bias_parts": self.grad if self.bias_parts is None else self.bias_parts,
            "stride_grad": self.grad.stride(0),
            "first": first,
            "tiles": triton.cdiv(width, self.tile.n),
            "HAS_DBIAS": self.bias_parts is not None,
            "GROUP": GROUP,
        }

    def grid(self, width: int) -> tuple[int]:
        return (self.row_blocks * triton.cdiv(width, self.tile.n),)

    def activity(self, width: int) -> Activity | None:
        if self.flags is None:
            return None
        tiles = triton.cdiv(width, self.tile.n)
        return Activity(self.flags.view(-1)[: self.row_blocks * tiles].view(-1, tiles) != 0, self.tile.m, self.tile.n)


def over_vocabulary(
    z: Product,
    block: Block,
    needs: Needs,
    fill: Callable[[int, int], None],  # writes d(logits) of the rows [first, first + width) into the block
) -> Products:
    """dH in float32, dW and db of all rows of the parameter, in its dtype (float32 for float16 weights, whose sums
    over tokens may pass 65504)."""
    hidden, head = z.hidden, z.head
    weight_dtype = torch.float32 if head.weight.dtype == torch.float16 else head.weight.dtype
    grad_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if needs[0] else None
    rows = head.weight.size(0)
    grad_weight = hidden.new_empty(head.parameter_rows, hidden.size(1), dtype=weight_dtype) if needs[1] else None
    grad_bias = hidden.new_empty(head.parameter_rows, dtype=torch.float32) if needs[2] else None
    for padded in (grad_weight, grad_bias):
        if padded is not None:
            padded[rows:] = 0
    for first in range(0, rows, block.columns):
        weight = head.weight[first : first + block.columns]
        width = weight.size(0)
        fill(first, width)
        grad, activity = block.grad[:, :width], block.activity(width)
        if grad_hidden is not None:
            accumulate(grad_hidden, grad, weight, add=first > 0, activity=activity)
        if grad_weight is not None:
            out = grad_weight[first : first + width]
            accumulate(out, grad, hidden, transposed=True, activity=activity.T if activity else None)
        if grad_bias is not None and block.bias_parts is not None:
            grad_bias[first : first + width] = block.bias_parts[:, :width].sum(0)
    return grad_hidden, grad_weight, grad_bias


def block_of_columns(z: Product, tile: configs.Tile, columns: int, filtered: bool, needs: Needs) -> Block:
    rounded = max(1, min(columns, z.shape[1] + tile.n - 1) // tile.n) * tile.n
    return Block(z, tile, rounded, filtered, bias=needs[2])
