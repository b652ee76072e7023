"""What the public functions refuse, and how arguments are brought to one form. No arithmetic on logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import Execution, LMHead

IGNORE_INDEX = -100
PADDING_ROWS = 1024  # vocabularies that differ by no more are taken for padded copies of one another


def as_head(head: LMHead | Tensor) -> LMHead:
    if isinstance(head, LMHead):
        return head
    if isinstance(head, Tensor):
        return LMHead(head)
    raise TypeError(f"expected an LMHead or a weight tensor (V, H), got {type(head).__name__}")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"expected {name} in {allowed}, got {value!r}")


def between(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"expected {name} in [0, 1] (0 forward KL, 1 reverse KL), got {value}")


def positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"expected {name} > 0 and finite, got {value}")


def normalizer(value: float | Tensor | None) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"expected a number as normalizer, got shape {tuple(value.shape)}")
    if value is not None and (not isinstance(value, Tensor) or _readable(value)):
        positive("normalizer", value if isinstance(value, (int, float)) else value.item())


def top_k(value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"expected top_k to be an integer, or None for the full vocabulary, got {value!r}")
    if value is not None and value < 1:
        raise ValueError(f"expected top_k >= 1, or None for the full vocabulary, got {value}")


def save(execution: Execution, reduction: str, dtype: torch.dtype) -> str:
    """Execution.save with "auto" resolved. float16: a gradient taken before the loss scale arrives underflows."""
    if execution.save == "auto":
        return "statistics" if reduction == "none" or dtype == torch.float16 else "gradients"
    if reduction == "none" and execution.save == "gradients":
        raise ValueError('Execution.save="gradients" needs a scalar loss, got reduction="none": use "statistics"')
    return execution.save


def hidden(name: str, hidden: Tensor, head: LMHead) -> None:
    if hidden.ndim < 2:
        raise ValueError(f"expected {name} of shape (N, H) or (..., H), got {tuple(hidden.shape)}")
    if hidden.size(-1) != head.weight.size(1):
        raise ValueError(f"expected {name}.size(-1) == {head.weight.size(1)} of its head, got {hidden.size(-1)}")
    if hidden.dtype != head.weight.dtype:
        raise TypeError(
            f"expected {name} in its head's dtype {head.weight.dtype}, got {hidden.dtype}: cast one to the other"
        )
    if hidden.device != head.weight.device:
        raise ValueError(f"expected {name} on its head's device {head.weight.device}, got {hidden.device}")


def one_kind(student_hidden: Tensor, teacher_hidden: Tensor) -> None:
    """Both sides' logits share buffers, so they share dtype and device."""
    if teacher_hidden.dtype != student_hidden.dtype:
        raise TypeError(
            f"expected teacher_hidden in the student's dtype {student_hidden.dtype}, got {teacher_hidden.dtype}: cast "
            f"it and its head's weight and bias with .to({student_hidden.dtype}), once while the teacher stands still"
        )
    beside("teacher_hidden", teacher_hidden, student_hidden)


def beside(name: str, values: Tensor, hidden: Tensor) -> None:
    if values.device != hidden.device:
        raise ValueError(f"expected {name} on the hidden states' device {hidden.device}, got {values.device}")


def flat(name: str, values: Tensor | None, hidden: Tensor) -> Tensor | None:
    """One value a token of `hidden`, flattened."""
    if values is None:
        return None
    if values.shape != hidden.shape[:-1]:
        raise ValueError(f"expected {name} of shape {tuple(hidden.shape[:-1])}, got {tuple(values.shape)}")
    beside(name, values, hidden)
    return values.flatten()


def token_weights(weights: Tensor | None) -> None:
    if weights is not None and weights.requires_grad:
        raise ValueError('token_weights are constants here: detach them, or weight the result of reduction="none"')


