"""LoRA adapters by peft on a transformers model, whose own weights stay as they are and serve as the teacher's.

The student is the model with the adapter STUDENT. The teacher is the same model without it (frozen), with it (self),
or with the adapter TEACHER, a moving average of STUDENT (ema). Checkpoints hold adapters only, in peft's own files,
which AutoModelForCausalLM.from_pretrained loads on top of the base model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .config import ModelConfig
from .fsdp import local

STUDENT, TEACHER = "default", "teacher"  # "default" is the name that peft's files are loaded under
WEIGHTS = "adapter_model.safetensors"


def add(model: PreTrainedModel, config: ModelConfig, ema: bool, seed: int) -> None:
    """A fresh STUDENT adapter, with an equal TEACHER where the teacher is its moving average."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("model.use_peft needs the peft package: pip install 'mopd[peft]'") from error
    targets: Any = config.lora_target_modules
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)  # the first factor is random, and all processes must draw the same
    model.add_adapter(settings, STUDENT)
    if ema:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are what is wanted
            model.add_adapter(settings, TEACHER)
        for ours, theirs in _pairs(model):
            ours.data.copy_(theirs.data)
        model.set_adapter(STUDENT)


@contextmanager
def as_teacher(model: PreTrainedModel, regularization: str) -> Iterator[None]:
    """Within, without gradients: `model` computes what the teacher does. Nothing happens without adapters."""
    if not getattr(model, "peft_config", None) or regularization == "self":
        yield
        return
    if regularization == "frozen":
        model.disable_adapters()
    else:
        model.set_adapter(TEACHER)
    try:
        yield
    finally:
        model.enable_adapters()
        model.set_adapter(STUDENT)


@torch.no_grad()
def update_ema(model: PreTrainedModel, rate: float) -> None:
    """TEACHER <- (1 - rate) TEACHER + rate STUDENT, each factor by itself."""
    for ours, theirs in _pairs(model):
        local(ours).lerp_(local(theirs), rate)


def _pairs(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """(TEACHER, STUDENT) parameters."""
    found = dict(model.named_parameters())
    return [(found[name.replace(f".{STUDENT}.", f".{TEACHER}.")], found[name]) for name in _names(found)]


def _names(found: dict[str, Any]) -> list[str]:
    return [name for name in found if f".{STUDENT}." in name]


def save(model: PreTrainedModel, weights: dict[str, Tensor], adapter: str, folder: Path) -> None:
    """`weights`: the model's whole state, gathered."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.get_adapter_state_dict(adapter, state_dict=weights)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[adapter].save_pretrained(folder)


def load(model: PreTrainedModel, adapter: str, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter ({WEIGHTS}): it was saved with model.use_peft false")
    result: Any = set_peft_model_state_dict(model, load_file(folder / WEIGHTS), adapter)
    if result.unexpected_keys:
        raise ValueError(f"adapter in {folder} does not fit this model: unexpected {result.unexpected_keys[:3]}")
