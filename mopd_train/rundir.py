"""The output folder of a run: who owns it, its metrics, its trackers."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import Config
from .files import read_json, read_jsonl, write_json, write_jsonl

logger = logging.getLogger(__name__)

RUN = "run.json"
METRICS = "metrics.jsonl"
PLOT = "training.png"  # drawn last: with it a run is complete
OF_THE_END = (PLOT, "evaluation-after.json", "completions-after.jsonl")
MAY_CHANGE = {
    "max_steps",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "report_to",
    "output_dir",
    "sharding",
    "vocab_parallel",
    "ddp_timeout",
    "push_to_hub",
    "hub_model_id",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_gpu_memory_utilization",
    "vllm_weights_dir",
}


def check(config: Config, resuming: bool) -> Path:
    """The folder, untouched. FileExistsError if it holds another run and neither resuming nor overwriting."""
    folder = Path(config.training.output_dir)
    # A run that was killed while it wrote its first file left nothing but that.
    if folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir()):
        if not (folder / RUN).is_file():
            raise FileExistsError(f"training.output_dir={folder} is not empty and holds no run: choose another folder")
        if resuming:
            _warn_of_changes(read_json(folder / RUN), config.as_dict())
        elif not config.training.overwrite_output_dir:
            raise FileExistsError(
                f"training.output_dir={folder} holds another run: choose another folder, go on with it by "
                "--training.resume_from_checkpoint latest, or replace it by --training.overwrite_output_dir true"
            )
    return folder


def claim(folder: Path, config: Config, resuming: bool, resume: Path | None) -> None:
    """Make the checked folder ours, once nothing else can be refused: what it held is deleted if it is overwritten.

    resume: the checkpoint to go on from. Where steps are still to be done, or others were done after it, the run is
    complete no longer: what was made at its end goes, the plot first.
    """
    if not resuming and (folder / RUN).is_file():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    abandoned = checkpoint.set_aside_later(folder, resume)
    if abandoned or resume is None or checkpoint.step_of(resume) < config.training.max_steps:
        for name in OF_THE_END:
            (folder / name).unlink(missing_ok=True)
    write_json(folder / RUN, config.as_dict())


def _warn_of_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    started = flat(before)
    for key, value in flat(now).items():
        if started.get(key) != value and key.rsplit(".", 1)[-1] not in MAY_CHANGE:
            logger.warning("resuming with %s=%r, the run began with %r", key, value, started.get(key))


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """section.key: value; settings without a section as they are."""
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    return plain | {f"{section}.{key}": value for section, fields in sections.items() for key, value in fields.items()}


class MetricsFile:
    """metrics.jsonl: one line a step, on disk before the next step begins."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Lines of steps that will be run again are dropped."""
        self.path = folder / METRICS
        kept = [row for row in read_jsonl(self.path) if row["step"] <= first_step] if self.path.is_file() else []
        write_jsonl(self.path, kept)
        self.handle = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def write(self, row: dict[str, Any]) -> None:
        self.handle.write(json.dumps(row) + "\n")
        self.handle.flush()
        os.fsync(self.handle.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.close()
