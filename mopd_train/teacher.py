"""The teacher: a model that reads peers, scored without gradients."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import DistillationConfig, ModelConfig
from .models import check_same_tokenizer, load_model, load_tokenizer


def build_teacher(
    config: DistillationConfig,
    model: ModelConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """ema: a copy that `update_ema` moves; frozen: a model that stays; self: the student itself."""
    if config.teacher_regularization == "self":
        return student
    name = config.teacher_model_name_or_path
    if name is not None:
        check_same_tokenizer(tokenizer, load_tokenizer(name), name)
    teacher = load_model(name or model.model_name_or_path, model.dtype, model.attn_implementation)
    return teacher.requires_grad_(False).to(student.device)


@torch.no_grad()
def update_ema(teacher: PreTrainedModel, student: PreTrainedModel, rate: float) -> None:
    """teacher <- (1 - rate) teacher + rate student, parameter by parameter; tied ones once."""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.lerp_(theirs.to(ours.dtype), rate)
