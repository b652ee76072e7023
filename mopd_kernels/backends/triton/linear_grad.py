"""Gradient of the divergence straight from hidden states: d(logits) of a block of vocabulary rows, both logits
recomputed tile by tile from the saved row statistics, then the products of `accumulate`.

Legend: N tokens, V vocabulary, H hidden, B vocabulary rows of a block, m and n tokens and rows of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...losses.stats import Terms
from . import configs
from .blocks import Needs, Products, block_of_columns, over_vocabulary, store_tile
from .cases import CompileCase
from .formulas import FORWARD_KL, JENSEN_SHANNON, REVERSE_KL, cap_slope, divergence_slope, filtered, kind_of, scalar
from .products import GROUP, Product, logits_of, pieces, placed, product, sides


@triton.jit
def _divergence_tiles_kernel(
    h_s,  # (N, Hs)
    w_s,  # (V, Hs)
    bias_s,  # (V,)
    h_t,  # (N, Ht)
    w_t,  # (V, Ht)
    bias_t,  # (V,)
    lse_s,  # (N,)
    lse_t,  # (N,)
    student_kl,  # (N,)
    coefficient,  # (N,)
    grad,  # (N, B)
    flags,  # (N / m, B / n)
    bias_parts,  # (N / m, B)
    alpha: tl.float64,
    threshold: tl.float64,
    slope_s: tl.float64,
    cap_s: tl.float64,
    slope_t: tl.float64,
    cap_t: tl.float64,
    tokens: tl.int32,
    columns: tl.int32,
    size_s: tl.int32,
    size_t: tl.int32,
    stride_hs: tl.int64,
    stride_ws: tl.int64,
    stride_ht: tl.int64,
    stride_wt: tl.int64,
    stride_grad: tl.int64,
    first: tl.int32,  # vocabulary row of the block
    tiles: tl.int32,  # B / n
    KIND: tl.constexpr,
    HAS_FILTER: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    HAS_BIAS_S: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    HAS_CAP_S: tl.constexpr,
    HAS_CAP_T: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PIECES: tl.constexpr,
):
    block, tile = placed(tl.program_id(0), tl.cdiv(tokens, BM), tiles, GROUP)
    token, at = block * BM, first + tile * BN
    x_s = product(
        h_s, w_s, token, at, tokens, columns, size_s, stride_hs, stride_ws, TMA, UPCAST, PRECISION, BM, BN, BK
    )
    x_t = product(
        h_t, w_t, token, at, tokens, columns, size_t, stride_ht, stride_wt, TMA, UPCAST, PRECISION, BM, BN, BK
    )
    row = token + tl.arange(0, BM)
    mask = row < tokens
    shift_s = tl.load(lse_s + row, mask=mask, other=0.0)[:, None]
    shift_t = tl.load(lse_t + row, mask=mask, other=0.0)[:, None]
    kl = tl.load(student_kl + row, mask=mask, other=0.0)[:, None]
    factor = tl.load(coefficient + row, mask=mask, other=0.0)[:, None]
    cap, weight = scalar(cap_s, tl.float32), scalar(alpha, tl.float32)
    active = 0.0
    parts_s, parts_t = pieces(x_s, PIECES), pieces(x_t, PIECES)
    for piece in tl.static_range(PIECES):
        column = at + piece * (BN // PIECES) + tl.arange(0, BN // PIECES)
        z_s = logits_of(parts_s[piece], bias_s, column, columns, slope_s, cap_s, HAS_BIAS_S, HAS_CAP_S)
        z_t = logits_of(parts_t[piece], bias_t, column, columns, slope_t, cap_t, HAS_BIAS_T, HAS_CAP_T)
        slope = divergence_slope(z_s - shift_s, z_t - shift_t, kl, weight, KIND)
        slope = filtered(slope, scalar(threshold, tl.float32), HAS_FILTER)
        if HAS_FILTER:
            active = tl.maximum(active, tl.max(tl.where(mask[:, None] & (slope != 0), 1.0, 0.0)))  # NaN as well
        slope *= factor
        if HAS_CAP_S:
            slope *= tl.where((column < columns)[None, :], cap_slope(z_s, cap), 0.0)
        store_tile(slope, grad, bias_parts, row, mask, column, block, first, columns, stride_grad, HAS_DBIAS)
    if HAS_FILTER:
        tl.store(flags + block * tiles + tile, active > 0)


def divergence_products(
    z_s: Product,
    z_t: Product,
    terms: Terms,
    coefficient: Tensor,  # (N,)
    alpha: float,
    grad_filter: float,
    needs: Needs,
    columns: int,  # vocabulary rows of d(logits) held at a time
) -> Products:
    """dH, dW, db of Σ coefficient_i · divergence_i."""
    z_s, z_t = z_s.checked(), z_t.checked()
    tile = z_s.tile("gradient")
    block = block_of_columns(z_s, tile, columns, grad_filter > 0, needs)
    numbers = (*terms, coefficient * z_s.head.slope)
    lse_s, lse_t, student_kl, factor = (x.to(torch.float32).contiguous() for x in numbers)
    common = sides(z_s, z_t, tile)

    def fill(first: int, width: int) -> None:
        _divergence_tiles_kernel[block.grid(width)](
            lse_s=lse_s,
            lse_t=lse_t,
            student_kl=student_kl,
            coefficient=factor,
            flags=block.grad if block.flags is None else block.flags,
            alpha=float(alpha),
            threshold=float(grad_filter),
            tokens=z_s.shape[0],
            columns=z_s.shape[1],
            KIND=kind_of(alpha),
            HAS_FILTER=grad_filter > 0,
            **common,
            **block.arguments(first, width),
        )

    return over_vocabulary(z_s, block, needs, fill)


def _case(name: str, dtype: str, kind: int, launch: dict, capped: bool = False, filtered: bool = False) -> CompileCase:
    low = ("h_s", "w_s", "bias_s", "h_t", "w_t", "bias_t", "grad")
    wide = ("lse_s", "lse_t", "student_kl", "coefficient", "bias_parts")
    return CompileCase(
        name,
        _divergence_tiles_kernel,
        {**dict.fromkeys(low, f"*{dtype}"), **dict.fromkeys(wide, "*fp32"), "flags": "*i8"},
        {
            **{"KIND": kind, "HAS_FILTER": filtered, "HAS_DBIAS": capped, "GROUP": GROUP, "UPCAST": False},
            **{"HAS_BIAS_S": capped, "HAS_BIAS_T": False, "HAS_CAP_S": capped, "HAS_CAP_T": False},
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        },
        launch,
        {"h_s": "mk", "w_s": "nk", "h_t": "mk", "w_t": "nk"},
    )


CASES = (
    _case("divergence_tiles reverse bf16 filter", "bf16", REVERSE_KL.value, configs.TILES["gradient"], filtered=True),
    _case("divergence_tiles jsd bf16", "bf16", JENSEN_SHANNON.value, configs.TILES["gradient"]),
    _case("divergence_tiles forward bf16 softcap bias", "bf16", FORWARD_KL.value, configs.TILES["gradient"], True),
    _case("divergence_tiles reverse fp32", "fp32", REVERSE_KL.value, configs.TILES["fp32"]),
)
