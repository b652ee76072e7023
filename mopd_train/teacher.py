"""The teacher: a model that reads peers, scored without gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import DistillationConfig, ModelConfig
from .fsdp import local
from .models import check_same_tokenizer, load_model, load_tokenizer


def build_teacher(
    config: DistillationConfig,
    model: ModelConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    load: Callable[[str], PreTrainedModel] | None = None,  # by name; the default is a plain load beside the student
) -> PreTrainedModel:
    """ema: a copy that `update_ema` moves; frozen: a model that stays; self: the student itself. With an adapter all
    three share the student's weights (adapters.py)."""
    if config.teacher_regularization == "self" or model.use_peft:
        return student
    name = config.teacher_model_name_or_path
    if name is not None:
        check_same_tokenizer(tokenizer, load_tokenizer(name), name)
    name = name or model.model_name_or_path
    plain = partial(load_model, dtype=model.dtype, attn_implementation=model.attn_implementation, device=student.device)
    teacher = (load or plain)(name)
    return teacher.requires_grad_(False)


@torch.no_grad()
def update_ema(teacher: PreTrainedModel, student: PreTrainedModel, rate: float) -> None:
    """teacher <- (1 - rate) teacher + rate student, parameter by parameter; tied ones once."""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        local(ours).lerp_(local(theirs).to(ours.dtype), rate)  # under FSDP each process moves its shard
