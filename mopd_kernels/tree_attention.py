"""Attention over a packed prefix tree, for transformers models.

`tree_attention` and `tree_mask` are registered with transformers' attention and mask interfaces as `NAME`
(tree_forward.py). Every layer calls them with the same `TreePlan`, which holds all masks and indices, so layers build
nothing. Position ids are depths, so rotary embeddings need no change.

Legend: T rows, H query heads, Hk key/value heads, D head size, n query rows of a block, m its keys.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .prefix_tree import PrefixTree

NAME = "mopd_tree"
# Query rows per masked SDPA call. Bounds the mask at CHUNK x (depth + CHUNK) and the waste above the diagonal.
CHUNK = 64


class TreePlan:
    """What the attention of one forward needs, built once: `pieces` cut keys, `blocks` cut queries.

    Keys of a run are the concatenation of `key_pieces[run]`, so they are in path order: key j has depth j, and
    causality and sliding windows become band masks that every run shares.
    """

    def __init__(self, tree: PrefixTree, kernel: str):
        self.tree = tree
        self.kernel = kernel
        self.calls = 0
        self.cache: dict[Any, Any] = {}  # masks and indices by window and dtype, made by the first layer
        self.pieces = [node.stop - node.start for node in tree.nodes]
        starts = [node.start for node in tree.nodes]
        self.key_pieces = []
        for run in tree.runs:
            path = (*run.prefix, (run.start, run.stop))
            nodes = [range(bisect_left(starts, start), bisect_left(starts, stop)) for start, stop in path]
            self.key_pieces.append(list(chain.from_iterable(nodes)))

    def layout(self, window: int | None, like: Tensor) -> tuple[list, list[int], Callable]:
        """(blocks of each run, rows of every block, mask of a block); a block is (depth, rows, low).

        `depth` is that of the first of its `rows` queries, `low` that of its first key; the last key is the last
        query itself. Short blocks skip most of what lies above the diagonal, and keys that left the window.
        """
        key = (window, like.dtype, like.device)
        if key not in self.cache:
            blocks = []
            for run in self.tree.runs:
                stop = run.depth + run.stop - run.start
                blocks.append(
                    [
                        (depth, min(CHUNK, stop - depth), max(0, depth - window + 1) if window else 0)
                        for depth in range(run.depth, stop, CHUNK)
                    ]
                )
            flat = [block for run_blocks in blocks for block in run_blocks]
            self.cache[key] = blocks, [rows for _, rows, _ in flat], _band_masks(flat, window, like)
        return self.cache[key]


def _band_masks(blocks: list[tuple[int, int, int]], window: int | None, like: Tensor) -> Callable:
    """mask(depth, n, low) -> additive (n, depth - low + n): views of one band.

    Row i of a block has depth `depth + i` and key j has depth `low + j`, so the mask depends on j - i - offset with
    offset = depth - low: shifting the columns of the band for the largest offset gives every other block.
    """
    most = max(depth - low for depth, _, low in blocks)
    height = max(rows for _, rows, _ in blocks)
    distance = most + torch.arange(height)[:, None] - torch.arange(most + height)[None, :]
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    band = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf")).to(like.device, like.dtype)

    def mask(depth: int, rows: int, low: int) -> Tensor:
        shift = most - (depth - low)
        return band[:rows, shift : shift + depth - low + rows]

    return mask


def sdpa_kernel(
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, Hk, T, D)
    value: Tensor,  # (1, Hk, T, D)
    plan: TreePlan,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # (H,)
) -> Tensor:  # (1, T, H, D)
    """One SDPA call per block of at most CHUNK rows of a run; gradients by autograd.

    `split` instead of slices: its backward is one concatenation, where every slice would write zeros of full size.
    """
    blocks, block_rows, mask = plan.layout(window, query)
    queries = iter(query.split(block_rows, dim=2))
    keys, values = key.split(plan.pieces, dim=2), value.split(plan.pieces, dim=2)
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for pieces, run_blocks in zip(plan.key_pieces, blocks, strict=True):
        k, v = (_concatenate(x, pieces) for x in (keys, values))
        for depth, rows, low in run_blocks:
            q, attn_mask = next(queries), mask(depth, rows, low)
            kb, vb = (x if (low, depth + rows) == (0, x.shape[2]) else x[:, :, low : depth + rows] for x in (k, v))
            if softcap is None and sinks is None:
                out = F.scaled_dot_product_attention(q, kb, vb, attn_mask=attn_mask, scale=scale, enable_gqa=grouped)
            else:
                out = _softmax_attention(q, kb, vb, attn_mask, scale, softcap, sinks)
            outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _concatenate(pieces: tuple[Tensor, ...], which: list[int]) -> Tensor:
    return pieces[which[0]] if len(which) == 1 else torch.cat([pieces[i] for i in which], dim=2)


def _softmax_attention(
    q: Tensor,  # (1, H, n, D)
    k: Tensor,  # (1, Hk, m, D)
    v: Tensor,  # (1, Hk, m, D)
    mask: Tensor,  # (n, m) additive
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # (H,)
) -> Tensor:  # (1, H, n, D)
    """Attention with what SDPA lacks: scores softcap * tanh(s / softcap), and sinks that add exp(sink) to the
    denominator. Softmax in float32 or wider. Query heads of one key head are folded into rows: no key copies.
    """
    _, heads, n, size = q.shape
    kv_heads, m = k.shape[1], k.shape[2]
    scores = (q.reshape(1, kv_heads, -1, size) @ k.transpose(2, 3)).view(1, heads, n, m) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = (scores + mask).to(torch.promote_types(scores.dtype, torch.float32))
    weights = scores.softmax(-1)
    if sinks is not None:
        lse = scores.logsumexp(-1, keepdim=True)
        weights = weights * torch.sigmoid(lse - sinks.to(scores.dtype).view(1, -1, 1, 1))
    weights = weights.to(v.dtype).view(1, kv_heads, -1, m)
    return (weights @ v).view(1, heads, n, v.shape[-1])


def _flex(*args: Any, **kwargs: Any) -> Tensor:
    from .tree_attention_cuda import flex_kernel

    return flex_kernel(*args, **kwargs)


def _flash(*args: Any, **kwargs: Any) -> Tensor:
    from .tree_attention_cuda import flash_kernel

    return flash_kernel(*args, **kwargs)


def _merged(*args: Any, **kwargs: Any) -> Tensor:
    from .tree_attention_cuda import reference_kernel

    return reference_kernel(*args, **kwargs)


KERNELS: dict[str, Callable[..., Tensor]] = {
    "sdpa": sdpa_kernel,  # every device, every option
    "flex": _flex,  # CUDA default
    "flash": _flash,  # CUDA, half precision, no sliding window
    "reference": _merged,  # what "flash" does, in plain torch
}


class TreeMask:
    """Stands where transformers puts an attention mask: which layers slide, and by how much.

    Not a tensor on purpose: an attention function that is not ours fails on it instead of attending wrongly.
    """

    def __init__(self, window: int | None):
        self.window = window


def tree_mask(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> TreeMask:
    """transformers' mask interface. `use_vmap` says that the model changes the causal pattern itself: refused."""
    if use_vmap:
        raise ValueError("this model alters its causal mask, and a prefix tree cannot follow that: run it without tree")
    return TreeMask(local_size)


def tree_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, Hk, T, D)
    value: Tensor,  # (1, Hk, T, D)
    attention_mask: TreeMask,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree_plan: TreePlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: softmax(scaling * q k^T) v over the ancestors of each row and itself.

    Returns (1, T, H, D) and no weights. ValueError for attention dropout and position biases.
    """
    if tree_plan is None or not isinstance(attention_mask, TreeMask):
        raise ValueError(
            f"attention implementation {NAME!r} only runs inside PrefixTree.forward, "
            f"got tree_plan={type(tree_plan).__name__}, mask={type(attention_mask).__name__}"
        )
    if dropout or kwargs.get("position_bias") is not None:
        raise ValueError(
            "a prefix tree needs attention dropout 0 and no position bias, "
            f"got dropout={dropout}, position_bias={kwargs.get('position_bias') is not None}"
        )
    plan, window = tree_plan, attention_mask.window
    plan.calls += 1
    if window is not None and window >= plan.tree.max_length:
        window = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = KERNELS[plan.kernel](query, key, value, plan, window=window, scale=scale, softcap=softcap, sinks=s_aux)
    return out, None
