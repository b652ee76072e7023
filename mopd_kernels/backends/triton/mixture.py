"""Row kernels over mixtures of two distributions: the two divergences to it, and mixing a context into a teacher.

Legend: C rows, V columns, P programs a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import accumulation_dtype
from . import configs, device
from .cases import CompileCase
from .formulas import guarded, logaddexp, mixture_ratios, scalar
from .row_stats import split


@triton.jit
def _mixture_sums_kernel(
    z_s,  # (C, V)
    z_t,  # (C, V)
    lse_s,  # (C,)
    lse_t,  # (C,)
    out,  # (P, 2, C)
    alpha: tl.float64,
    rows: tl.int64,
    columns: tl.int32,
    stride_s: tl.int64,
    stride_t: tl.int64,
    width: tl.int32,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * width
    stop = tl.minimum(first + width, columns)
    dtype: tl.constexpr = out.dtype.element_ty
    weight = scalar(alpha, dtype)
    shift_s = tl.load(lse_s + row).to(dtype)
    shift_t = tl.load(lse_t + row).to(dtype)
    student = tl.zeros((BLOCK,), dtype)
    teacher = tl.zeros((BLOCK,), dtype)
    for offset in range(first, stop, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        here = column < stop
        log_q = tl.load(z_s + row * stride_s + column, mask=here, other=float("-inf")).to(dtype) - shift_s
        log_p = tl.load(z_t + row * stride_t + column, mask=here, other=float("-inf")).to(dtype) - shift_t
        ratio_s, ratio_t = mixture_ratios(log_q, log_p, weight)
        student += guarded(tl.exp(log_q), ratio_s)
        teacher += guarded(tl.exp(log_p), ratio_t)
    out += tl.program_id(1) * 2 * rows + row
    tl.store(out, tl.sum(student, 0))
    tl.store(out + rows, tl.sum(teacher, 0))


@triton.jit
def _mix_kernel(
    log_p,  # (C, V), overwritten
    z,  # (C, V)
    shift,  # (C,) log weight - lse
    columns: tl.int32,
    stride_p: tl.int64,
    stride_z: tl.int64,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    at = log_p + row * stride_p + column
    shifted = tl.load(z + row * stride_z + column, mask=here, other=0.0).to(shift.dtype.element_ty)
    mixed = logaddexp(tl.load(at, mask=here, other=0.0).to(shifted.dtype), shifted + tl.load(shift + row))
    tl.store(at, mixed.to(log_p.dtype.element_ty), mask=here)


def mixture_sums(z_s: Tensor, z_t: Tensor, lse_s: Tensor, lse_t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    rows, columns = z_s.shape
    dtype = accumulation_dtype(z_s.dtype)
    if rows == 0 or columns == 0:
        nothing = torch.zeros(2, rows, dtype=dtype, device=z_s.device)
        return nothing[0], nothing[1]
    config = configs.ROWS[device.architecture(z_s)]
    count, width = split(rows, columns, config, device.processors(z_s))
    parts = torch.empty(count, 2, rows, dtype=dtype, device=z_s.device)
    _mixture_sums_kernel[(rows, count)](
        z_s,
        z_t,
        lse_s,
        lse_t,
        parts,
        float(alpha),
        rows,
        columns,
        z_s.stride(0),
        z_t.stride(0),
        width,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    student, teacher = parts.sum(0)
    return student, teacher


def mix_(log_p: Tensor, z: Tensor, lse: Tensor, log_weight: Tensor | float) -> None:
    rows, columns = z.shape
    if z.numel() == 0:
        return
    config = configs.ROWS[device.architecture(z)]
    shift = (log_weight - lse).to(accumulation_dtype(z.dtype))
    grid = (rows, triton.cdiv(columns, config.block))
    _mix_kernel[grid](
        log_p, z, shift, columns, log_p.stride(0), z.stride(0), BLOCK=config.block, num_warps=config.warps
    )


_NUMBERS = dict.fromkeys(("lse_s", "lse_t", "out", "shift"), "*fp32")
CASES = (
    CompileCase(
        "mixture_sums fp32", _mixture_sums_kernel, {"z_s": "*fp32", "z_t": "*fp32", **_NUMBERS}, {}, configs.ROWS
    ),
    CompileCase("mix fp32", _mix_kernel, {"log_p": "*fp32", "z": "*fp32", **_NUMBERS}, {}, configs.ROWS),
)
