"""One pass over a chunk of logits: online maximum, sum, moments, label and argmax of a row.

A row is read by P programs, each over its own columns; their parts are merged by a second kernel in a fixed
order, so that runs repeat bit for bit. Inside a program every lane keeps its own statistics of DEEP
columns a step, so the loop has no barrier between warps and rescales once a step.

Legend: C rows, V columns, P programs a row, F fields (5 a side, and 1 for the cross moment).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...losses.stats import PairStats, SideStats
from ...spec import accumulation_dtype
from . import configs, device
from .cases import CompileCase
from .formulas import FORWARD_KL, JENSEN_SHANNON, MINUS_INFINITY, REVERSE_KL, fold, guarded, kind_of, observe

SIDE_FIELDS = len(SideStats._fields)
MERGE_ROWS = 128


@triton.jit
def _row_stats_kernel(
    z_s,  # (C, V)
    z_t,  # (C, V)
    labels,  # (C,) global indices
    parts,  # (P, F, C)
    rows: tl.int64,
    columns: tl.int32,
    stride_s: tl.int64,
    stride_t: tl.int64,
    start: tl.int32,
    width: tl.int32,  # columns a program, a multiple of DEEP * BLOCK
    PAIR: tl.constexpr,
    KIND: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * width
    stop = tl.minimum(first + width, columns)
    dtype: tl.constexpr = parts.dtype.element_ty
    z_s += row * stride_s
    if PAIR:
        z_t += row * stride_t

    zero = tl.zeros((BLOCK,), dtype)
    lowest = tl.full((BLOCK,), float("-inf"), dtype)
    nowhere = tl.zeros((BLOCK,), tl.int32)
    m_s, s_s, mom_s, arg_s = lowest, zero, zero, nowhere
    m_t, s_t, mom_t, arg_t = lowest, zero, zero, nowhere
    cross = zero
    tile = tl.arange(0, DEEP)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    for offset in range(first, stop, DEEP * BLOCK):
        column = offset + tile
        here = column < stop
        x_s = tl.load(z_s + column, mask=here, other=float("-inf")).to(dtype)
        m_s, s_s, mom_s, arg_s, factor, weight = observe(x_s, column, m_s, s_s, mom_s, arg_s, 0)
        if PAIR:
            x_t = tl.load(z_t + column, mask=here, other=float("-inf")).to(dtype)
            if KIND == REVERSE_KL:
                cross = guarded(factor, cross) + tl.sum(guarded(weight, x_s - x_t), 0)
            m_t, s_t, mom_t, arg_t, factor, weight = observe(x_t, column, m_t, s_t, mom_t, arg_t, 0)
            if KIND == FORWARD_KL:
                cross = guarded(factor, cross) + tl.sum(guarded(weight, x_t - x_s), 0)

    label = -1
    if HAS_LABELS:
        label = tl.load(labels + row) - start
    owned = (label >= first) & (label < stop)
    fields: tl.constexpr = (10 + (KIND != JENSEN_SHANNON)) if PAIR else 5
    parts += tl.program_id(1) * fields * rows + row
    m_s, s_s, mom_s, arg_s, lanes_s = fold(m_s, s_s, mom_s, arg_s, 0)
    label_s = tl.load(z_s + label, mask=owned, other=float("-inf")).to(dtype)
    store_side(parts, rows, m_s, s_s, mom_s, arg_s + start)
    tl.store(parts + 3 * rows, label_s)
    if PAIR:
        m_t, s_t, mom_t, arg_t, lanes_t = fold(m_t, s_t, mom_t, arg_t, 0)
        label_t = tl.load(z_t + label, mask=owned, other=float("-inf")).to(dtype)
        store_side(parts + 5 * rows, rows, m_t, s_t, mom_t, arg_t + start)
        tl.store(parts + 8 * rows, label_t)
        if KIND == REVERSE_KL:
            tl.store(parts + 10 * rows, tl.sum(guarded(lanes_s, cross), 0))
        elif KIND == FORWARD_KL:
            tl.store(parts + 10 * rows, tl.sum(guarded(lanes_t, cross), 0))


@triton.jit
def store_side(out, rows, maximum, sumexp, moment, argmax, mask=None):
    """The fields of SideStats in their order, but for the label (3)."""
    tl.store(out, maximum, mask)
    tl.store(out + rows, sumexp, mask)
    tl.store(out + 2 * rows, moment, mask)
    tl.store(out + 4 * rows, argmax.to(out.dtype.element_ty), mask)


@triton.jit
def _merge_side(parts, row, mask, rows, count, FIELDS: tl.constexpr, AT: tl.constexpr, CROSS: tl.constexpr):
    """One side's parts in order, and the cross moment that is weighted with this side (CROSS).

    s = sum_p f_p s_p;  moment = sum_p f_p (moment_p + (m_p - m) s_p);  f_p = exp(m_p - m)
    """
    dtype: tl.constexpr = parts.dtype.element_ty
    zero = tl.zeros(row.shape, dtype)
    maximum = zero + MINUS_INFINITY
    label = zero + MINUS_INFINITY
    argmax = tl.load(parts + AT * rows + 4 * rows + row, mask=mask, other=0.0)
    for part in range(count):
        at = parts + (part * FIELDS + AT) * rows + row
        m = tl.load(at, mask=mask, other=float("-inf"))
        argmax = tl.where(m > maximum, tl.load(at + 4 * rows, mask=mask, other=0.0), argmax)
        maximum = tl.maximum(maximum, m)
        label = tl.maximum(label, tl.load(at + 3 * rows, mask=mask, other=float("-inf")))
    sumexp, moment, cross = zero, zero, zero
    for part in range(count):
        at = parts + (part * FIELDS + AT) * rows + row
        m = tl.load(at, mask=mask, other=float("-inf"))
        s = tl.load(at + rows, mask=mask, other=0.0)
        shift = tl.where(m > MINUS_INFINITY, m - maximum, 0.0)
        factor = tl.where(m > MINUS_INFINITY, tl.exp(shift), 0.0)
        sumexp += factor * s
        moment += guarded(factor, tl.load(at + 2 * rows, mask=mask, other=0.0) + shift * s)
        if CROSS:
            cross += guarded(factor, tl.load(at + (10 - AT) * rows, mask=mask, other=0.0))
    return maximum, sumexp, moment, label, argmax, cross


@triton.jit
def _merge_kernel(
    parts,  # (P, F, C)
    out,  # (F, C)
    rows: tl.int64,
    count: tl.int32,
    PAIR: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    fields: tl.constexpr = (10 + (KIND != JENSEN_SHANNON)) if PAIR else 5
    by_student: tl.constexpr = PAIR and KIND == REVERSE_KL
    by_teacher: tl.constexpr = PAIR and KIND == FORWARD_KL
    m, s, moment, label, argmax, cross = _merge_side(parts, row, mask, rows, count, fields, 0, by_student)
    store_side(out + row, rows, m, s, moment, argmax, mask)
    tl.store(out + 3 * rows + row, label, mask)
    if by_student:
        tl.store(out + 10 * rows + row, cross, mask)
    if PAIR:
        m, s, moment, label, argmax, cross = _merge_side(parts, row, mask, rows, count, fields, 5, by_teacher)
        store_side(out + 5 * rows + row, rows, m, s, moment, argmax, mask)
        tl.store(out + 8 * rows + row, label, mask)
        if by_teacher:
            tl.store(out + 10 * rows + row, cross, mask)


def merged(parts: Tensor, pair: bool, kind: int) -> Tensor:
    """Parts (P, F, C) of split rows into whole ones (F, C)."""
    count, fields, rows = parts.shape
    if count == 1:
        return parts[0]
    out = parts.new_empty(fields, rows)
    grid = (triton.cdiv(rows, MERGE_ROWS),)
    _merge_kernel[grid](parts, out, rows, count, PAIR=pair, KIND=kind, BLOCK=MERGE_ROWS, num_warps=4)
    return out


def split(rows: int, columns: int, config: configs.Rows, processors: int) -> tuple[int, int]:
    """(programs a row, columns each): about eight programs a processor, none with less than `config.least`."""
    wanted = max(1, min(8 * processors // max(1, rows), columns // config.least))
    step = config.block * config.deep
    width = triton.cdiv(triton.cdiv(columns, wanted), step) * step
    return triton.cdiv(columns, width), width


def _row_stats(z_s: Tensor, z_t: Tensor | None, labels: Tensor | None, start: int, kind: int) -> Tensor:
    """(F, C), whole rows."""
    rows, columns = z_s.shape
    config = configs.STATISTICS[device.architecture(z_s)].of_items(z_s.element_size())
    count, width = split(rows, columns, config, device.processors(z_s))
    pair = z_t is not None
    fields = SIDE_FIELDS if z_t is None else 2 * SIDE_FIELDS + (kind != JENSEN_SHANNON.value)
    parts = torch.empty(count, fields, rows, dtype=accumulation_dtype(z_s.dtype), device=z_s.device)
    if parts.numel():
        _row_stats_kernel[(rows, count)](
            z_s,
            z_t if pair else z_s,
            z_s if labels is None else labels,
            parts,
            rows,
            columns,
            z_s.stride(0),
            z_t.stride(0) if z_t is not None else 0,
            start,
            width,
            PAIR=pair,
            KIND=kind,
            HAS_LABELS=labels is not None,
            BLOCK=config.block,
            DEEP=config.deep,
            num_warps=config.warps,
        )
    return merged(parts, pair, kind)


def _neutral(z: Tensor) -> SideStats:
    """A shard without columns: what `merge_sides` ignores."""
    none = torch.full((z.size(0),), float("-inf"), dtype=accumulation_dtype(z.dtype), device=z.device)
    zero = torch.zeros_like(none)
    return SideStats(none, zero, zero, none, zero)


def side_stats(z: Tensor, labels: Tensor | None, start: int) -> SideStats:
    if z.size(1) == 0:
        return _neutral(z)
    return SideStats(*_row_stats(z, None, labels, start, JENSEN_SHANNON.value))


def pair_stats(
    z_s: Tensor,  # (C, V)
    z_t: Tensor,  # (C, V)
    labels: Tensor | None,  # (C,) global
    start: int,
    alpha: float,
) -> PairStats:
    kind = kind_of(alpha)
    if z_s.size(1) == 0:
        neutral = _neutral(z_s)
        return PairStats(neutral, neutral, None if kind == JENSEN_SHANNON.value else neutral.sumexp)
    return paired(_row_stats(z_s, z_t, labels, start, kind), kind)


def paired(fields: Tensor, kind: int) -> PairStats:
    """Fields (F, C) of both sides by name."""
    student, teacher = SideStats(*fields[:5]), SideStats(*fields[5:10])
    return PairStats(student, teacher, None if kind == JENSEN_SHANNON.value else fields[10])


def _case(name: str, dtype: str, pair: bool, kind: int) -> CompileCase:
    return CompileCase(
        name,
        _row_stats_kernel,
        {"z_s": f"*{dtype}", "z_t": f"*{dtype}", "labels": "*i64", "parts": "*fp32"},
        {"PAIR": pair, "KIND": kind, "HAS_LABELS": True},
        {arch: rows.of_items(4 if dtype == "fp32" else 2) for arch, rows in configs.STATISTICS.items()},
    )


CASES = (
    _case("row_stats pair reverse fp32", "fp32", True, REVERSE_KL.value),
    _case("row_stats pair jsd bf16", "bf16", True, JENSEN_SHANNON.value),
    _case("row_stats side fp32", "fp32", False, JENSEN_SHANNON.value),
    CompileCase(
        "merge parts",
        _merge_kernel,
        {"parts": "*fp32", "out": "*fp32"},
        {"PAIR": True, "KIND": REVERSE_KL.value},
        {arch: configs.Rows(MERGE_ROWS, 4, 0) for arch in configs.ARCHITECTURES},
    ),
)
