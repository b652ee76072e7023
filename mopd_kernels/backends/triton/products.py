"""Tiles of logits on the chip: the product h Wᵀ of a (tokens, vocabulary) tile, and how its operands get there.

An operand is a tensor descriptor (TMA, Hopper and newer) or a pointer with a stride; which one is the constexpr
TMA of the launch. Offsets are 64-bit.

Legend: N tokens, V vocabulary, H hidden; a tile is BM tokens by BN vocabulary rows, BK of H a step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, device
from .formulas import MINUS_INFINITY, capped, scalar

if TYPE_CHECKING:
    from ...projection import Projection

GROUP = 16  # row blocks that walk the vocabulary together, so that they share its tiles in L2


@triton.jit
def block_of(x, first, second, stride, rows, columns, TMA: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """x[first : first + BR, second : second + BC], 0 outside (rows, columns)."""
    if TMA:
        block = x.load([first, second])
    else:
        row = first + tl.arange(0, BR)
        column = second + tl.arange(0, BC)
        at = x + row.to(tl.int64)[:, None] * stride + column[None, :]
        block = tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    return block


@triton.jit
def product(
    h,  # (N, H)
    w,  # (V, H)
    token,
    column,
    tokens,
    columns,
    size,
    stride_h,
    stride_w,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """(BM, BN) of h Wᵀ from `token` and `column` on, in float32."""
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, size, BK):
        a = block_of(h, token, k, stride_h, tokens, size, TMA, BM, BK)
        b = block_of(w, column, k, stride_w, columns, size, TMA, BN, BK)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b.T, total, input_precision=PRECISION)
    return total


@triton.jit
def halves(x):
    """Left and right half of a tile's columns."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def pieces(x, PIECES: tl.constexpr):
    """A tile's columns in 1, 2 or 4 pieces: what follows a product takes one at a time, in fewer registers."""
    if PIECES == 1:
        cut = (x,)
    elif PIECES == 2:
        cut = halves(x)
    else:
        left, right = halves(x)
        cut = halves(left) + halves(right)
    return cut


@triton.jit
def logits_of(product, bias, column, columns, slope, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """z = cap(slope (h Wᵀ + b)), -inf past the vocabulary."""
    here = column < columns
    if HAS_BIAS:
        product += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)[None, :]
    z = capped(product * scalar(slope, tl.float32), scalar(cap, tl.float32), HAS_CAP)
    return tl.where(here[None, :], z, MINUS_INFINITY)


@triton.jit
def placed(index, row_blocks, parts, GROUP: tl.constexpr):
    """(row block, part) of a program: `GROUP` row blocks side by side, then the next part of the vocabulary."""
    group = index // (GROUP * parts)
    members = tl.minimum(row_blocks - group * GROUP, GROUP)
    inside = index - group * GROUP * parts
    return group * GROUP + inside % members, inside // members


class Product(NamedTuple):
    """Logits that are never formed: what stands in the place of a chunk of logits."""

    hidden: Tensor  # (N, H)
    head: Projection

    @property
    def shape(self) -> tuple[int, int]:
        return self.hidden.size(0), self.head.weight.size(0)

    def checked(self) -> Product:
        """As the kernels read it: rows contiguous along H, and the bias. A weight that lies so is not copied."""
        weight, bias = self.head.weight, self.head.bias
        head = replace(
            self.head,
            weight=weight if weight.stride(1) == 1 else weight.contiguous(),
            bias=None if bias is None else bias.contiguous(),
        )
        return Product(self.hidden.contiguous(), head)

    def tile(self, role: str) -> configs.Tile:
        arch = device.architecture(self.hidden)
        return configs.tile(role, arch, single=self.hidden.dtype == torch.float32)


def describable(x: Tensor) -> bool:
    """Whether TMA can address `x`: 16-byte aligned base and rows, unit stride along them."""
    row = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and x.data_ptr() % 16 == 0 and row % 16 == 0 and x.numel() > 0


def operand(x: Tensor, rows: int, columns: int, tma: bool) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, columns]) if tma else x


def numerics(x: Tensor) -> dict[str, Any]:
    """Constexprs of the product. float32 keeps its precision by three tensor-float products, unless the user has
    lowered torch's matmul precision. The interpreter's bfloat16 dot is wrong, so operands are widened there."""
    exact = torch.get_float32_matmul_precision() == "highest"
    precision = "tf32x3" if exact else "tf32"
    if x.dtype != torch.float32 or device.architecture(x) == "gfx942":
        precision = "ieee"
    return {"PRECISION": precision, "UPCAST": device.INTERPRETED and x.dtype == torch.bfloat16}


def parts_of_vocabulary(tokens: int, columns: int, tile: configs.Tile, processors: int) -> tuple[int, int]:
    """(P, columns a part): programs enough for four waves, in the number that leaves the last wave fullest."""
    row_blocks, tiles = triton.cdiv(tokens, tile.m), triton.cdiv(columns, tile.n)
    least = min(tiles, max(1, triton.cdiv(4 * processors, row_blocks)))

    def idle(count: int) -> float:
        waves = row_blocks * count / processors
        return -(-waves // 1) / waves

    count = min(range(least, min(tiles, 2 * least) + 1), key=idle)
    width = triton.cdiv(tiles, count) * tile.n
    return triton.cdiv(columns, width), width


def side(p: Product, tile: configs.Tile, suffix: str, tma: bool) -> dict[str, Any]:
    """Arguments of one side of a tile kernel, by name."""
    head, upper = p.head, suffix.upper()
    return {
        f"h_{suffix}": operand(p.hidden, tile.m, tile.k, tma),
        f"w_{suffix}": operand(head.weight, tile.n, tile.k, tma),
        f"bias_{suffix}": p.hidden if head.bias is None else head.bias,
        f"slope_{suffix}": float(head.slope),
        f"cap_{suffix}": float(head.cap or 0.0),
        f"size_{suffix}": p.hidden.size(1),
        f"stride_h{suffix}": p.hidden.stride(0),
        f"stride_w{suffix}": head.weight.stride(0),
        f"HAS_BIAS_{upper}": head.bias is not None,
        f"HAS_CAP_{upper}": head.cap is not None,
    }


def sides(student: Product, teacher: Product | None, tile: configs.Tile) -> dict[str, Any]:
    """Arguments of both sides and the launch's numerics; without a teacher its arguments repeat the student's."""
    every = [student] if teacher is None else [student, teacher]
    tma = tile.tma and all(describable(x) for p in every for x in (p.hidden, p.head.weight))
    return {
        **side(student, tile, "s", tma),
        **side(teacher or student, tile, "t", tma),
        **numerics(student.hidden),
        "TMA": tma,
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "PIECES": tile.pieces,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
