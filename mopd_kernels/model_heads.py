"""The output head of a transformers model: weight, bias, softcap, scale; LoRA and split weights.

Legend: V vocabulary, H hidden, r rank, P ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .spec import LMHead, VocabShard

# What models call the bound of their logits: Gemma and many after it, RecurrentGemma, xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# What models call the factor between lm_head and softcap: Cohere, Falcon-H1, Muse; Granite and MiniCPM3 divide.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISOR = "logits_scaling"
DIVISOR_MULTIPLIES = ("hyperclovax", "hyperclovax_vision_v2")  # take "logits_scaling" as a factor
SCALE_UNUSED = ("mpt",)  # its configuration has a logit_scale that its model ignores


def head_of(model: Any) -> LMHead:
    """See LMHead.from_model."""
    model = unwrapped(model, "get_output_embeddings")
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight, bias = _parameters(model, module)
    config = model.config.get_text_config()
    weight, bias, shard, vocab_size = _local(model, weight, bias)
    return LMHead(
        weight=weight,
        bias=bias,
        softcap=softcap_of(config),
        scale=_scale(config),
        vocab_size=vocab_size,
        shard=shard,
    )


def unwrapped(model: Any, method: str) -> Any:
    """The model itself, out of wrappers such as DDP that have a `module` in the place of the method."""
    while not hasattr(model, method) and hasattr(model, "module"):
        model = model.module
    return model


def softcap_of(config: Any) -> float | None:
    """The bound that a model of this text configuration puts on its logits, by tanh; None without one."""
    return next((cap for name in SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)


def _scale(config: Any) -> float:
    kind = getattr(config, "model_type", "")
    factor = 1.0
    if kind not in SCALE_UNUSED:
        for name in MULTIPLIERS:
            factor *= getattr(config, name, None) or 1.0
    divisor = getattr(config, DIVISOR, None) or 1.0
    return factor * divisor if kind in DIVISOR_MULTIPLIES else factor / divisor


def _parameters(model: Any, module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the head as the model applies it, adapters included."""
    if hasattr(module, "modules_to_save"):  # peft: a trained copy stands in for the original
        module = module.modules_to_save[_only(module.active_adapters)]
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        return _with_lora(module)
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no Linear lm_head (get_output_embeddings() gave {type(module).__name__}); "
            "load it with AutoModelForCausalLM, or build LMHead(weight, bias) yourself"
        )
    return module.weight, module.bias


def _only(adapters: list[str]) -> str:
    if len(adapters) != 1:
        raise ValueError(f"expected one active adapter with a trained lm_head, got {adapters}")
    return adapters[0]


def _with_lora(module: Any) -> tuple[Tensor, Tensor | None]:
    """W + s B A of every active adapter, with gradients to A and B; s B A is formed once, (V, H).

    Refused where the adapted head is not one matrix: DoRA and other variants, and dropout on the adapter's input.
    """
    weight, bias = module.base_layer.weight, module.base_layer.bias
    if not weight.is_floating_point():
        raise ValueError(f"the lm_head under LoRA is quantised ({weight.dtype}): exclude it with lora target_modules")
    if module.merged or module.disable_adapters:
        return weight, bias
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        if getattr(module, "lora_variant", {}).get(adapter) is not None:
            raise ValueError(f"the LoRA variant of adapter {adapter!r} on lm_head is not one matrix: use plain LoRA")
        if module.training and getattr(module.lora_dropout[adapter], "p", 0) > 0:
            raise ValueError(
                f"adapter {adapter!r} has lora_dropout={module.lora_dropout[adapter].p} on lm_head, which a merged "
                "weight cannot apply: set lora_dropout=0, or leave lm_head out of target_modules"
            )
        weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
        if module.lora_bias.get(adapter):
            extra = module.lora_B[adapter].bias * module.scaling[adapter]
            bias = extra if bias is None else bias + extra
    return weight, bias


def _local(model: Any, weight: Any, bias: Any) -> tuple[Tensor, Tensor | None, VocabShard | None, int | None]:
    """A DTensor split over the vocabulary becomes this rank's part and its VocabShard."""
    if not hasattr(weight, "placements"):
        return weight, bias, None, None
    if _is_fully_sharded(model):
        raise ValueError(
            "the lm_head is sharded by FSDP, whose ranks hold different tokens: call the loss inside the model's "
            "forward, or model.unshard() before LMHead.from_model (its weight is a plain tensor then and FSDP still "
            "reduces the gradient)"
        )
    mesh, placements = weight.device_mesh, weight.placements
    if all(placement.is_replicate() for placement in placements):
        return weight.to_local(), None if bias is None else bias.to_local(), None, None
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"expected an lm_head split over the vocabulary, [Shard(0)] on a mesh of 1 dimension, got {placements} on "
            f"{mesh}; pass LMHead(weight.full_tensor()), or LMHead(local_weight, shard=VocabShard(start, group))"
        )
    vocabulary, local = weight.size(0), weight.to_local()
    start = min(vocabulary, mesh.get_local_rank() * -(-vocabulary // mesh.size()))  # as torch.chunk cuts
    if bias is not None:
        bias = bias.to_local() if hasattr(bias, "placements") else bias[start : start + local.size(0)]
    return local, bias, VocabShard(start, mesh.get_group()), vocabulary


def _is_fully_sharded(model: Any) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule  # only where a DTensor was met: the import is slow

    return any(isinstance(module, FSDPModule) for module in model.modules())
