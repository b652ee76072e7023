"""Row statistics straight from hidden states: products and online statistics in one kernel, no logits in memory.

A program takes BM tokens through its part of the vocabulary; parts are merged as those of `row_stats`.
Jensen-Shannon needs both logsumexps before its sums: `linear_mixture` follows.

Legend: N tokens, V vocabulary, H hidden, P parts of the vocabulary, F fields.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...losses.stats import PairStats, SideStats
from . import configs, device
from .cases import CompileCase
from .formulas import FORWARD_KL, JENSEN_SHANNON, REVERSE_KL, guarded, kind_of, observe
from .products import (
    GROUP,
    Product,
    logits_of,
    parts_of_vocabulary,
    pieces,
    placed,
    product,
    sides,
)
from .row_stats import SIDE_FIELDS, merged, paired, store_side


@triton.jit
def _store_label(out, z, column, label):
    """A label's logit is stored when its tile is met: carried along, it would cost registers."""
    chosen = tl.max(tl.where(column[None, :] == label[:, None], z, float("-inf")), 1)
    tl.store(out, chosen, mask=chosen > float("-inf"))


@triton.jit
def _linear_stats_kernel(
    h_s,  # (N, Hs)
    w_s,  # (V, Hs)
    bias_s,  # (V,)
    h_t,  # (N, Ht)
    w_t,  # (V, Ht)
    bias_t,  # (V,)
    labels,  # (N,) global indices
    parts,  # (P, F, N)
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
    start: tl.int32,
    width: tl.int32,  # vocabulary rows a program, a multiple of BN
    count: tl.int32,  # P
    PAIR: tl.constexpr,
    KIND: tl.constexpr,
    HAS_LABELS: tl.constexpr,
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
    first = part * width
    label = tl.full((BM,), -1, tl.int32)
    if HAS_LABELS:
        label = (tl.load(labels + row, mask=mask, other=-1) - start).to(tl.int32)
    fields: tl.constexpr = (10 + (KIND != JENSEN_SHANNON)) if PAIR else 5
    stride = tokens.to(tl.int64)
    out = parts + part * fields * stride + row
    zero = tl.zeros((BM,), tl.float32)
    lowest = tl.full((BM,), float("-inf"), tl.float32)
    nowhere = tl.zeros((BM,), tl.int32)
    m_s, s_s, mom_s, arg_s = lowest, zero, zero, nowhere
    m_t, s_t, mom_t, arg_t = lowest, zero, zero, nowhere
    cross = zero
    tl.store(out + 3 * stride, lowest, mask)
    if PAIR:
        tl.store(out + 8 * stride, lowest, mask)
    for at in range(first, tl.minimum(first + width, columns), BN):
        x_s = product(
            h_s, w_s, token, at, tokens, columns, size_s, stride_hs, stride_ws, TMA, UPCAST, PRECISION, BM, BN, BK
        )
        if PAIR:
            x_t = product(
                h_t, w_t, token, at, tokens, columns, size_t, stride_ht, stride_wt, TMA, UPCAST, PRECISION, BM, BN, BK
            )
        parts_s = pieces(x_s, PIECES)
        parts_t = pieces(x_t, PIECES) if PAIR else parts_s
        for piece in tl.static_range(PIECES):
            column = at + piece * (BN // PIECES) + tl.arange(0, BN // PIECES)
            z_s = logits_of(parts_s[piece], bias_s, column, columns, slope_s, cap_s, HAS_BIAS_S, HAS_CAP_S)
            _store_label(out + 3 * stride, z_s, column, label)
            m_s, s_s, mom_s, arg_s, factor, weight = observe(z_s, column[None, :], m_s, s_s, mom_s, arg_s, 1)
            if PAIR:
                z_t = logits_of(parts_t[piece], bias_t, column, columns, slope_t, cap_t, HAS_BIAS_T, HAS_CAP_T)
                if KIND == REVERSE_KL:
                    cross = guarded(factor, cross) + tl.sum(guarded(weight, z_s - z_t), 1)
                _store_label(out + 8 * stride, z_t, column, label)
                m_t, s_t, mom_t, arg_t, factor, weight = observe(z_t, column[None, :], m_t, s_t, mom_t, arg_t, 1)
                if KIND == FORWARD_KL:
                    cross = guarded(factor, cross) + tl.sum(guarded(weight, z_t - z_s), 1)
    store_side(out, stride, m_s, s_s, mom_s, arg_s + start, mask)
    if PAIR:
        store_side(out + 5 * stride, stride, m_t, s_t, mom_t, arg_t + start, mask)
        if KIND != JENSEN_SHANNON:
            tl.store(out + 10 * stride, cross, mask)


def launch_shape(student: Product, teacher: Product | None, role: str) -> tuple[dict[str, Any], int, tuple[int]]:
    """Arguments of the sides, P, grid."""
    tile = student.tile(role)
    tokens, columns = student.shape
    count, width = parts_of_vocabulary(tokens, columns, tile, device.processors(student.hidden))
    arguments = sides(student, teacher, tile) | {"tokens": tokens, "columns": columns, "width": width, "count": count}
    return arguments | {"GROUP": GROUP}, count, (triton.cdiv(tokens, tile.m) * count,)


def _linear_stats(student: Product, teacher: Product | None, labels: Tensor | None, start: int, kind: int) -> Tensor:
    """(F, N)"""
    pair, hidden = teacher is not None, student.hidden
    fields = 2 * SIDE_FIELDS + (kind != JENSEN_SHANNON.value) if pair else SIDE_FIELDS
    if 0 in student.shape:
        raise ValueError(f"expected tokens and vocabulary rows, got {student.shape}")
    arguments, count, grid = launch_shape(student, teacher, "divergence" if pair else "logprob")
    parts = torch.empty(count, fields, student.shape[0], dtype=torch.float32, device=hidden.device)
    _linear_stats_kernel[grid](
        labels=hidden if labels is None else labels.contiguous(),
        parts=parts,
        start=start,
        PAIR=pair,
        KIND=kind,
        HAS_LABELS=labels is not None,
        **arguments,
    )
    return merged(parts, pair, kind)


def side_stats(z: Product, labels: Tensor | None, start: int) -> SideStats:
    return SideStats(*_linear_stats(z.checked(), None, labels, start, JENSEN_SHANNON.value))


def pair_stats(z_s: Product, z_t: Product, labels: Tensor | None, start: int, alpha: float) -> PairStats:
    kind = kind_of(alpha)
    return paired(_linear_stats(z_s.checked(), z_t.checked(), labels, start, kind), kind)


def stats_case(name: str, dtype: str, pair: bool, kind: int, launch: dict, capped: bool = False) -> CompileCase:
    wanted = ("h_s", "w_s", "bias_s", "h_t", "w_t", "bias_t")
    return CompileCase(
        name,
        _linear_stats_kernel,
        {**dict.fromkeys(wanted, f"*{dtype}"), "labels": "*i64", "parts": "*fp32"},
        {
            **{"PAIR": pair, "KIND": kind, "HAS_LABELS": True, "GROUP": GROUP, "UPCAST": False},
            **{"HAS_BIAS_S": capped, "HAS_BIAS_T": False, "HAS_CAP_S": capped, "HAS_CAP_T": False},
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        },
        launch,
        {"h_s": "mk", "w_s": "nk", "h_t": "mk", "w_t": "nk"},
    )


CASES = (
    stats_case("linear_logprob bf16", "bf16", False, JENSEN_SHANNON.value, configs.TILES["logprob"]),
    stats_case("linear_logprob fp32", "fp32", False, JENSEN_SHANNON.value, configs.TILES["logprob fp32"]),
    stats_case("linear_divergence reverse bf16", "bf16", True, REVERSE_KL.value, configs.TILES["divergence"]),
    stats_case(
        "linear_divergence forward bf16 softcap bias", "bf16", True, FORWARD_KL.value, configs.TILES["divergence"], True
    ),
    stats_case("linear_divergence reverse fp32", "fp32", True, REVERSE_KL.value, configs.TILES["fp32"]),
)
