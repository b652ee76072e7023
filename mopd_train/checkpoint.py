"""Checkpoints: whole or absent, checked by checksum, loadable by transformers, enough to go on bit for bit.

checkpoint-<step>/              the student, as AutoModelForCausalLM.from_pretrained reads it, and its tokenizer
                  teacher/      the EMA teacher, the same way (only where the teacher moves)
                  optimizer/    AdamW's moments, by torch.distributed.checkpoint: every process writes its part, and
                                any number of processes reads it
                  trainer_state.json   step, which is also the data position; schedule; SHA-256 of every other file

Sampling is seeded by step and prompt, so there is no random state to keep.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import adapters, fsdp
from .distributed import Ranks
from .files import fsync_folder, fsync_tree, read_json, write_json

logger = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"
TEACHER = "teacher"
OPTIMIZER = "optimizer"
HASHING_THREADS = 8  # files hashed at once: one core hashes more slowly than a disk reads


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def step_of(path: Path) -> int:
    return int(read_json(path / STATE)["step"])


def find_resume(requested: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, every file of it checked: "latest" of this run (None if it has none yet), or the
    folder named. A damaged latest one is set aside with a warning and the one before it is taken.

    FileNotFoundError for a folder that is no checkpoint; ValueError for a damaged one, or where all are.
    """
    if requested is None:
        return None
    if requested != "latest":
        return _intact(Path(requested), output_dir)
    found = checkpoints(output_dir)
    if not found:
        logger.warning("no checkpoint in %s yet: starting from the beginning", output_dir)
        return None
    for path in reversed(found):
        damage = what_is_damaged(path)
        if damage is None:
            return path
        set_aside(path, "damaged", f"is damaged ({damage})")
    raise ValueError(
        f"every checkpoint of {output_dir} is damaged ({', '.join(path.name for path in found)}): start again with "
        "--training.overwrite_output_dir true, or restore one from a copy"
    )


def set_aside(path: Path, suffix: str, why: str) -> None:
    """Renamed to a name that `checkpoints` does not find and that nothing has yet."""
    names = (f"{path.name}.{suffix}{number or ''}" for number in count())
    name = next(name for name in names if not path.with_name(name).exists())
    logger.warning("%s %s: it is set aside as %s", path, why, name)
    path.rename(path.with_name(name))


def set_aside_later(output_dir: Path, resume: Path | None) -> bool:
    """Whether there were checkpoints of the steps after `resume`, from which the run goes on: they would be taken for
    newer than those still to be written. So would one of the same step in its place."""
    if resume is None:
        return False
    step = step_of(resume)
    later = [p for p in checkpoints(output_dir) if step_of(p) >= step and p.resolve() != resume.resolve()]
    for path in later:
        set_aside(path, "abandoned", f"is left behind, as the run goes on from {resume}")
    return bool(later)


def _intact(path: Path, output_dir: Path) -> Path:
    if not (path / STATE).is_file():
        raise FileNotFoundError(
            f"training.resume_from_checkpoint={str(path)!r} is no complete checkpoint (it has no {STATE}); "
            f"{output_dir} holds {[p.name for p in checkpoints(output_dir)]}"
        )
    damage = what_is_damaged(path)
    if damage is not None:
        raise ValueError(f"training.resume_from_checkpoint={str(path)!r} is damaged ({damage}): choose another one")
    return path


def what_is_damaged(path: Path) -> str | None:
    """The first file that is not as it was written, or None."""
    try:
        state = read_json(path / STATE)
        signature = state.pop("signature")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE} cannot be read"
    if signature != _signature(state):
        return f"{STATE} was changed"
    missing = [name for name in state["files"] if not (path / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    found = _checksums(path)
    return next(
        (f"{name} has another checksum" for name, value in state["files"].items() if found[name] != value), None
    )


def save(
    output_dir: Path,
    step: int,
    ranks: Ranks,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,  # None: not part of the state
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    tokenizer: PreTrainedTokenizerBase,
    keep: int,
) -> Path:
    """Write beside, flush, rename, and only then delete the oldest beyond `keep`. Called by every process; a full
    disk, on whichever, is an error on all and leaves the earlier checkpoints as they were."""
    target = output_dir / f"checkpoint-{step}"
    staging = output_dir / f"checkpoint-{step}.tmp"
    if ranks.is_main:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    ranks.everywhere(None)
    failure: BaseException | None = None
    try:
        _write(staging, student, teacher, optimizer, tokenizer, ranks)
        if ranks.is_main:
            state = {"step": step, "scheduler": scheduler.state_dict(), "files": _checksums(staging)}
            write_json(staging / STATE, state | {"signature": _signature(state)})
            fsync_tree(staging)
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception
        failure = error
    failures = [text for text in ranks.everywhere(None if failure is None else str(failure)) if text is not None]
    if failures:
        if ranks.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        last = checkpoints(output_dir)
        raise RuntimeError(
            f"checkpoint of step {step} could not be written to {output_dir}: {failures[0]}; free space or set "
            f"training.output_dir elsewhere; last complete checkpoint: {last[-1] if last else 'none'}"
        ) from failure
    if ranks.is_main:
        replaced = output_dir / f"checkpoint-{step}.replaced"
        if target.exists():  # not deleted until the new one is in its place
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        staging.rename(target)
        fsync_folder(output_dir)
        shutil.rmtree(replaced, ignore_errors=True)
        others = [path for path in checkpoints(output_dir) if path != target]
        for old in others[::-1][keep - 1 :]:
            shutil.rmtree(old)
    ranks.everywhere(None)
    return target


def _write(
    staging: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks,
) -> None:
    _write_model(student, staging, ranks, adapters.STUDENT)
    if teacher is not None:
        _write_model(teacher, staging / TEACHER, ranks, adapters.TEACHER)
    if ranks.is_main:
        tokenizer.save_pretrained(staging)
    state = {"optimizer": get_optimizer_state_dict(student, optimizer)}
    with _alone_or_not() as alone:
        dcp.save(state, checkpoint_id=staging / OPTIMIZER, no_dist=alone)


def _write_model(model: PreTrainedModel, folder: Path, ranks: Ranks, adapter: str) -> None:
    weights = fsdp.whole_weights(model, ranks)
    if not ranks.is_main:
        return
    if getattr(model, "peft_config", None):
        adapters.save(model, weights, adapter, folder)
    else:
        model.save_pretrained(folder, state_dict=weights)


def load_optimizer(path: Path, student: PreTrainedModel, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Into a new optimizer and schedule, however many processes wrote and read; called by every process."""
    scheduler.load_state_dict(read_json(path / STATE)["scheduler"])
    state = {"optimizer": get_optimizer_state_dict(student, optimizer)}
    with _alone_or_not() as alone:
        dcp.load(state, checkpoint_id=path / OPTIMIZER, no_dist=alone)
    set_optimizer_state_dict(student, optimizer, state["optimizer"])


@contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Whether there is no process group, of which torch warns even where it is told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield not torch.distributed.is_initialized()


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 by path of every file below `folder` but the one that will hold them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATE)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip((str(path.relative_to(folder)) for path in paths), pool.map(_sha256, paths), strict=True))


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _signature(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def check_space(output_dir: Path, student: PreTrainedModel, teacher_saved: bool, keep: int) -> None:
    """OSError before training if the disk cannot hold the checkpoints kept and the one being written."""
    trained = [p for p in student.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in trained)
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
