"""What may go wrong around a run: kills, damaged and unwritable checkpoints, signals, degenerate batches.

MOPD_KILLS: how many kills the kill test deals (`make test-faults`: 20).
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from mopd_train import checkpoint, setup, train
from mopd_train.config import Config
from tests.train.test_distributed import arguments, metrics_of
from tests.train.test_evaluate import write_rows

KILLS = int(os.environ.get("MOPD_KILLS", "4"))
STEPS = 6
EVENTS_OF_A_SAVE = 110  # about: files opened, renamed or removed in the run's folder
LATEST = ("--training.resume_from_checkpoint", "latest")


def line(model: Path, folder: Path, rows: Path, *more: str) -> list[str]:
    return arguments(model, folder, rows, "--training.max_steps", str(STEPS), *more)


@pytest.fixture(scope="module")
def straight(warm, halting_model, tmp_path_factory):
    """Six steps without interruption, checkpoints at 2, 4 and 6."""
    base = tmp_path_factory.mktemp("straight")
    warm.run(*line(halting_model, base / "run", write_rows(base)))
    return base / "run"


def assert_same_bits(ours: Path, theirs: Path) -> None:
    """Metrics, completions, and every file of the last checkpoint by its checksum: weights, teacher, optimizer."""
    assert metrics_of(ours) == metrics_of(theirs)
    for path in (theirs / "completions").iterdir():
        assert (ours / "completions" / path.name).read_bytes() == path.read_bytes()
    mine, expected = (
        json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for folder in (ours, theirs)
    )
    assert {"model.safetensors", "teacher/model.safetensors", "optimizer/__0_0.distcp"} <= expected["files"].keys()
    assert mine["step"] == expected["step"]
    assert mine["scheduler"] == expected["scheduler"]
    for files in (mine["files"], expected["files"]):
        del files["optimizer/.metadata"]  # torch writes the folder's path and a random id into it
    assert mine["files"] == expected["files"]
    assert checkpoint.what_is_damaged(ours / f"checkpoint-{STEPS}") is None


def test_killed_at_random_moments_and_resumed_the_run_is_bitwise_the_same(warm, halting_model, straight, tmp_path):
    """Half of the kills come at a drawn file operation, so also in the midst of a save; half at a drawn time. A run
    that gets to its end first is compared and begun anew, until all kills are dealt."""
    folder, rows = tmp_path / "run", write_rows(tmp_path)
    draw, killed = random.Random(20260512), 0
    command = line(halting_model, folder, rows, *LATEST)
    for attempt in range(4 * KILLS):
        if attempt % 2 == 0:
            event = str(draw.randrange(1, 2 * EVENTS_OF_A_SAVE))
            code = warm.start(*command, KILL_IN=str(folder), KILL_AT_EVENT=event).wait()
        else:
            job = warm.start(*command)
            time.sleep(draw.uniform(0, 3))
            job.kill()
            code = job.wait()
        if code == 0:
            assert_same_bits(folder, straight)
            shutil.rmtree(folder)
            continue
        assert code == -signal.SIGKILL, warm.folder
        killed += 1
        if killed == KILLS:
            break
    assert killed == KILLS
    warm.run(*command)
    assert_same_bits(folder, straight)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "teacher/model.safetensors", "optimizer/__0_0.distcp", "trainer_state.json"]
)
@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted"])
def test_damage_is_found_and_the_checkpoint_before_is_taken(straight, tmp_path, caplog, name, how):
    for step in (4, 6):
        shutil.copytree(straight / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    _damage(tmp_path / "checkpoint-6" / name, how)
    if (name, how) != ("trainer_state.json", "deleted"):  # without it a folder never was a checkpoint
        with pytest.raises(ValueError, match=r"checkpoint-6' is damaged \(.*choose another one"):
            checkpoint.find_resume(str(tmp_path / "checkpoint-6"), tmp_path)
        with caplog.at_level(logging.WARNING):
            assert checkpoint.find_resume("latest", tmp_path) == tmp_path / "checkpoint-4"
        assert "checkpoint-6 is damaged" in caplog.text
        assert (tmp_path / "checkpoint-6.damaged").is_dir()
    _damage(tmp_path / "checkpoint-4" / "model.safetensors", how)
    with pytest.raises(ValueError, match=r"every checkpoint of .* is damaged"):
        checkpoint.find_resume("latest", tmp_path)


def _damage(path: Path, how: str) -> None:
    if how == "deleted":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    place = random.Random(str(path.name)).randrange(len(content))
    content[place] ^= 1
    path.write_bytes(content if how == "flipped" else content[:place])


def test_a_run_goes_on_from_before_the_damage_to_the_same_end(warm, halting_model, straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoint-6")
    _damage(folder / "checkpoint-4" / "optimizer" / "__0_0.distcp", "flipped")
    job = warm.run(*line(halting_model, folder, write_rows(tmp_path), *LATEST))
    assert "checkpoint-4 is damaged (optimizer/__0_0.distcp has another checksum)" in job.text()
    assert_same_bits(folder, straight)


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(warm, halting_model, tmp_path):
    """A filesystem of 40 MB, where the third checkpoint of 16 MB does not fit; or else a limit on the file size."""
    small = tmp_path / "small"
    small.mkdir()
    limits: dict[str, str] = {}
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(small)], capture_output=True
    ).returncode == 0  # fmt: skip
    if not mounted:
        limits = {"FILE_SIZE": "2000000"}
    try:
        command = line(halting_model, small / "run", write_rows(tmp_path), "--training.save_total_limit", "2")
        job = warm.start(*command, **limits)
        assert job.wait() == 1
        step = 6 if mounted else 2
        assert f"checkpoint of step {step} could not be written" in job.text()
        found = checkpoint.checkpoints(small / "run")
        assert [path.name for path in found] == (["checkpoint-2", "checkpoint-4"] if mounted else [])
        assert [checkpoint.what_is_damaged(path) for path in found] == [None] * len(found)
        assert not list((small / "run").glob("*.tmp"))
    finally:
        if mounted:
            subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(("name", "processes"), [("SIGTERM", 1), ("SIGUSR1", 2)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_code_0(
    warm, halting_model, straight, tmp_path, name, processes
):
    """Sent to one process, heard by all."""
    folder, rows = tmp_path / "run", write_rows(tmp_path)
    command = line(halting_model, folder, rows, "--training.save_steps", "1000", "--training.max_steps", "1000")
    jobs = warm.ranks(processes, *command) if processes > 1 else [warm.start(*command)]
    while not (folder / "metrics.jsonl").is_file() or not (folder / "metrics.jsonl").read_text():
        assert all(job.running() for job in jobs), [job.text() for job in jobs]
        time.sleep(0.05)
    jobs[-1].kill(getattr(signal, name))
    assert [job.wait() for job in jobs] == [0] * processes
    steps = len(metrics_of(folder))
    assert f"stopped by {name} after step {steps}: training.resume_from_checkpoint=latest goes on" in jobs[0].text()
    assert [path.name for path in checkpoint.checkpoints(folder)] == [f"checkpoint-{steps}"]
    if processes == 1 and steps < STEPS:
        warm.run(*line(halting_model, folder, rows, *LATEST))
        assert_same_bits(folder, straight)


def test_a_process_that_is_killed_ends_the_others_in_time(warm, halting_model, tmp_path):
    folder = tmp_path / "run"
    jobs = warm.ranks(2, *line(halting_model, folder, write_rows(tmp_path), "--training.max_steps", "1000"))
    while not (folder / "checkpoint-2").is_dir():
        assert all(job.running() for job in jobs), [job.text() for job in jobs]
        time.sleep(0.05)
    jobs[1].kill()
    assert jobs[0].wait(timeout=45) == 1
    assert "process 0 of 2; last complete checkpoint: " in jobs[0].text()
    found = checkpoint.checkpoints(folder)
    assert found
    assert [checkpoint.what_is_damaged(path) for path in found] == [None] * len(found)


def run_of(model: Path, folder: Path, rows: Path, reward: str, context: str) -> setup.Run:
    config = Config()
    config.model.model_name_or_path = str(model)
    config.data.task, config.data.train_dataset = f"tests.train.rewards.{reward}", str(rows)
    config.rollout.num_prompts, config.rollout.num_generations, config.rollout.max_completion_length = 3, 4, 6
    config.context.context = context  # type: ignore[assignment]
    config.training.output_dir, config.training.report_to = str(folder), []
    return setup.set_up(config)


def test_duplicate_prompts_empty_completions_and_nothing_but_successes(halting_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Say a number."}\n' * 3)
    run = run_of(halting_model, tmp_path / "run", rows, "right", "2s1f")
    metrics = train.train_step(run, 1)
    written = [json.loads(text) for text in next((run.folder / "completions").iterdir()).read_text().splitlines()]
    groups = [[row["completion_ids"] for row in written[i : i + 4]] for i in (0, 4, 8)]
    assert groups[0] != groups[1] != groups[2]  # every place in a step draws for itself
    assert any(row["finished"] and len(row["completion_ids"]) == 1 for row in written)  # stopped at once
    assert metrics["num_tokens"] == sum(len(row["completion_ids"]) for row in written)
    assert metrics["reward"] == 1.0
    assert metrics["frac_reward_zero_std"] == 1.0
    assert 0 < metrics["loss"] < 0.7
    assert metrics["grad_norm"] > 0


def test_sequences_that_the_model_was_not_made_for_are_warned_of_once(halting_model, tmp_path, caplog):
    """The student's from the longest prompt and the longest completion; the teacher's when one is scored."""
    model = shutil.copytree(halting_model, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Say a number."}\n' * 3)
    for limit, said in ((40, (0, 1)), (30, (1, 1)), (4096, (0, 0))):
        (model / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": limit}))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run = run_of(model, tmp_path / str(limit), rows, "right", "2s1f")
            assert len(run.train_prompts[0].token_ids) + 6 in range(31, 41)
            train.train_step(run, 1)
            train.train_step(run, 2)
        warnings = [r.message for r in caplog.records if f"max_position_embeddings={limit}: lower" in r.message]
        remedies = ("rollout.max_completion_length", "context.max_reprompt_len")
        assert tuple(sum(name in text for text in warnings) for name in remedies) == said


def test_nothing_but_failures_shows_the_failure_or_leaves_the_step_out(halting_model, tmp_path):
    """2s1f still has a failed peer to show. 1s has nothing: neither model moves, and the run goes on."""
    rows = write_rows(tmp_path)
    run = run_of(halting_model, tmp_path / "shown", rows, "wrong", "2s1f")
    shown = train.train_step(run, 1)
    assert shown["self_distillation/reprompt_sample_fraction"] == 1.0
    assert shown["num_tokens"] > 0
    run = run_of(halting_model, tmp_path / "left out", rows, "wrong", "1s")
    before = [[p.clone() for p in model.parameters()] for model in (run.student, run.teacher)]
    for step in (1, 2):
        metrics = train.train_step(run, step)
        assert (metrics["num_tokens"], metrics["skipped_steps"]) == (0, 1.0)
        assert "loss" not in metrics
        assert metrics["reward"] == 0.0
    train.save(run, 2)
    for model, kept in zip((run.student, run.teacher), before, strict=True):
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), kept, strict=True))


def test_a_step_without_any_trainable_token_does_not_hang_several_processes(warm, halting_model, tmp_path):
    more = "--context.context 1s --data.task tests.train.rewards.wrong --model.sharding fsdp --training.max_steps 2"
    command = line(halting_model, tmp_path / "run", write_rows(tmp_path), *more.split())
    warm.run_ranks(2, *command)
    assert [row["num_tokens"] for row in metrics_of(tmp_path / "run")] == [0, 0]


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(halting_model, tmp_path):
    from mopd_train.models import load_model

    small = load_model(str(halting_model))
    small.resize_token_embeddings(40000)
    small.save_pretrained(tmp_path / "small")
    for pattern in ("*token*", "*.jinja"):
        for path in halting_model.glob(pattern):
            shutil.copy(path, tmp_path / "small")
    with pytest.raises(ValueError, match=r"the tokenizer has 49152 tokens and .*small embeds 40000: resize"):
        run_of(tmp_path / "small", tmp_path / "run", write_rows(tmp_path), "right", "none")
    assert not (tmp_path / "run").exists()
