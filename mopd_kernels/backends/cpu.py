"""Row kernels of csrc_ref: C++ and OpenMP through ctypes, for float32 and float64 chunks on CPU.

Logits lie by vocabulary row (COLUMN_MAJOR: strides (1, C)), so that a vector holds neighbouring tokens. Chunks
that lie otherwise are copied, which is right but slow. csrc_ref/mopd.h is the contract of each function.

Environment: MOPD_CPU_LIBRARY is another build of the library, MOPD_CPU_LEVEL a lower instruction set
("portable", "avx2", "avx512"); both are for tests.

Legend: C rows, V columns, H hidden.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import Structure, c_char_p, c_double, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..losses.stats import MINUS_INFINITY, PairStats, SideStats, Terms

COLUMN_MAJOR = True
INTERFACE = 1  # of csrc_ref/mopd.h
FORWARD, REVERSE, MIXTURE = 0, 1, 2
SPARSE_BELOW = 0.15  # share of kept entries up to which the sparse products beat two GEMMs


class _Run(Structure):
    _fields_ = [("level", c_int32), ("bytes", c_int32), ("threads", c_int32)]


class _Plane(Structure):
    _fields_ = [("data", c_void_p), ("tokens", c_int64), ("rows", c_int64), ("stride", c_int64)]


class _Divergence(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("student_lse", "teacher_lse", "student_kl", "coefficient")],
        ("loss", c_int32),
        *[(name, c_double) for name in ("alpha", "cap", "filter")],
    ]


class _Logprob(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("lse", "entropy", "label", "grad_logprob", "grad_entropy", "grad_lse")],
        ("cap", c_double),
    ]


class _Products(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("hidden", "weight", "grad_hidden", "grad_weight", "grad_bias")],
        ("width", c_int64),
        ("weight_stride", c_int64),
        ("slope", c_double),
    ]


_SIGNATURES = {
    "mopd_exp": [_Run, c_void_p, c_void_p, c_int64],
    "mopd_log": [_Run, c_void_p, c_void_p, c_int64],
    "mopd_side_stats": [_Run, _Plane, c_void_p],
    "mopd_pair_stats": [_Run, _Plane, _Plane, c_int, c_void_p],
    "mopd_mixture_sums": [_Run, _Plane, _Plane, c_void_p, c_void_p, c_double, c_void_p],
    "mopd_mix": [_Run, _Plane, _Plane, c_void_p],
    "mopd_divergence_grad": [_Run, _Plane, _Plane, _Divergence],
    "mopd_divergence_kept": [_Run, _Plane, _Plane, _Divergence, c_void_p],
    "mopd_expand": [_Run, _Plane, _Plane, c_void_p],
    "mopd_sparse_products": [_Run, _Plane, _Plane, c_void_p, _Products],
    "mopd_logprob_grad": [_Run, _Plane, _Logprob],
    "mopd_topk": [_Run, _Plane, c_int64, c_void_p, c_void_p],
}


@cache
def library() -> ctypes.CDLL:
    """The shared library. Raises OSError where it is not built, or built from another version of mopd.h."""
    path = os.environ.get("MOPD_CPU_LIBRARY") or str(Path(__file__).with_name("libmopd_cpu.so"))
    lib = ctypes.CDLL(path)
    if lib.mopd_interface() != INTERFACE:
        raise OSError(f"expected interface {INTERFACE} of {path}, got {lib.mopd_interface()}: build it again")
    lib.mopd_level_name.argtypes, lib.mopd_level_name.restype = [c_int], c_char_p
    lib.mopd_level_runs.argtypes, lib.mopd_level_runs.restype = [c_int], c_int
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    return lib


@cache
def levels() -> list[str]:
    """Instruction sets that this build and this machine have, the best one last."""
    lib, names, index = library(), [], 0
    while (name := lib.mopd_level_name(index)) is not None:
        if lib.mopd_level_runs(index):
            names.append(name.decode())
        index += 1
    return names


def require(example: Tensor) -> None:
    if example.device.type != "cpu":
        raise ValueError(
            f"backend 'cpu' needs CPU tensors, got a tensor on {example.device}: use Execution(backend=None) to choose "
            "by device"
        )


def _run(z: Tensor) -> _Run:
    names = levels()
    chosen = os.environ.get("MOPD_CPU_LEVEL") or names[-1]
    if chosen not in names:
        raise ValueError(f"expected MOPD_CPU_LEVEL in {names}, got {chosen!r}")
    return _Run(names.index(chosen), z.element_size(), torch.get_num_threads())


def _by_row(z: Tensor) -> Tensor:
    """`z` (C, V) itself if it lies by vocabulary row, or a copy that does."""
    if z.dtype not in (torch.float32, torch.float64) or z.device.type != "cpu":
        raise TypeError(f"expected float32 or float64 logits on cpu, got {z.dtype} on {z.device}")
    return z if z.size(0) == 1 or z.stride(0) == 1 else z.T.contiguous().T


def _plane(z: Tensor) -> _Plane:
    return _Plane(z.data_ptr(), z.size(0), z.size(1), z.stride(1))


class _Arrays:
    """Per-token arguments as pointers; holds the tensors they point to until the call is over."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.held = like, list[Tensor]()

    def __call__(self, values: Tensor) -> int:
        expected = (self.like.size(0),)
        if values.shape != expected:
            raise ValueError(f"expected a value of each of {expected} rows, got shape {tuple(values.shape)}")
        self.held.append(values.detach().to(self.like.dtype).contiguous())
        return self.held[-1].data_ptr()


