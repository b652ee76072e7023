"""KL(q||M) and KL(p||M) straight from hidden states, given both logsumexps: the second pass of Jensen-Shannon.

Legend: N tokens, V vocabulary, H hidden, P parts of the vocabulary.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .cases import CompileCase
from .formulas import JENSEN_SHANNON, guarded, mixture_ratios, scalar
from .linear_stats import launch_shape, stats_case
from .products import Product, logits_of, pieces, placed, product


@triton.jit
def _linear_mixture_kernel(
    h_s,  # (N, Hs)
    w_s,  # (V, Hs)
    bias_s,  # (V,)
    h_t,  # (N, Ht)
    w_t,  # (V, Ht)
    bias_t,  # (V,)
    lse_s,  # (N,)
    lse_t,  # (N,)
    out,  # (P, 2, N)
    alpha: tl.float64,
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
    width: tl.int32,
    count: tl.int32,
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
    block, part = placed(tl.program_id(0), tl.cdiv(tokens, BM), count, GROUP)
    token = block * BM
    row = token + tl.arange(0, BM)
    mask = row < tokens
    shift_s = tl.load(lse_s + row, mask=mask, other=0.0)[:, None]
    shift_t = tl.load(lse_t + row, mask=mask, other=0.0)[:, None]
    weight = scalar(alpha, tl.float32)
    student = tl.zeros((BM,), tl.float32)
    teacher = tl.zeros((BM,), tl.float32)
    first = part * width
    for at in range(first, tl.minimum(first + width, columns), BN):
        z_s = product(
            h_s, w_s, token, at, tokens, columns, size_s, stride_hs, stride_ws, TMA, UPCAST, PRECISION, BM, BN, BK
        )
        z_t = product(
            h_t, w_t, token, at, tokens, columns, size_t, stride_ht, stride_wt, TMA, UPCAST, PRECISION, BM, BN, BK
        )
        parts_s, parts_t = pieces(z_s, PIECES), pieces(z_t, PIECES)
        for piece in tl.static_range(PIECES):
            column = at + piece * (BN // PIECES) + tl.arange(0, BN // PIECES)
            log_q = logits_of(parts_s[piece], bias_s, column, columns, slope_s, cap_s, HAS_BIAS_S, HAS_CAP_S) - shift_s
            log_p = logits_of(parts_t[piece], bias_t, column, columns, slope_t, cap_t, HAS_BIAS_T, HAS_CAP_T) - shift_t
            ratio_s, ratio_t = mixture_ratios(log_q, log_p, weight)
            student += tl.sum(guarded(tl.exp(log_q), ratio_s), 1)
            teacher += tl.sum(guarded(tl.exp(log_p), ratio_t), 1)
    stride = tokens.to(tl.int64)
    tl.store(out + part * 2 * stride + row, student, mask)
    tl.store(out + (part * 2 + 1) * stride + row, teacher, mask)


def mixture_sums(z_s: Product, z_t: Product, lse_s: Tensor, lse_t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    z_s, z_t = z_s.checked(), z_t.checked()
    arguments, count, grid = launch_shape(z_s, z_t, "mixture")
    parts = torch.empty(count, 2, z_s.shape[0], dtype=torch.float32, device=z_s.hidden.device)
    _linear_mixture_kernel[grid](
        lse_s=lse_s.contiguous(), lse_t=lse_t.contiguous(), out=parts, alpha=float(alpha), **arguments
    )
    student, teacher = parts.sum(0)
    return student, teacher


def _mixture_case(name: str, dtype: str) -> CompileCase:
    case = stats_case(name, dtype, True, JENSEN_SHANNON.value, configs.TILES["mixture"])
    return replace(
        case,
        kernel=_linear_mixture_kernel,
        pointers={**case.pointers, "lse_s": "*fp32", "lse_t": "*fp32", "out": "*fp32"},
    )


CASES = (_mixture_case("linear_divergence mixture bf16", "bf16"),)
