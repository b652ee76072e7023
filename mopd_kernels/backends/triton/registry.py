"""Every compile case of every kernel, in the order of the static table."""

from . import (
    accumulate,
    linear_grad,
    linear_logprob_grad,
    linear_mixture,
    linear_stats,
    mixture,
    row_grad,
    row_stats,
)
from .cases import CompileCase
from .topk import CASES as TOPK

CASES: tuple[CompileCase, ...] = (
    *row_stats.CASES,
    *mixture.CASES,
    *row_grad.CASES,
    *TOPK,
    *linear_stats.CASES,
    *linear_mixture.CASES,
    *linear_grad.CASES,
    *linear_logprob_grad.CASES,
    *accumulate.CASES,
)
