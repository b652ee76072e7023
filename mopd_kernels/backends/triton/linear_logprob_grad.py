"""Gradient of log-probs, entropy and logsumexp straight from hidden states; see `blocks` for the loop.

Legend: N tokens, V vocabulary, H hidden, B vocabulary rows of a block, m and n tokens and rows of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .blocks import Needs, Products, block_of_columns, over_vocabulary, store_tile
from .cases import CompileCase
from .formulas import cap_slope, logprob_slope, scalar
from .products import GROUP, Product, logits_of, pieces, placed, product, sides


@triton.jit
def _logprob_tiles_kernel(
    h_s,  # (N, H)
    w_s,  # (V, H)
    bias_s,  # (V,)
    lse,  # (N,)
    entropy,  # (N,)
    labels,  # (N,) global indices
    grad_logprob,  # (N,)
    grad_entropy,  # (N,)
    grad_lse,  # (N,)
    grad,  # (N, B)
    bias_parts,  # (N / m, B)
    slope_s: tl.float64,
    cap_s: tl.float64,
    tokens: tl.int32,
    columns: tl.int32,
    size_s: tl.int32,
    stride_hs: tl.int64,
    stride_ws: tl.int64,
    stride_grad: tl.int64,
    first: tl.int32,
    tiles: tl.int32,
    start: tl.int32,
    HAS_DBIAS: tl.constexpr,
    HAS_BIAS_S: tl.constexpr,
    HAS_CAP_S: tl.constexpr,
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
    x = product(h_s, w_s, token, at, tokens, columns, size_s, stride_hs, stride_ws, TMA, UPCAST, PRECISION, BM, BN, BK)
    row = token + tl.arange(0, BM)
    mask = row < tokens
    shift = tl.load(lse + row, mask=mask, other=0.0)[:, None]
    spread = tl.load(entropy + row, mask=mask, other=0.0)[:, None]
    label = (tl.load(labels + row, mask=mask, other=-1) - start)[:, None]
    upstream = tl.load(grad_logprob + row, mask=mask, other=0.0)[:, None]
    by_entropy = tl.load(grad_entropy + row, mask=mask, other=0.0)[:, None]
    by_lse = tl.load(grad_lse + row, mask=mask, other=0.0)[:, None]
    cap, inner = scalar(cap_s, tl.float32), scalar(slope_s, tl.float32)
    cut = pieces(x, PIECES)
    for piece in tl.static_range(PIECES):
        column = at + piece * (BN // PIECES) + tl.arange(0, BN // PIECES)
        z = logits_of(cut[piece], bias_s, column, columns, slope_s, cap_s, HAS_BIAS_S, HAS_CAP_S)
        slope = inner * logprob_slope(z - shift, spread, column[None, :] == label, upstream, by_entropy, by_lse)
        if HAS_CAP_S:
            slope *= tl.where((column < columns)[None, :], cap_slope(z, cap), 0.0)
        store_tile(slope, grad, bias_parts, row, mask, column, block, first, columns, stride_grad, HAS_DBIAS)


def logprob_products(
    z: Product,
    lse: Tensor,
    entropy: Tensor,
    labels: Tensor,  # (N,) global
    start: int,
    grads: tuple[Tensor, Tensor, Tensor],  # of log-prob, entropy and logsumexp, each (N,)
    needs: Needs,
    columns: int,
) -> Products:
    """dH, dW, db of Σ grads · (log-prob, entropy, logsumexp)."""
    z = z.checked()
    tile = z.tile("logprob gradient")
    block = block_of_columns(z, tile, columns, False, needs)
    upstream = [grad.to(torch.float32).contiguous() for grad in grads]
    common = {k: v for k, v in sides(z, None, tile).items() if not k.lower().endswith(("_t", "_ht", "_wt"))}

    def fill(first: int, width: int) -> None:
        _logprob_tiles_kernel[block.grid(width)](
            lse=lse.contiguous(),
            entropy=entropy.contiguous(),
            labels=labels.contiguous(),
            grad_logprob=upstream[0],
            grad_entropy=upstream[1],
            grad_lse=upstream[2],
            tokens=z.shape[0],
            columns=z.shape[1],
            start=start,
            **common,
            **block.arguments(first, width),
        )

    return over_vocabulary(z, block, needs, fill)


def _case(name: str, dtype: str, launch: dict) -> CompileCase:
    wide = ("lse", "entropy", "grad_logprob", "grad_entropy", "grad_lse", "bias_parts")
    return CompileCase(
        name,
        _logprob_tiles_kernel,
        {
            **dict.fromkeys(("h_s", "w_s", "bias_s", "grad"), f"*{dtype}"),
            **dict.fromkeys(wide, "*fp32"),
            "labels": "*i64",
        },
        {
            **{"HAS_DBIAS": False, "HAS_BIAS_S": False, "HAS_CAP_S": False, "GROUP": GROUP, "UPCAST": False},
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        },
        launch,
        {"h_s": "mk", "w_s": "nk"},
    )


CASES = (
    _case("logprob_tiles bf16", "bf16", configs.TILES["logprob gradient"]),
    _case("logprob_tiles fp32", "fp32", configs.TILES["fp32"]),
)
