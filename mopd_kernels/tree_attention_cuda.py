"""Tree attention for GPUs: FlexAttention with a block mask, and flash-attn calls per tree level.

Compiled, not run here: the flash-attn path has only run on CPU through `varlen_reference`, which has flash-attn's
signatures and returns its logsumexp; FlexAttention has only run uncompiled.

Legend: T rows, H query heads, Hk key/value heads, D head size, B nodes of one call, Nq/Nk rows of one call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .prefix_tree import PrefixTree
from .tree_attention import TreePlan


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_kernel(
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, Hk, T, D)
    value: Tensor,  # (1, Hk, T, D)
    plan: TreePlan,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # (1, T, H, D)
    """FlexAttention: one block mask per (forward, window). Compiled on CUDA; on CPU a dense, uncompiled check."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if sinks is not None:
        raise ValueError("kernel 'flex' has no attention sinks: use kernel='sdpa'")
    rows, cache_key = query.shape[2], ("flex", window, query.device)
    if cache_key not in plan.cache:
        mask_mod = ancestor_mask(plan.tree, window, query.device)
        plan.cache[cache_key] = create_block_mask(mask_mod, None, None, rows, rows, device=query.device)

    score_mod = None
    if softcap is not None:
        cap = softcap

        def score_mod(score: Tensor, *_: Tensor) -> Tensor:
            return torch.tanh(score / cap) * cap

    flex: Any = _compiled_flex() if query.is_cuda else flex_attention
    block_mask, grouped = plan.cache[cache_key], query.shape[1] != key.shape[1]
    out = flex(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def ancestor_mask(tree: PrefixTree, window: int | None, device: torch.device) -> Callable:
    """FlexAttention mask_mod: row q sees row k if k <= q < end of k's descendants and their depths differ by less
    than the window."""
    sizes = torch.tensor([node.stop - node.start for node in tree.nodes])
    ends = torch.tensor([node.end for node in tree.nodes]).repeat_interleave(sizes).to(device)
    depth = tree.positions.to(device)

    def mask_mod(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = (k <= q) & (q < ends[k])
        return visible if window is None else visible & (depth[q] - depth[k] < window)

    return mask_mod


Side = tuple[Tensor | None, Tensor, int]


@dataclass(frozen=True)
class VarlenCall:
    """One varlen call. A side is (rows (N,) int64 or None for all, edges (B + 1,) int32 of nodes in them, longest)."""

    queries: Side
    keys: Side
    causal: bool

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
        return self.queries[1], self.keys[1], self.queries[2], self.keys[2]


def level_calls(tree: PrefixTree, device: torch.device) -> list[VarlenCall]:
    """Every node attends causally to itself in one call; then, level by level, descendants attend to all of a node.

    Each (row, ancestor) pair falls in exactly one call, and within a call a row occurs at most once.
    """

    def side(spans: list[tuple[int, int]], gather: bool) -> Side:
        lengths = [stop - start for start, stop in spans]
        edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        rows = torch.cat([torch.arange(*span) for span in spans]).to(device) if gather else None
        return rows, edges, max(lengths)

    everything = side([(node.start, node.stop) for node in tree.nodes], gather=False)
    calls = [VarlenCall(everything, everything, causal=True)]
    inner = [node for node in tree.nodes if node.end > node.stop]
    for level in range(1 + max((node.level for node in inner), default=-1)):
        nodes = [node for node in inner if node.level == level]
        queries = side([(node.stop, node.end) for node in nodes], gather=True)
        keys = side([(node.start, node.stop) for node in nodes], gather=True)
        calls.append(VarlenCall(queries, keys, causal=False))
    return calls


class LevelAttention(torch.autograd.Function):
    """Attention of every row over its ancestors, from one partial attention per call of `level_calls`.

    Partials merge exactly: with lse_j the logsumexp of part j, out = sum_j exp(lse_j - lse) out_j and
    lse = log sum_j exp(lse_j). Backward hands each part the *merged* out and lse, from which its own softmax
    probabilities and row dot products follow, so the parts' gradients simply add. Merging and sums in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # (T, H, D)
        key: Tensor,  # (T, Hk, D)
        value: Tensor,  # (T, Hk, D)
        calls: list[VarlenCall],
        scale: float,
        softcap: float,  # 0: none
        functions: tuple[Callable, Callable],  # flash_attn_varlen_func, _flash_attn_varlen_backward
    ) -> Tensor:  # (T, H, D)
        wide = torch.promote_types(query.dtype, torch.float32)
        merged = torch.empty(0)
        lse = torch.empty(0)
        for call in calls:
            rows, (k, v) = call.queries[0], (_rows(x, call.keys[0]) for x in (key, value))
            part, part_lse, _ = functions[0](
                _rows(query, rows),
                k,
                v,
                *call.lengths,
                softmax_scale=scale,
                causal=call.causal,
                softcap=softcap,
                return_attn_probs=True,
            )
            if rows is None:  # the first call, of every row
                merged, lse = part.to(wide), part_lse
                continue
            old = lse[:, rows]
            new = torch.logaddexp(old, part_lse)
            keep, add = ((x - new).exp().t()[..., None] for x in (old, part_lse))
            merged[rows] = merged[rows] * keep + part * add
            lse[:, rows] = new
        out = merged.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.calls, ctx.scale, ctx.softcap, ctx.backward_function = calls, scale, softcap, functions[1]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        totals = [torch.zeros_like(x, dtype=wide) for x in (query, key, value)]
        grad = grad.contiguous()
        for call in ctx.calls:
            index = (call.queries[0], call.keys[0], call.keys[0])
            inputs = [_rows(x, rows) for x, rows in zip((query, key, value), index, strict=True)]
            parts = [torch.empty_like(x) for x in inputs]
            ctx.backward_function(
                _rows(grad, index[0]),
                *inputs,
                _rows(out, index[0]),
                lse if index[0] is None else lse[:, index[0]],
                *parts,
                *call.lengths,
                0.0,
                ctx.scale,
                call.causal,
                -1,
                -1,
                ctx.softcap,
                None,
                False,
            )
            for total, part, rows in zip(totals, parts, index, strict=True):
                total.add_(part) if rows is None else total.index_add_(0, rows, part.to(wide))
        grads = [total.to(x.dtype) for total, x in zip(totals, (query, key, value), strict=True)]
        return (*grads, None, None, None, None)


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _level_kernel(
    functions: tuple[Callable, Callable],
    query: Tensor,  # (1, H, T, D)
    key: Tensor,
    value: Tensor,
    plan: TreePlan,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # (1, T, H, D)
    if window is not None or sinks is not None:
        raise ValueError(
            f"kernel {plan.kernel!r} needs sliding windows no shorter than the longest path, "
            f"{plan.tree.max_length}, and no sinks, got window={window}, sinks={sinks is not None}: "
            "use kernel='flex' or 'sdpa'"
        )
    cache_key = ("levels", query.device)
    if cache_key not in plan.cache:
        plan.cache[cache_key] = level_calls(plan.tree, query.device)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    return LevelAttention.apply(q, k, v, plan.cache[cache_key], scale, softcap or 0.0, functions)[None]


def flash_kernel(*args: Any, **kwargs: Any) -> Tensor:
    """Tree levels by flash-attn 2.7 or newer; half precision on CUDA."""
    try:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(
            "kernel='flash' needs flash-attn >= 2.7 (pip install flash-attn --no-build-isolation), or use kernel='flex'"
        ) from error
    return _level_kernel((flash_attn_varlen_func, _flash_attn_varlen_backward), *args, **kwargs)


def reference_kernel(*args: Any, **kwargs: Any) -> Tensor:
    """Tree levels by `varlen_reference`: checks the merge anywhere."""
    return _level_kernel((varlen_reference, varlen_reference_backward), *args, **kwargs)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:  # (H, n, m)
    scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    n, m = scores.shape[1:]
    hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(1 + m - n)
    return scores.masked_fill(hidden, float("-inf")) if causal else scores


def varlen_reference(
    q: Tensor,  # (Nq, H, D)
    k: Tensor,  # (Nk, Hk, D)
    v: Tensor,  # (Nk, Hk, D)
    cu_seqlens_q: Tensor,  # (B + 1,)
    cu_seqlens_k: Tensor,  # (B + 1,)
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_varlen_func` in plain torch: out (Nq, H, D), with return_attn_probs also lse (H, Nq) and None."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        scores = _scores(q[a:b], k[c:d], scale, causal, softcap)
        lse[:, a:b] = scores.logsumexp(-1)
        values = v[c:d].repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[a:b] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values)
    return (out, lse, None) if return_attn_probs else out


def varlen_reference_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: None,
    deterministic: bool,
) -> None:
    """`_flash_attn_varlen_backward` in plain torch: fills dq, dk, dv from dout and *given* out and logsumexp.

    P = exp(s - lse), dS = P * (dout v^T - rowsum(dout * out)), times 1 - (s / softcap)^2 where scores are capped.
    """
    groups = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        keys, values = (x[c:d].repeat_interleave(groups, 1) for x in (k, v))
        scores = _scores(q[a:b], k[c:d], softmax_scale, causal, softcap)
        p = (scores - softmax_lse[:, a:b, None]).exp()
        dot = (dout[a:b] * out[a:b]).sum(-1).t()[..., None]
        ds = p * (torch.einsum("nhd,mhd->hnm", dout[a:b], values) - dot) * softmax_scale
        if softcap:
            ds = ds * (1 - (scores.masked_fill(scores.isinf(), 0.0) / softcap) ** 2)
        dq[a:b] = torch.einsum("hnm,mhd->nhd", ds, keys)
        shape = (d - c, k.shape[1], groups, k.shape[2])
        dk[c:d] = torch.einsum("hnm,nhd->mhd", ds, q[a:b]).reshape(shape).sum(2)
        dv[c:d] = torch.einsum("hnm,nhd->mhd", p, dout[a:b]).reshape(shape).sum(2)
