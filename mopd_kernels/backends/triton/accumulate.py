"""dH and dW from a block of d(logits): a product that can leave out inactive tiles and adds in float32.

    dH += G W      G (N, B) of a block of B vocabulary rows, W (B, H)
    dW  = Gᵀ h     complete for these rows, so it is stored once, in its own dtype

Own kernel and not cuBLAS, because dH is accumulated over blocks in float32 without a second buffer, and because
under a gradient filter most tiles of G are 0: `active` lists, for every block of output rows, the steps that are
not, and the loop runs over these alone. No atomics: one program owns an output tile.

Legend: M output rows, K summed over, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, device
from .cases import CompileCase
from .formulas import scalar
from .products import GROUP, block_of, describable, numerics, operand, pieces, placed


@triton.jit
def _accumulate_kernel(
    a,  # (M, K), or (K, M) if TRANSPOSED
    b,  # (K, H)
    out,  # (M, H)
    order,  # (M / UNIT_M, K / UNIT_K) active steps of UNIT_K first
    counts,  # (M / UNIT_M,) how many
    factor: tl.float64,
    rows: tl.int32,
    inner: tl.int32,
    columns: tl.int32,
    stride_a: tl.int64,
    stride_b: tl.int64,
    stride_out: tl.int64,
    units: tl.int32,  # K / UNIT_K
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    ACTIVE: tl.constexpr,
    UNIT_M: tl.constexpr,
    UNIT_K: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PIECES: tl.constexpr,
):
    block, tile = placed(tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(columns, BN), GROUP)
    first, column = block * BM, tile * BN
    steps = tl.cdiv(inner, BK)
    if ACTIVE:
        unit = first // UNIT_M
        steps = tl.load(counts + unit) * (UNIT_K // BK)
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(0, steps):
        k = step * BK
        if ACTIVE:
            k = tl.load(order + unit * units + k // UNIT_K) * UNIT_K + k % UNIT_K
        if TRANSPOSED:
            x = block_of(a, k, first, stride_a, inner, rows, TMA, BK, BM).T
        else:
            x = block_of(a, first, k, stride_a, rows, inner, TMA, BM, BK)
        y = block_of(b, k, column, stride_b, inner, columns, TMA, BK, BN)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    row = first + tl.arange(0, BM)
    row_at = out + row.to(tl.int64)[:, None] * stride_out
    cut = pieces(total, PIECES)
    for piece in tl.static_range(PIECES):
        at = column + piece * (BN // PIECES) + tl.arange(0, BN // PIECES)
        here = (row < rows)[:, None] & (at < columns)[None, :]
        value = cut[piece] * scalar(factor, tl.float32)
        if ADD:
            value += tl.load(row_at + at[None, :], mask=here, other=0.0)
        tl.store(row_at + at[None, :], value.to(out.dtype.element_ty), mask=here)


class Activity(NamedTuple):
    """Which (tokens, vocabulary) tiles of G hold anything."""

    flags: Tensor  # (N / m, B / n) of bool
    m: int
    n: int

    @property
    def T(self) -> Activity:
        return Activity(self.flags.T, self.n, self.m)

    def at_least(self, m: int, n: int) -> Activity:
        """Tiles joined until one covers `m` by `n`."""
        down, right = triton.cdiv(m, self.m), triton.cdiv(n, self.n)
        if down * right == 1:
            return self
        rows, columns = self.flags.shape
        flags = torch.nn.functional.pad(self.flags, (0, -columns % right, 0, -rows % down))
        joined = flags.unflatten(0, (-1, down)).unflatten(2, (-1, right)).any(3).any(1)
        return Activity(joined, self.m * down, self.n * right)


def accumulate(
    out: Tensor,  # (M, H)
    a: Tensor,  # (M, K), or (K, M) if transposed
    b: Tensor,  # (K, H)
    *,
    transposed: bool = False,
    add: bool = False,
    factor: float = 1.0,
    activity: Activity | None = None,  # of `a` as (M, K)
) -> None:
    """out = factor a b, or out += factor a b, with float32 sums; tiles of `a` without activity are not read."""
    rows, columns = out.shape
    inner = b.size(0)
    tile = configs.tile("accumulate", device.architecture(a), single=a.dtype == torch.float32)
    tma = tile.tma and describable(a) and describable(b)
    order = counts = out
    if activity is not None:
        activity = activity.at_least(tile.m, tile.k)
        flags = activity.flags.to(torch.int8).contiguous()  # argsort keeps strides, the kernel reads rows
        order = flags.argsort(stable=True, dim=1, descending=True).to(torch.int32)
        counts = activity.flags.sum(1, dtype=torch.int32)
    _accumulate_kernel[(triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n),)](
        operand(a, *((tile.k, tile.m) if transposed else (tile.m, tile.k)), tma),
        operand(b, tile.k, tile.n, tma),
        out,
        order,
        counts,
        float(factor),
        rows,
        inner,
        columns,
        a.stride(0),
        b.stride(0),
        out.stride(0),
        0 if activity is None else activity.flags.size(1),
        TRANSPOSED=transposed,
        ADD=add,
        ACTIVE=activity is not None,
        UNIT_M=tile.m if activity is None else activity.m,
        UNIT_K=tile.k if activity is None else activity.n,
        TMA=tma,
        **numerics(a),
        GROUP=GROUP,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        PIECES=tile.pieces,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def add_product_(out: Tensor, grad: Tensor, hidden: Tensor, factor: float, add: bool) -> None:
    """out (V, H) in float32 (+)= factor · gradᵀ (V, C) hidden (C, H), both of the head's low precision."""
    accumulate(out, grad, hidden.contiguous(), transposed=True, add=add, factor=factor)


def _case(
    name: str, dtype: str, out: str, launch: dict, transposed: bool, active: bool, add: bool = False
) -> CompileCase:
    return CompileCase(
        name,
        _accumulate_kernel,
        {"a": f"*{dtype}", "b": f"*{dtype}", "out": f"*{out}", "order": "*i32", "counts": "*i32"},
        {
            **{"TRANSPOSED": transposed, "ADD": add, "ACTIVE": active, "UNIT_M": 128, "UNIT_K": 128},
            **{"UPCAST": False, "GROUP": GROUP, "PRECISION": "tf32x3" if dtype == "fp32" else "ieee"},
        },
        launch,
        {"a": "km" if transposed else "mk", "b": "kn"},
    )


CASES = (
    _case("accumulate dH bf16", "bf16", "fp32", configs.TILES["accumulate"], False, False, True),
    _case("accumulate dH bf16 active tiles", "bf16", "fp32", configs.TILES["accumulate"], False, True, True),
    _case("accumulate dW bf16", "bf16", "bf16", configs.TILES["accumulate"], True, False),
    _case("accumulate dW bf16 over chunks", "bf16", "fp32", configs.TILES["accumulate"], True, False, True),
    _case("accumulate dW fp32 active tiles", "fp32", "fp32", configs.TILES["fp32"], True, True),
)
