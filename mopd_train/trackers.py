"""Trackers beside metrics.jsonl, and the upload at the end: checked before any work, used by the main process."""

from __future__ import annotations

import importlib.util
import secrets
from pathlib import Path
from typing import Any

from .config import Config, TrainingConfig
from .files import read_json, write_json

PROJECT = "mopd"  # of wandb and trackio
IDENTITY = "tracking.json"
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


def identity(folder: Path) -> str:
    """What wandb and trackio know this run by: drawn once and kept in its folder, so a resumed run goes on there."""
    path = folder / IDENTITY
    if not path.is_file():
        write_json(path, {"id": f"{folder.resolve().name}-{secrets.token_hex(4)}"})
    return str(read_json(path)["id"])


def build(config: Config, first_step: int, run_id: str) -> list[Any]:
    """accelerate's trackers. Tensorboard drops what an interrupted run wrote past `first_step`."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker

    folder = config.training.output_dir
    own: dict[str, dict[str, Any]] = {
        "wandb": {"id": run_id, "name": Path(folder).resolve().name, "dir": folder},
        "trackio": {"name": run_id},
    }
    built: list[Any] = []
    for name in config.training.report_to:
        if name == "tensorboard":
            built.append(TensorBoardTracker("tensorboard", folder, purge_step=first_step + 1))
        elif name != "jsonl":
            built.append(LOGGER_TYPE_TO_CLASS[name](PROJECT, config=config.as_dict(), resume="allow", **own[name]))
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
