"""d(loss)/d(logits), written over the logits of a chunk. Every entry is read once and stored once.

Legend: C rows, V columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...losses.stats import Terms
from . import configs, device
from .cases import CompileCase
from .formulas import (
    JENSEN_SHANNON,
    REVERSE_KL,
    cap_slope,
    divergence_slope,
    filtered,
    kind_of,
    logprob_slope,
    scalar,
)


@triton.jit
def _divergence_grad_kernel(
    z_s,  # (C, V), overwritten
    z_t,  # (C, V)
    lse_s,  # (C,)
    lse_t,  # (C,)
    student_kl,  # (C,)
    coefficient,  # (C,)
    alpha: tl.float64,
    cap: tl.float64,
    threshold: tl.float64,
    columns: tl.int32,
    stride_s: tl.int64,
    stride_t: tl.int64,
    KIND: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_FILTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    dtype: tl.constexpr = lse_s.dtype.element_ty
    at = z_s + row * stride_s + column
    x_s = tl.load(at, mask=here, other=0.0).to(dtype)
    x_t = tl.load(z_t + row * stride_t + column, mask=here, other=0.0).to(dtype)
    log_q = x_s - tl.load(lse_s + row)
    log_p = x_t - tl.load(lse_t + row)
    slope = divergence_slope(log_q, log_p, tl.load(student_kl + row), scalar(alpha, dtype), KIND)
    slope = filtered(slope, scalar(threshold, dtype), HAS_FILTER) * tl.load(coefficient + row).to(dtype)
    if HAS_CAP:
        slope *= cap_slope(x_s, scalar(cap, dtype))
    tl.store(at, slope.to(z_s.dtype.element_ty), mask=here)


@triton.jit
def _logprob_grad_kernel(
    z,  # (C, V), overwritten
    lse,  # (C,)
    entropy,  # (C,)
    labels,  # (C,) global indices
    grad_logprob,  # (C,)
    grad_entropy,  # (C,)
    grad_lse,  # (C,)
    cap: tl.float64,
    columns: tl.int32,
    stride: tl.int64,
    start: tl.int32,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < columns
    dtype: tl.constexpr = lse.dtype.element_ty
    at = z + row * stride + column
    x = tl.load(at, mask=here, other=0.0).to(dtype)
    slope = logprob_slope(
        x - tl.load(lse + row),
        tl.load(entropy + row),
        column == tl.load(labels + row) - start,
        tl.load(grad_logprob + row),
        tl.load(grad_entropy + row),
        tl.load(grad_lse + row),
    )
    if HAS_CAP:
        slope *= cap_slope(x, scalar(cap, dtype))
    tl.store(at, slope.to(z.dtype.element_ty), mask=here)


def divergence_grad_(
    z_s: Tensor,  # (C, V), overwritten
    z_t: Tensor,  # (C, V)
    terms: Terms,
    coefficient: Tensor,  # (C,)
    alpha: float,
    cap: float | None,
    grad_filter: float,
) -> None:
    rows, columns = z_s.shape
    if z_s.numel() == 0:
        return
    config = configs.ROWS[device.architecture(z_s)]
    _divergence_grad_kernel[(rows, triton.cdiv(columns, config.block))](
        z_s,
        z_t,
        *(term.contiguous() for term in terms),
        coefficient.contiguous(),
        float(alpha),
        cap or 0.0,
        float(grad_filter),
        columns,
        z_s.stride(0),
        z_t.stride(0),
        KIND=kind_of(alpha),
        HAS_CAP=cap is not None,
        HAS_FILTER=grad_filter > 0,
        BLOCK=config.block,
        num_warps=config.warps,
    )


def logprob_grad_(
    z: Tensor,  # (C, V), overwritten
    lse: Tensor,
    entropy: Tensor,
    labels: Tensor,  # (C,) global
    start: int,
    grads: tuple[Tensor, Tensor, Tensor],  # of log-prob, entropy and logsumexp, each (C,)
    cap: float | None,
) -> None:
    rows, columns = z.shape
    if z.numel() == 0:
        return
    config = configs.ROWS[device.architecture(z)]
    _logprob_grad_kernel[(rows, triton.cdiv(columns, config.block))](
        z,
        lse.contiguous(),
        entropy.contiguous(),
        labels.contiguous(),
        *(grad.contiguous() for grad in grads),
        cap or 0.0,
        columns,
        z.stride(0),
        start,
        HAS_CAP=cap is not None,
        BLOCK=config.block,
        num_warps=config.warps,
    )


_TERMS = dict.fromkeys(("lse_s", "lse_t", "student_kl", "coefficient"), "*fp32")
_UPSTREAM = dict.fromkeys(("lse", "entropy", "grad_logprob", "grad_entropy", "grad_lse"), "*fp32")


def _case(name: str, dtype: str, kind: int, has_cap: bool, has_filter: bool) -> CompileCase:
    options = {"KIND": kind, "HAS_CAP": has_cap, "HAS_FILTER": has_filter}
    pointers = {"z_s": f"*{dtype}", "z_t": f"*{dtype}", **_TERMS}
    return CompileCase(name, _divergence_grad_kernel, pointers, options, configs.ROWS)


CASES = (
    _case("divergence_grad reverse fp32", "fp32", REVERSE_KL.value, False, False),
    _case("divergence_grad jsd fp32 softcap filter", "fp32", JENSEN_SHANNON.value, True, True),
    CompileCase(
        "logprob_grad fp32",
        _logprob_grad_kernel,
        {"z": "*fp32", "labels": "*i64", **_UPSTREAM},
        {"HAS_CAP": False},
        configs.ROWS,
    ),
)
