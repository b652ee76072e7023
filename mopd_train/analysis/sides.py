"""Which models an analysis works with: the student that samples and the teacher that scores."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config
from ..files import read_json
from ..models import check_same_tokenizer, load_model, load_tokenizer, resolve
from ..rundir import RUN

logger = logging.getLogger(__name__)


def tokenizer_of(name_or_path: str) -> PreTrainedTokenizerBase:
    """A checkpoint's teacher/ has weights only: its tokenizer is the checkpoint's."""
    path = Path(resolve(name_or_path))
    bare = path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return load_tokenizer(str(path.parent) if bare else name_or_path)


def teacher_name(config: Config) -> str:
    """The teacher that training uses or used: the frozen one named, else the one the checkpoint holds, else the
    model itself with the peers in its prompt."""
    if config.distillation.teacher_model_name_or_path is not None:
        return config.distillation.teacher_model_name_or_path
    kept = Path(resolve(config.model.model_name_or_path)) / "teacher"
    return str(kept) if kept.is_dir() else config.model.model_name_or_path


def load_teacher(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    name, model = teacher_name(config), config.model
    if config.distillation.teacher_model_name_or_path is not None:
        check_same_tokenizer(tokenizer, tokenizer_of(name), name)
    return load_model(name, model.dtype, model.attn_implementation, "cuda" if torch.cuda.is_available() else "cpu")


def warn_of_other_settings(config: Config, paths: list[Path]) -> None:
    """One warning for each setting that a teacher prompt or a score depends on and that is not as in the run which
    the paths (rollouts, checkpoint) lie in."""
    runs = [folder / RUN for path in paths for folder in (path, *path.parents[:2]) if (folder / RUN).is_file()]
    if not runs:
        return
    before, now = read_json(runs[0]), config.as_dict()
    for section, key in _decisive(now):
        old, new = before.get(section, {}).get(key), now[section][key]
        if old != new:
            logger.warning(
                "%s.%s=%r, the run was trained with %r: --config %s takes its settings", section, key, new, old, runs[0]
            )


def _decisive(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Every setting of the context; and the scale of the scores, the chat template, the seed of the peers."""
    others = [("rollout", "temperature"), ("data", "chat_template_kwargs"), ("training", "seed")]
    return [("context", key) for key in settings["context"]] + others
