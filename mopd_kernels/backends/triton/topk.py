"""The k largest logits of a row in one pass.

A program keeps the best of its row as sorted 64-bit keys, [value in an order-preserving integer | ~column], so
that ties go to the lower column and the result is deterministic. A block of columns is sorted only if one of its
entries beats the k-th key: after the first blocks that is rare (about k ln(V / k) entries of a shuffled row), so
the pass is bound by reading.

Legend: C rows, V columns, K the power of two at or above k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, device
from .cases import CompileCase

LARGEST = 1024
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def _keys(value, column):
    """Larger is better: float32 bits in order (negative ones reversed) above the reversed column."""
    value = tl.where(value == 0, 0.0, value)  # -0.0 ties with 0.0
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def _topk_kernel(
    z,  # (C, V)
    indices,  # (C, k)
    columns: tl.int32,
    stride: tl.int64,
    k: tl.int32,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    lane = tl.arange(0, BLOCK)
    best = tl.full((K,), LOWEST, tl.int64)
    worst = tl.min(best, 0)
    for first in range(0, columns, BLOCK):
        column = first + lane
        value = tl.load(z + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        keys = tl.where(column < columns, _keys(value, column), LOWEST)
        if tl.max(keys, 0) > worst:
            both = tl.join(best, tl.topk(keys, K)).reshape(2 * K)
            best = tl.topk(both, K)
            worst = tl.min(best, 0)
    place = tl.arange(0, K)
    column = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    tl.store(indices + row * k + place, column, mask=place < k)


def topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, local column indices) (C, k), largest first; of equal values the lower column first."""
    rows, columns = z.shape
    if not 1 <= k <= columns:
        raise ValueError(f"expected top_k in [1, {columns}], got {k}")
    if z.dtype == torch.float64 or k > LARGEST:  # no room for a column in the key; networks too long to compile
        values, order = z.sort(dim=1, descending=True, stable=True)
        return values[:, :k], order[:, :k]
    size = max(16, triton.next_power_of_2(k))
    config = configs.TOPK[device.architecture(z)]
    indices = torch.empty(rows, k, dtype=torch.int64, device=z.device)
    if rows:
        block = max(size, config.block)
        _topk_kernel[(rows,)](z, indices, columns, z.stride(0), k, K=size, BLOCK=block, num_warps=config.warps)
    return z.gather(1, indices), indices


def _case(name: str, dtype: str, size: int) -> CompileCase:
    return CompileCase(name, _topk_kernel, {"z": f"*{dtype}", "indices": "*i64"}, {"K": size}, configs.TOPK)


CASES = (_case("topk k=128 fp32", "fp32", 128), _case("topk k=32 bf16", "bf16", 32))
