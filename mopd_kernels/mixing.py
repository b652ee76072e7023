"""Teachers that mix logits: mixing is linear, so they are mixtures of hidden states and heads, at no extra kernel.

Legend: V vocabulary, H hidden, r rate, γ contrast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import LMHead


def contrastive_hidden(
    head: LMHead,
    success: Tensor,  # (..., H)
    failure: Tensor,  # (..., H)
    contrast: float,
) -> Tensor:  # (..., H)
    """Hidden states whose logits under `head` are (1 + γ) z_success - γ z_failure.

    The bias comes out once: (1 + γ) b - γ b = b. Refused for a head with a softcap, which is not linear.
    """
    _linear("head", head)
    if success.shape != failure.shape:
        raise ValueError(f"expected failure of shape {tuple(success.shape)}, got {tuple(failure.shape)}")
    return torch.lerp(failure, success, 1 + contrast)


def trust_region_teacher(
    reference_head: LMHead,
    reference_hidden: Tensor,  # (..., Hr)
    student_head: LMHead,
    student_hidden: Tensor,  # (..., Hs)
    rate: float,
    *,
    mixed_head: LMHead | None = None,  # of an earlier call with the same heads and rate
) -> tuple[LMHead, Tensor]:  # a head (V, Hr + Hs) and its input (..., Hr + Hs)
    """A teacher with the logits (1 - r) z_reference + r z_student, as one head and its hidden states.

    Both are constants. Two heads of one weight stay one head (V, H) of mixed hidden states. The wide weight is a
    copy: hand the head back as `mixed_head` while the weights stay. Refused for heads with a softcap or of
    different shards.
    """
    for name, head in (("reference_head", reference_head), ("student_head", student_head)):
        _linear(name, head)
    if not 0 <= rate <= 1:
        raise ValueError(f"expected rate in [0, 1], got {rate}")
    if reference_head.shard != student_head.shard:
        raise ValueError(f"expected heads of one shard, got {reference_head.shard} and {student_head.shard}")
    factors = (1 - rate) * reference_head.scale, rate * student_head.scale
    parts = factors[0] * reference_hidden.detach(), factors[1] * student_hidden.detach()
    one_weight = reference_head.weight.data_ptr() == student_head.weight.data_ptr()
    hidden = parts[0] + parts[1] if one_weight else torch.cat(parts, -1)
    if mixed_head is not None:
        return mixed_head, hidden
    sizes = [head.vocab_size or head.weight.size(0) for head in (reference_head, student_head)]
    rows = min(reference_head.weight.size(0), student_head.weight.size(0))
    weights = [head.weight.detach()[:rows] for head in (reference_head, student_head)]
    weight = weights[0] if one_weight else torch.cat(weights, 1)
    bias = _mixed_bias(reference_head, student_head, factors, rows)
    return LMHead(weight, bias, vocab_size=min(sizes), shard=reference_head.shard), hidden


def _mixed_bias(first: LMHead, second: LMHead, factors: tuple[float, float], rows: int) -> Tensor | None:
    terms = [
        factor * head.bias.detach()[:rows]
        for head, factor in zip((first, second), factors, strict=True)
        if head.bias is not None
    ]
    return sum(terms[1:], terms[0]) if terms else None


def _linear(name: str, head: LMHead) -> None:
    if head.softcap is not None:
        raise ValueError(f"expected {name} without a softcap, whose logits do not mix linearly, got {head.softcap}")
