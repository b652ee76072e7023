"""Whole runs of a tiny model: kill and resume, accumulation, refusals, a full disk, a non-finite loss."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mopd_train import checkpoint, objectives, setup, train
from mopd_train.config import Config
from mopd_train.models import load_model
from tests.train.launch import mopd, start
from tests.train.test_evaluate import write_rows


def tiny_arguments(model: Path, folder: Path, rows: Path, **training: object) -> list[str]:
    settings = {
        "model.model_name_or_path": model,
        "data.task": "tests.train.rewards.parity",
        "data.train_dataset": rows,
        "rollout.num_prompts": 2,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 5,
        "training.max_steps": 4,
        "training.learning_rate": 0.01,
        "training.save_steps": 2,
        "training.save_total_limit": 4,
        "training.output_dir": folder,
        **{f"training.{key}": value for key, value in training.items()},
    }
    return ["train", *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """Without times, which no two runs share."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}:{key}": value for key, value in load_file(path).items()}
    dcp_to_torch_save(folder / "optimizer", folder / "optimizer.pt")
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]
    (folder / "optimizer.pt").unlink()
    return found | {f"optimizer:{key}": value for key, value in optimizer.items() if key.startswith("state.")}


@pytest.fixture(scope="module")
def straight(tiny_model, tmp_path_factory):
    """Four steps without interruption."""
    base = tmp_path_factory.mktemp("straight")
    done = mopd(*tiny_arguments(tiny_model, base / "run", write_rows(base)))
    assert done.returncode == 0, done.stderr
    return base / "run"


