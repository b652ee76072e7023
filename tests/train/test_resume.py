"""Going on with a run: from an older checkpoint, beyond its end, after a signal, with another evaluation."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from mopd_train import Callback, Config, checkpoint, setup, train
from mopd_train.files import read_json, write_json
from tests.train.test_evaluate import write_rows
from tests.train.test_train import metrics_of


class Killed(Exception):
    """Ends a run as a kill would: nothing more is written."""


def config_of(model: Path, folder: Path, steps: int, **training: Any) -> Config:
    config = Config()
    config.model.model_name_or_path = str(model)
    rows = str(write_rows(folder.parent))
    config.data.task, config.data.train_dataset, config.data.eval_dataset = "tests.train.rewards.parity", rows, rows
    config.rollout.num_prompts, config.rollout.num_generations, config.rollout.max_completion_length = 2, 2, 3
    config.evaluation.k, config.evaluation.num_prompts = 2, 1
    config.training.output_dir, config.training.report_to, config.training.max_steps = str(folder), [], steps
    config.training.learning_rate, config.training.warmup_steps = 0.01, 1
    for key, value in training.items():
        setattr(config.training, key, value)
    return config


class At(Callback):
    """Does something at one hook of one step."""

    def __init__(self, hook: str, step: int, act: Any) -> None:
        setattr(self, hook, lambda event: act(event) if event.step == step else None)


def killed(event: Any) -> None:
    raise Killed


def asked_to_stop(event: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def straight(tiny_model, tmp_path_factory) -> Path:
    """Two steps without interruption, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(config_of(tiny_model, folder, 2, save_steps=1))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_branch_from_an_older_checkpoint_keeps_what_it_saves(tiny_model, straight, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    branch = config_of(tiny_model, folder, 3, save_steps=1, save_total_limit=1, learning_rate=0.001)
    branch.training.resume_from_checkpoint = str(folder / "checkpoint-1")
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-9")
    state = read_json(folder / "checkpoint-9" / "trainer_state.json")
    write_json(folder / "checkpoint-9" / "trainer_state.json", {**state, "step": 9})
    whole: list[str | None] = []
    look = At("on_save", 2, lambda event: whole.append(checkpoint.what_is_damaged(event.checkpoint)))
    with caplog.at_level(logging.WARNING), pytest.raises(Killed):
        train(branch, callbacks=[look, At("on_step_end", 3, killed)])
    assert whole == [None]
    assert names(folder) == ["checkpoint-2", "checkpoint-2.abandoned", "checkpoint-9.abandoned"]
    assert (
        f"checkpoint-9 is left behind, as the run goes on from {folder / 'checkpoint-1'}: it is set aside"
        in caplog.text
    )
    assert checkpoint.find_resume("latest", folder) == folder / "checkpoint-2"
    assert not (folder / "training.png").exists()


def test_a_checkpoint_of_the_same_step_of_another_run_is_set_aside_too(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    assert checkpoint.set_aside_later(tmp_path / "run", straight / "checkpoint-2")
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2.abandoned"]
    assert not checkpoint.set_aside_later(straight, straight / "checkpoint-2")
    assert names(straight) == ["checkpoint-1", "checkpoint-2"]


def test_saving_a_step_again_replaces_it_only_once_the_new_one_is_whole(tiny_model, tmp_path, monkeypatch):
    run = setup.set_up(config_of(tiny_model, tmp_path / "run", 4))
    first = train.save(run, 2)
    at_rename: list[bool] = []
    rename = Path.rename

    def watched(path: Path, target: Path) -> Path:
        if path.name == "checkpoint-2.tmp":
            at_rename.append(any(checkpoint.what_is_damaged(p) is None for p in run.folder.glob("checkpoint-2.repl*")))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    assert train.save(run, 2) == first
    assert at_rename == [True]
    assert names(run.folder) == ["checkpoint-2"]


def test_a_run_extended_and_killed_after_its_last_save_is_evaluated_when_it_goes_on(tiny_model, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    assert (folder / "training.png").is_file()
    longer = config_of(tiny_model, folder, 3, resume_from_checkpoint="latest")
    with pytest.raises(Killed):
        train(longer, callbacks=[At("on_save", 3, killed)])
    assert not (folder / "training.png").exists()
    assert not (folder / "evaluation-after.json").exists()
    evaluated: list[int] = []
    train(longer, callbacks=[At("on_evaluate", 3, lambda event: evaluated.append(event.step))])
    assert evaluated == [3]
    assert (folder / "training.png").is_file()
    train(longer, callbacks=[At("on_evaluate", 3, killed)])  # complete now: nothing is done


@pytest.mark.parametrize(("hook", "step", "done"), [("on_evaluate", 0, 0), ("on_rollouts", 2, 1)])
def test_a_signal_is_heard_before_a_step_learns_and_the_step_is_redone(
    tiny_model, straight, tmp_path, capsys, hook, step, done
):
    folder = tmp_path / "run"
    seen: list[int] = []
    watch = At("on_step_end", done + 1, lambda event: seen.append(event.step))
    config = config_of(tiny_model, folder, 2, resume_from_checkpoint="latest")
    train(config, callbacks=[At(hook, step, asked_to_stop), watch])
    assert seen == []
    assert f"stopped by SIGTERM after step {done}: " in " ".join(capsys.readouterr().out.split())
    assert names(folder) == [f"checkpoint-{done}"] * (done > 0)
    train(config)
    assert metrics_of(folder) == metrics_of(straight)
    ours, theirs = (read_json(path / "checkpoint-2" / "trainer_state.json")["files"] for path in (folder, straight))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["teacher/model.safetensors"] == theirs["teacher/model.safetensors"]


def test_a_signal_in_the_last_step_comes_before_the_evaluation(tiny_model, tmp_path):
    folder = tmp_path / "run"
    config = config_of(tiny_model, folder, 1, resume_from_checkpoint="latest")
    train(config, callbacks=[At("on_step_end", 1, asked_to_stop)])
    assert names(folder) == ["checkpoint-1"]
    assert not (folder / "evaluation-after.json").exists()
    train(config)
    assert json.loads((folder / "evaluation-after.json").read_text())["k"] == 2