def labels(labels: Tensor, vocabulary: int) -> Tensor:
    """As int64."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected integer labels, got {labels.dtype}")
    labels = labels.long()
    if not _readable(labels):
        return labels
    low, high = int(labels.min()), int(labels.max())
    if high >= vocabulary or (low < 0 and bool(((labels < 0) & (labels != IGNORE_INDEX)).any())):
        raise ValueError(
            f"expected labels in [0, {vocabulary}) or {IGNORE_INDEX} for tokens to leave out, got [{low}, {high}]"
        )
    return labels


def contexts(
    teacher_hidden: Tensor,  # (..., Ht) or (K, ..., Ht)
    weights: Tensor | None,  # (K,) or (K, ...)
    batch: torch.Size,
    kept: Tensor | None = None,  # (N,) bool, the tokens that count; None for all
) -> tuple[Tensor, Tensor | None]:
    """Teacher inputs (K, N, Ht), and weights (K, N) that sum to 1 over K, or None where K = 1.

    Weights are refused where one is negative or not finite, or where a token that counts has a sum of 0. An
    accelerator's are not looked at; such tokens are NaN there.
    """
    if teacher_hidden.shape[:-1] == batch:
        if weights is not None:
            raise ValueError(
                f"context_weights need teacher_hidden (K, {', '.join(map(str, batch))}, Ht), "
                f"got {tuple(teacher_hidden.shape)}"
            )
        return teacher_hidden.flatten(0, -2)[None], None
    if teacher_hidden.shape[1:-1] != batch:
        raise ValueError(
            f"expected teacher_hidden of the student's tokens {tuple(batch)}, or (K, *) of them, "
            f"got {tuple(teacher_hidden.shape[:-1])}"
        )
    count = teacher_hidden.size(0)
    if count == 0:
        raise ValueError("expected at least one context, got teacher_hidden of shape (0, ...)")
    flat_hidden = teacher_hidden.flatten(1, -2)
    if weights is None:
        tokens = flat_hidden.size(1)
        return flat_hidden, None if count == 1 else teacher_hidden.new_full((count, tokens), 1 / count).double()
    beside("context_weights", weights, teacher_hidden)
    return flat_hidden, _context_weights(weights, count, batch, kept)


def _context_weights(weights: Tensor, count: int, batch: torch.Size, kept: Tensor | None) -> Tensor | None:
    if weights.shape not in ((count,), (count, *batch)):
        raise ValueError(
            f"expected context_weights of shape ({count},) or {(count, *batch)}, got {tuple(weights.shape)}"
        )
    if weights.requires_grad:
        raise ValueError("context_weights are constants here: detach them")
    if _readable(weights) and not bool((weights >= 0).all() & weights.isfinite().all()):
        raise ValueError(f"expected context_weights >= 0 and finite, got a minimum of {float(weights.min())}")
    weights = weights.reshape(count, -1).expand(count, batch.numel()).double()
    total = weights.sum(0)
    if _readable(total):
        without = (total == 0) if kept is None else (total == 0) & kept
        if bool(without.any()):
            raise ValueError(
                "expected context_weights with a sum > 0 for every token, got 0 for "
                f"{int(without.sum())} of {batch.numel()}: give such tokens token_weights of 0 to leave them out"
            )
    return None if count == 1 else weights / total


def _readable(values: Tensor) -> bool:
    """Values are looked at on CPU only: on an accelerator that would wait for the device."""
    return values.device.type == "cpu" and values.numel() > 0 and not torch.compiler.is_compiling()


def common_vocabulary(student: LMHead, teacher: LMHead) -> int:
    """Rows that both sides have; the rest is padding and counts as -inf on both. Far fewer rows on one side than on
    the other are taken for its tokenizer's only where its vocab_size says so."""
    sizes = [head.vocab_size or head.weight.size(0) for head in (student, teacher)]
    smaller = student if sizes[0] <= sizes[1] else teacher
    if student.shard is not None or teacher.shard is not None:
        _same_shard(student, teacher, min(sizes))
    elif abs(sizes[0] - sizes[1]) > PADDING_ROWS and smaller.vocab_size is None:
        raise ValueError(
            f"student head has {sizes[0]} rows and teacher head {sizes[1]}: too far apart to be padding; "
            "if both use one tokenizer, pass LMHead(vocab_size=...) of it for both"
        )
    return min(sizes)


def _same_shard(student: LMHead, teacher: LMHead, vocabulary: int) -> None:
    if student.shard is None or teacher.shard is None or student.shard.group is not teacher.shard.group:
        raise ValueError(
            f"expected student and teacher head split over one process group, got {student.shard} and {teacher.shard}"
        )
    held = [
        (head.shard.start, min(vocabulary, head.shard.start + head.weight.size(0)))
        for head in (student, teacher)
        if head.shard is not None
    ]
    if held[0] != held[1] and any(start < stop for start, stop in held):
        raise ValueError(
            f"expected both heads to hold the same rows of the {vocabulary} of the vocabulary, got student "
            f"{held[0]} and teacher {held[1]}; pad or split one of them like the other"
        )


def needs_grad(hidden: Tensor, head: LMHead) -> list[bool]:
    bias = head.bias is not None and head.bias.requires_grad
    enabled = torch.is_grad_enabled()
    return [enabled and hidden.requires_grad, enabled and head.weight.requires_grad, enabled and bias]


def denominator(
    normalizer: float | Tensor | None, labels: Tensor | None, weights: Tensor | None, loss: Tensor, hidden: Tensor
) -> float | Tensor:
    if normalizer is not None:
        return normalizer
    if weights is None and labels is None:
        return max(1, hidden.shape[:-1].numel())
    return kept_mask(labels, weights).sum().clamp(min=1).to(loss.dtype)  # type: ignore[union-attr]


def kept_mask(labels: Tensor | None, weights: Tensor | None) -> Tensor | None:
    mask = None if labels is None else labels != IGNORE_INDEX
    if weights is None:
        return mask
    return weights != 0 if mask is None else mask & (weights != 0)
