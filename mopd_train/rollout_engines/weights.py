"""The student's weights as an engine loads them: whole, merged, by the names of the plain model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..fsdp import release

FILE_BYTES = 2**32  # of weights a file: bounds what is on the CPU at once

WRAPPERS = re.compile(r"^base_model\.model\.|\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)")  # of peft


@torch.no_grad()
def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of every weight and saved buffer, one at a time.

    Tied weights come under each of their names: vLLM keeps its own copy of a tied head, which would stay stale.
    LoRA: W + scaling * B A, computed beside the base weights; merging into them and back would leave rounding
    behind in every step. Sharded tensors (FSDP2, tensor parallel) are gathered: all processes have to iterate.
    """
    release(model)
    modules = dict(model.named_modules())
    for key, tensor in model.state_dict().items():
        if "lora_" in key or ".original_module." in key:
            continue
        path, _, leaf = key.rpartition(".")
        layer = modules.get(path.removesuffix(".base_layer"))
        if leaf == "weight" and hasattr(layer, "get_delta_weight"):
            tensor = _merged(layer, tensor, path)
        name = WRAPPERS.sub("", key)
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _merged(layer: Any, weight: Tensor, path: str) -> Tensor:
    for adapter in layer.active_adapters:
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            raise ValueError(
                f"adapter {adapter!r} of {path} is not plain LoRA (DoRA, bias, ...): vLLM gets W + BA only"
            )
        weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


def save_weights(model: PreTrainedModel, folder: Path, write: bool) -> None:
    """The weights as safetensors files in `folder`. write=False only takes part in the gathering."""
    pending: dict[str, Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        files += 1
        save_file(pending, folder / f"model-{files:05d}.safetensors")
        pending.clear()

    for name, tensor in named_weights(model):
        if write:
            # A copy: safetensors refuses two names of one storage, which tied weights are.
            pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
            if sum(t.nbytes for t in pending.values()) >= FILE_BYTES:
                flush()
    if pending:
        flush()
