"""Which models an analysis works with: the student that samples and the teacher that scores."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import checkpoint
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
    """The teacher that training uses or used, by distillation.teacher_regularization: the one named; of a run's
    checkpoint the moving average in it (ema), itself (self) or the run's first model (frozen); of another model itself,
    with the peers in its prompt, which is what all of them begin as.

    ValueError where a checkpoint's teacher is no single model (trust-region) or cannot be found (frozen).
    """
    settings, name = config.distillation, config.model.model_name_or_path
    if settings.teacher_model_name_or_path is not None:
        return settings.teacher_model_name_or_path
    folder = Path(resolve(name))
    if settings.teacher_regularization == "ema" and (folder / checkpoint.TEACHER).is_dir():
        return str(folder / checkpoint.TEACHER)
    if settings.teacher_regularization in ("ema", "self") or not (folder / checkpoint.STATE).is_file():
        return name
    if settings.teacher_regularization == "trust-region":
        raise ValueError(
            f"the trust-region teacher of {name} mixes the logits of two models, and one is scored here: "
            "--distillation.teacher_regularization frozen takes the run's first model, self the checkpoint"
        )
    run = folder.parent / RUN
    if not run.is_file():
        raise ValueError(
            f"{name} was trained by a frozen teacher, which checkpoints do not hold, and there is no {run} to name the "
            "first model: name it with --distillation.teacher_model_name_or_path"
        )
    return str(read_json(run)["model"]["model_name_or_path"])


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
    """Every setting of the context; and the scale of the scores, the teacher, the chat template, the seed of the
    peers."""
    others = [("rollout", "temperature"), ("data", "chat_template_kwargs"), ("training", "seed")]
    names = ("teacher_temperature", "teacher_regularization", "teacher_model_name_or_path")
    others += [("distillation", name) for name in names]
    return [("context", key) for key in settings["context"]] + others