def _label_logits(z: Tensor, labels: Tensor | None, start: int) -> Tensor:
    if labels is None or z.size(1) == 0:
        return z.new_full((z.size(0),), MINUS_INFINITY)
    local = labels - start
    picked = z.gather(1, local.clamp(0, z.size(1) - 1)[:, None])[:, 0]
    return torch.where((local >= 0) & (local < z.size(1)), picked, MINUS_INFINITY)


def _side(lines: Tensor, z: Tensor, labels: Tensor | None, start: int) -> SideStats:
    """From (4, C) of mopd_side_stats."""
    maximum, sumexp, moment, row = lines
    label = _label_logits(z, labels, start)
    if z.size(1) == 0:
        return SideStats(torch.full_like(maximum, MINUS_INFINITY), sumexp, moment, label, row)
    return SideStats(maximum, sumexp, moment, label, row + start)


def side_stats(z: Tensor, labels: Tensor | None, start: int) -> SideStats:
    z = _by_row(z)
    out = z.new_zeros(4, z.size(0))
    if z.numel():
        library().mopd_side_stats(_run(z), _plane(z), out.data_ptr())
    return _side(out, z, labels, start)


def pair_stats(
    z_s: Tensor,  # (C, V)
    z_t: Tensor,  # (C, V)
    labels: Tensor | None,  # (C,) global
    start: int,
    alpha: float,
) -> PairStats:
    z_s, z_t = _by_row(z_s), _by_row(z_t)
    out = z_s.new_zeros(9, z_s.size(0))
    if z_s.numel():
        library().mopd_pair_stats(_run(z_s), _plane(z_s), _plane(z_t), _loss(alpha), out.data_ptr())
    cross = out[8] if alpha in (0, 1) else None
    return PairStats(_side(out[:4], z_s, labels, start), _side(out[4:8], z_t, labels, start), cross)


def _loss(alpha: float) -> int:
    return FORWARD if alpha == 0 else REVERSE if alpha == 1 else MIXTURE


