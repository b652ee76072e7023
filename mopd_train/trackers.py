"""Trackers beside metrics.jsonl, and the upload at the end: checked before any work, used by the main process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .config import TrainingConfig

PROJECT = "mopd"  # of wandb and trackio
UPLOADED_NEVER = ("optimizer/*", "teacher/*", "trainer_state.json")


def check(settings: TrainingConfig) -> None:
    """ImportError for a tracker that is not installed, ValueError for a push without a token."""
    for name in settings.report_to:
        if name != "jsonl" and importlib.util.find_spec(name) is None:
            raise ImportError(f"training.report_to={name} needs its package: pip install {name}, or leave it out")
    if settings.push_to_hub:
        from huggingface_hub import get_token

        if get_token() is None:
            raise ValueError(
                "training.push_to_hub needs a token of the Hugging Face hub: run `hf auth login`, set HF_TOKEN, or set "
                "training.push_to_hub false"
            )


def build(settings: TrainingConfig, first_step: int) -> list[Any]:
    """accelerate's trackers. Tensorboard drops what an interrupted run wrote past `first_step`."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker

    built: list[Any] = []
    for name in settings.report_to:
        if name == "tensorboard":
            built.append(TensorBoardTracker("tensorboard", settings.output_dir, purge_step=first_step + 1))
        elif name != "jsonl":
            built.append(LOGGER_TYPE_TO_CLASS[name](PROJECT))
    return built


def push(settings: TrainingConfig, checkpoint: Path) -> str:
    """Upload the student of a checkpoint; the address of its repository."""
    from huggingface_hub import HfApi

    hub = HfApi()
    repository = hub.create_repo(settings.hub_model_id or Path(settings.output_dir).resolve().name, exist_ok=True)
    hub.upload_folder(
        repo_id=repository.repo_id,
        folder_path=checkpoint,
        ignore_patterns=list(UPLOADED_NEVER),
        commit_message=f"mopd {checkpoint.name}",
    )
    return str(repository)
