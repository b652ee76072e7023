"""What the public functions refuse, and how arguments are brought to one form. No arithmetic on logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import LMHead

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


def alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"expected alpha in [0, 1] (0 forward KL, 1 reverse KL), got {alpha}")


def temperature(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"expected {name} > 0, got {value}")


def hidden(name: str, hidden: Tensor, head: LMHead) -> None:
    if hidden.ndim < 2:
        raise ValueError(f"expected {name} of shape (N, H) or (..., H), got {tuple(hidden.shape)}")
    if hidden.size(-1) != head.weight.size(1):
        raise ValueError(f"expected {name}.size(-1) == {head.weight.size(1)} of its head, got {hidden.size(-1)}")
    if hidden.dtype != head.weight.dtype:
        raise TypeError(f"expected {name} in its head's dtype {head.weight.dtype}, got {hidden.dtype}")
    if hidden.device != head.weight.device:
        raise ValueError(f"expected {name} on its head's device {head.weight.device}, got {hidden.device}")


def flat(name: str, values: Tensor | None, batch: torch.Size) -> Tensor | None:
    if values is not None and values.shape != batch:
        raise ValueError(f"expected {name} of shape {tuple(batch)}, got {tuple(values.shape)}")
    return None if values is None else values.flatten()


def labels(labels: Tensor | None, vocabulary: int) -> None:
    """Reads the labels on CPU only: on an accelerator that would wait for the device."""
    if labels is None:
        return
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"expected integer labels, got {labels.dtype}")
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.numel() == 0:
        return
    low, high = int(labels.min()), int(labels.max())
    if high >= vocabulary or (low < 0 and bool(((labels < 0) & (labels != IGNORE_INDEX)).any())):
        raise ValueError(
            f"expected labels in [0, {vocabulary}) or {IGNORE_INDEX} for tokens to leave out, got [{low}, {high}]"
        )


def common_vocabulary(student: LMHead, teacher: LMHead) -> int:
    """Rows that both sides have; the rest is padding and counts as -inf on both."""
    sizes = [head.vocab_size or head.weight.size(0) for head in (student, teacher)]
    if abs(sizes[0] - sizes[1]) > PADDING_ROWS and student.vocab_size is None and teacher.vocab_size is None:
        raise ValueError(
            f"student head has {sizes[0]} rows and teacher head {sizes[1]}: too far apart to be padding; "
            "if both use one tokenizer, pass LMHead(vocab_size=...) of it"
        )
    return min(sizes)


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