def mixture_sums(z_s: Tensor, z_t: Tensor, lse_s: Tensor, lse_t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    z_s, z_t = _by_row(z_s), _by_row(z_t)
    out, arrays = z_s.new_zeros(2, z_s.size(0)), _Arrays(z_s)
    if z_s.numel():
        lses = arrays(lse_s), arrays(lse_t)
        library().mopd_mixture_sums(_run(z_s), _plane(z_s), _plane(z_t), *lses, alpha, out.data_ptr())
    return out[0], out[1]


def mix_(log_p: Tensor, z: Tensor, lse: Tensor, log_weight: Tensor) -> None:
    target, z, arrays = _by_row(log_p), _by_row(z), _Arrays(z)
    if z.numel():
        library().mopd_mix(_run(z), _plane(target), _plane(z), arrays(log_weight - lse))
    _give_back(log_p, target)


def _give_back(original: Tensor, copy: Tensor) -> None:
    if copy is not original:
        original.copy_(copy)


def _terms(
    arrays: _Arrays, terms: Terms, coefficient: Tensor, alpha: float, cap: float | None, grad_filter: float
) -> _Divergence:
    pointers = arrays(terms.student_lse), arrays(terms.teacher_lse), arrays(terms.student_kl), arrays(coefficient)
    return _Divergence(*pointers, _loss(alpha), alpha, cap or 0.0, grad_filter)


def divergence_grad_(
    z_s: Tensor,  # (C, V), overwritten
    z_t: Tensor,  # (C, V)
    terms: Terms,
    coefficient: Tensor,  # (C,)
    alpha: float,
    cap: float | None,
    grad_filter: float,
) -> None:
    student, z_t, arrays = _by_row(z_s), _by_row(z_t), _Arrays(z_s)
    if student.numel():
        packed = _terms(arrays, terms, coefficient, alpha, cap, grad_filter)
        library().mopd_divergence_grad(_run(student), _plane(student), _plane(z_t), packed)
    _give_back(z_s, student)


@dataclass(frozen=True)
class Kept:
    """Entries of a gradient G (C, V) above the filter, packed by vocabulary row as in mopd_divergence_kept."""

    values: Tensor  # (C, V), the packed rows
    tokens: Tensor  # (C, V)
    counts: Tensor  # (V,) int32

    def products(
        self,
        hidden: Tensor,  # (C, H)
        weight: Tensor,  # (V, H)
        slope: float,
        grad_hidden: Tensor | None,  # (C, H), overwritten with slope G W
        grad_weight: Tensor | None,  # (V, H), += slope Gᵀ h
        grad_bias: Tensor | None,  # (V,), += slope Σ G
    ) -> None:
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        hidden = hidden.contiguous()
        outputs = [grad_hidden, grad_weight, grad_bias]
        assert all(out is None or out.is_contiguous() for out in outputs)
        pointers = [None if out is None else out.data_ptr() for out in outputs]
        inputs = hidden.data_ptr(), weight.data_ptr()
        packed = _Products(*inputs, *pointers, hidden.size(1), weight.stride(0), slope)
        planes = _plane(self.values), _plane(self.tokens)
        library().mopd_sparse_products(_run(self.values), *planes, self.counts.data_ptr(), packed)


def divergence_grad_kept_(
    z_s: Tensor,  # (C, V), overwritten
    z_t: Tensor,  # (C, V), overwritten
    terms: Terms,
    coefficient: Tensor,  # (C,)
    alpha: float,
    cap: float | None,
    grad_filter: float,
) -> Kept | None:
    """`divergence_grad_` for sparse products: the entries above the filter, packed in place of both logits.

    None where they are too many for that to pay, or the chunk does not lie by row: then z_s is the dense gradient.
    """
    if _by_row(z_s) is not z_s or _by_row(z_t) is not z_t or z_s.numel() == 0:
        divergence_grad_(z_s, z_t, terms, coefficient, alpha, cap, grad_filter)
        return None
    run, arrays = _run(z_s), _Arrays(z_s)
    kept = Kept(z_s, z_t, torch.empty(z_s.size(1), dtype=torch.int32))
    packed = _terms(arrays, terms, coefficient, alpha, cap, grad_filter)
    library().mopd_divergence_kept(run, _plane(z_s), _plane(z_t), packed, kept.counts.data_ptr())
    if int(kept.counts.sum()) <= SPARSE_BELOW * z_s.numel():
        return kept
    library().mopd_expand(run, _plane(z_s), _plane(z_t), kept.counts.data_ptr())
    return None


def logprob_grad_(
    z: Tensor,  # (C, V), overwritten
    lse: Tensor,
    entropy: Tensor,
    labels: Tensor,  # (C,) global
    start: int,
    grads: tuple[Tensor, Tensor, Tensor],  # of log-prob, entropy and logsumexp, each (C,)
    cap: float | None,
) -> None:
    target, arrays = _by_row(z), _Arrays(z)
    if target.numel():
        packed = _Logprob(*map(arrays, (lse, entropy, labels - start, *grads)), cap or 0.0)
        library().mopd_logprob_grad(_run(target), _plane(target), packed)
    _give_back(z, target)


def topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values (C, k), largest first, and columns; equal values by column."""
    if not 1 <= k <= z.size(1):
        raise ValueError(f"expected k in [1, {z.size(1)}], got {k}")
    z = _by_row(z)
    values, columns = z.new_empty(z.size(0), k), torch.empty(z.size(0), k, dtype=torch.int64)
    library().mopd_topk(_run(z), _plane(z), k, values.data_ptr(), columns.data_ptr())
    return values, columns


library()  # importing the backend says whether it is built
