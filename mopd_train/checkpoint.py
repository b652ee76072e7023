"""Checkpoints: whole or absent, loadable by transformers, enough to go on bit for bit.

checkpoint-<step>/              the student, as AutoModelForCausalLM.from_pretrained reads it, and its tokenizer
                  teacher/      the EMA teacher, the same way (only where the teacher moves)
                  state/        optimizer, scheduler and random states (accelerate)
                  trainer_state.json   step, which is also the data position
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .files import fsync_folder, fsync_tree, read_json, write_json

logger = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(read_json(path / STATE)["step"])


def find_resume(requested: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to go on from: "latest" of this run (None if it has none yet), or the folder named."""
    if requested is None:
        return None
    if requested == "latest":
        found = checkpoints(output_dir)
        if not found:
            logger.warning("no checkpoint in %s yet: starting from the beginning", output_dir)
        return found[-1] if found else None
    path = Path(requested)
    if not (path / STATE).is_file():
        raise FileNotFoundError(
            f"training.resume_from_checkpoint={requested!r} is no complete checkpoint (it has no {STATE}); "
            f"{output_dir} holds {[p.name for p in checkpoints(output_dir)]}"
        )
    return path


def keep_weights_out(accelerator: Accelerator) -> None:
    """accelerate's state would hold the student a second time."""
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def save(
    output_dir: Path,
    step: int,
    accelerator: Accelerator,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,  # None: not part of the state
    tokenizer: PreTrainedTokenizerBase,
    keep: int,
) -> Path:
    """Write beside, flush, rename, and only then delete the oldest beyond `keep`. A full disk leaves the
    earlier checkpoints as they were."""
    target = output_dir / f"checkpoint-{step}"
    staging = output_dir / f"checkpoint-{step}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        student.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if teacher is not None:
            teacher.save_pretrained(staging / "teacher")
        accelerator.save_state(str(staging / "state"))
        write_json(staging / STATE, {"step": step})
        fsync_tree(staging)
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        last = checkpoints(output_dir)
        raise RuntimeError(
            f"checkpoint of step {step} could not be written to {output_dir}: {error}; free space or set "
            f"training.output_dir elsewhere; last complete checkpoint: {last[-1] if last else 'none'}"
        ) from error
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    fsync_folder(output_dir)
    for old in checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return target


def check_space(output_dir: Path, student: PreTrainedModel, teacher_saved: bool, keep: int) -> None:
    """OSError before training if the disk cannot hold the checkpoints kept and the one being written."""
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    one = weights * (4 if teacher_saved else 3)  # student, two Adam moments, teacher
    needed, free = one * (keep + 1), shutil.disk_usage(_existing(output_dir)).free
    if free < needed:
        raise OSError(
            f"{output_dir} has {free / 1e9:.1f} GB free, {keep + 1} checkpoints take {needed / 1e9:.1f} GB: free "
            "space, lower training.save_total_limit or choose another training.output_dir"
        )


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that is there already."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