def test_a_killed_and_resumed_run_is_bitwise_the_same(tiny_model, straight, tmp_path):
    rows = write_rows(tmp_path)
    folder = tmp_path / "run"
    arguments = tiny_arguments(tiny_model, folder, rows, max_steps=400)
    process = start(*arguments)
    deadline = time.monotonic() + 240
    while not (folder / "checkpoint-2").is_dir():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for later in (p for p in checkpoint.checkpoints(folder) if checkpoint.step_of(p) > 2):
        shutil.rmtree(later)  # the machine may have been quick
    done = mopd(*tiny_arguments(tiny_model, folder, rows), "--training.resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert metrics_of(folder) == metrics_of(straight)
    ours, theirs = tensors_of(folder / "checkpoint-4"), tensors_of(straight / "checkpoint-4")
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert any(key.startswith("teacher/") for key in ours)


def test_training_moves_student_and_teacher_and_transformers_loads_both(tiny_model, straight):
    base, student = load_model(str(tiny_model)), load_model(str(straight / "checkpoint-4"))
    teacher = load_model(str(straight / "checkpoint-4" / "teacher"))
    moved = (student.lm_head.weight - base.lm_head.weight).norm()
    behind = (teacher.lm_head.weight - base.lm_head.weight).norm()
    assert 0 < behind < 0.3 * moved


def test_a_run_leaves_its_files(straight):
    assert {"run.json", "metrics.jsonl", "training.png", "tensorboard", "completions"} <= {
        p.name for p in straight.iterdir()
    }
    rows = metrics_of(straight)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["num_tokens"] > 0 and row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert (straight / "training.png").read_bytes().startswith(b"\x89PNG")
    assert len((straight / "completions" / "step-000003.jsonl").read_text().splitlines()) == 8


def run_in_process(model: Path, folder: Path, rows: Path, **changes: object) -> setup.Run:
    config = Config()
    config.model.model_name_or_path = str(model)
    config.data.task, config.data.train_dataset = "tests.train.rewards.parity", str(rows)
    config.rollout.num_prompts, config.rollout.num_generations, config.rollout.max_completion_length = 2, 4, 5
    config.training.output_dir, config.training.report_to = str(folder), []
    for key, value in changes.items():
        setattr(config.training, key, value)
    return setup.set_up(config)


def test_the_micro_batch_size_does_not_change_the_step(tiny_model, tmp_path):
    """One global token count: a mean of micro-batch means would differ, completions differ in length."""
    after = []
    for size in (1, 3, 100):
        run = run_in_process(tiny_model, tmp_path / str(size), write_rows(tmp_path), per_device_train_batch_size=size)
        metrics = train.train_step(run, 1)
        after.append((metrics["loss"], metrics["grad_norm"]))
    for other in after[1:]:
        assert other == pytest.approx(after[0], rel=1e-4)


def test_only_completion_tokens_reach_the_head(tiny_model, tmp_path, monkeypatch):
    """The loss sees exactly the counted tokens, and the model's own head is never called in learning."""
    run = run_in_process(tiny_model, tmp_path / "run", write_rows(tmp_path))
    seen = []
    method = objectives.METHODS["mopd"]
    watched = lambda batch, config: seen.append(batch) or method.objective(batch, config)  # noqa: E731
    monkeypatch.setitem(objectives.METHODS, "mopd", dataclasses.replace(method, objective=watched))
    learn = train.learn

    def guarded(*arguments):
        for model in (run.student, run.teacher):
            model.lm_head.register_forward_hook(lambda *_: pytest.fail("a model built logits in learning"))
        return learn(*arguments)

    monkeypatch.setattr(train, "learn", guarded)
    metrics = train.train_step(run, 1)
    assert sum(batch.student_hidden.size(0) for batch in seen) == metrics["num_tokens"]
    assert {batch.normalizer for batch in seen} == {metrics["num_tokens"]}


def test_a_non_finite_loss_stops_the_run_and_names_the_rows(tiny_model, tmp_path):
    run = run_in_process(tiny_model, tmp_path / "run", write_rows(tmp_path))
    with torch.no_grad():
        run.teacher.model.norm.weight.fill_(float("nan"))
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    with pytest.raises(
        FloatingPointError, match=r"non-finite loss at step 1, rank 0, in \d+ tokens of rollouts \[0, 1"
    ):
        train.train_step(run, 1)
    assert all(torch.equal(value, before[name]) for name, value in run.student.state_dict().items())


def test_a_full_disk_keeps_the_last_checkpoint(tiny_model, tmp_path, monkeypatch):
    run = run_in_process(tiny_model, tmp_path / "run", write_rows(tmp_path))
    train.save(run, 1)

    def no_space(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "fsync_tree", no_space)
    with pytest.raises(
        RuntimeError, match=r"step 2 could not be written.*No space left.*complete checkpoint: .*checkpoint-1"
    ):
        train.save(run, 2)
    assert [p.name for p in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-1"]
    assert load_model(str(tmp_path / "run" / "checkpoint-1")).config.hidden_size == 16
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(OSError, match=r"GB free, 3 checkpoints take"):
        checkpoint.check_space(tmp_path, run.student, teacher_saved=True, keep=2)


def test_old_checkpoints_go_after_new_ones_are_whole(tiny_model, tmp_path):
    run = run_in_process(tiny_model, tmp_path / "run", write_rows(tmp_path), save_total_limit=2)
    for step in (1, 2, 3, 10):
        train.save(run, step)
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-10"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--training.lerning_rate", "1"], "lerning_rate"),
        (["--training.max_steps", "many"], "max_steps"),
        (["--context.context", "3s"], "3s"),
        (["--rollout.num_generations", "1"], "expected rollout.num_generations >= 2 for context '2s1f'"),
        (["--distillation.alpha", "1.5"], r"expected distillation.alpha in \[0, 1\], got 1.5"),
        (["--data.train_dataset", "/nowhere.jsonl"], "/nowhere.jsonl does not exist"),
        (["--data.task", "tests.train.rewards.raises"], "verifier of task .* raised KeyError"),
        (["--training.resume_from_checkpoint", "/nowhere"], "is no complete checkpoint"),
        (["--distillation.teacher_model_name_or_path", "x"], "is only read with"),
    ],
)
def test_refusals_name_key_value_and_remedy(tiny_model, tmp_path, extra, message):
    done = mopd(*tiny_arguments(tiny_model, tmp_path / "run", write_rows(tmp_path)), *extra)
    assert done.returncode != 0
    assert re_search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("run/checkpoint-*"))


def re_search(pattern: str, text: str) -> bool:
    import re

    return re.search(pattern, " ".join(text.split())) is not None


def test_the_folder_of_another_run_is_left_alone(tiny_model, straight, tmp_path):
    before = metrics_of(straight)
    done = mopd(*tiny_arguments(tiny_model, straight, write_rows(tmp_path)))
    assert done.returncode == 1
    assert "holds another run" in done.stderr
    assert "--training.resume_from_checkpoint latest" in done.stderr
    assert metrics_of(straight) == before


def test_a_model_without_a_head_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaModel

    from mopd_kernels import LMHead

    trunk = LlamaModel(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="LlamaModel has no Linear lm_head"):
        LMHead.from_model(trunk)
