"""Several gloo processes against one: the same losses, norms, metrics and weights, however the model is held.

Three prompts a step on up to four processes: uneven parts, and processes without any prompt. Completions end at
different steps, so samplers that gather weights would wait for each other for ever if they did not keep in step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mopd_train.checkpoint import what_is_damaged
from tests.train.launch import ROOT, environment
from tests.train.test_evaluate import write_rows

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d",
                 "--rdzv-endpoint", "localhost:0"],
    "accelerate launch": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                          "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"],
}  # fmt: skip
SHARDED = ("--model.sharding", "fsdp")
SPLIT = ("--model.vocab_parallel", "2")
# Two sums of float32 in another order; a norm over 10^6 float32 squares is itself off by some 10^-6.
TOLERANCE = 1e-4


def arguments(model: Path, folder: Path, rows: Path, *more: str) -> list[str]:
    settings = {
        "model.model_name_or_path": model,
        "data.task": "tests.train.rewards.parity",
        "data.train_dataset": rows,
        "rollout.num_prompts": 3,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 9,
        "training.max_steps": 4,
        "training.learning_rate": 0.01,
        "training.save_steps": 2,
        "training.save_total_limit": 4,
        "training.per_device_train_batch_size": 4,
        "training.report_to": "[jsonl]",
        "training.ddp_timeout": 40,
        "training.output_dir": folder,
    }
    return ["train", *(part for key, value in settings.items() for part in (f"--{key}", str(value))), *more]


def metrics_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Every metric of every step, all completions, and both models at the end."""
    mine, expected = metrics_of(ours), metrics_of(theirs)
    assert [row.keys() for row in mine] == [row.keys() for row in expected]
    for row, reference in zip(mine, expected, strict=True):
        free = {key for key in row if key.endswith("_computed")}  # how prefixes are cut depends on the parts
        for key in row.keys() - free:
            assert row[key] == pytest.approx(reference[key], rel=TOLERANCE, abs=1e-7), (row["step"], key)
    for name in sorted(path.name for path in (theirs / "completions").iterdir()):
        assert (ours / "completions" / name).read_text() == (theirs / "completions" / name).read_text()
    for name in ("model.safetensors", "teacher/model.safetensors"):
        mine, expected = (load_file(folder / "checkpoint-4" / name) for folder in (ours, theirs))
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            # AdamW divides by the gradient's root mean square: where that is rounding, so is the update.
            off = (mine[key] - value).abs()
            assert off.max() < 5e-3, (name, key)
            assert off.mean() < 1e-5, (name, key)


@pytest.fixture(scope="module")
def alone(warm, halting_model, tmp_path_factory):
    """One process, four steps."""
    base = tmp_path_factory.mktemp("alone")
    warm.run(*arguments(halting_model, base / "run", write_rows(base)))
    lengths = [len(json.loads(line)["completion_ids"]) for path in (base / "run" / "completions").iterdir()
               for line in path.read_text().splitlines()]  # fmt: skip
    assert {1, 9} <= set(lengths)
    return base / "run"


@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (2, ()),
        (4, SPLIT),
        (4, SHARDED),
        (2, (*SHARDED, *SPLIT, "--model.gradient_checkpointing", "true", "--training.tree", "false")),
    ],
    ids=["2 replicated", "4 in 2 vocabulary groups", "4 sharded", "2 sharded, split, recomputing, padded"],
)
def test_equals_one_process(warm, halting_model, alone, tmp_path, processes, more):
    warm.run_ranks(processes, *arguments(halting_model, tmp_path / "run", write_rows(tmp_path), *more))
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize(
    ("before", "after", "more"), [(2, 1, SHARDED), (1, 2, SHARDED), (1, 2, ())], ids=["2-1", "1-2 sharded", "1-2"]
)
def test_resumes_on_another_number_of_processes(warm, halting_model, alone, tmp_path, before, after, more):
    folder, rows = tmp_path / "run", write_rows(tmp_path)

    def go_on(processes: int, *extra: str) -> None:
        line = arguments(halting_model, folder, rows, *extra)
        if processes == 1:
            warm.run(*line)
        else:
            warm.run_ranks(processes, *line, *more)

    if before == 1:  # the same as a run of two steps
        shutil.copytree(alone, folder)
        shutil.rmtree(folder / "checkpoint-4")
    else:
        go_on(before, "--training.max_steps", "2")
    go_on(after, "--training.resume_from_checkpoint", "latest")
    assert_same_run(folder, alone)


@pytest.mark.skipif("MOPD_KILLS" not in os.environ, reason="starts interpreters: run by make test-faults")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_process_ends_the_job_and_leaves_the_last_checkpoint(launcher, halting_model, alone, tmp_path):
    """The other process fails in its next collective; the launcher says which one was killed."""
    folder = tmp_path / "run"
    line = arguments(halting_model, folder, write_rows(tmp_path), "--training.max_steps", "4000")
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "mopd_train"]
    job = subprocess.Popen(
        [*command, *line], cwd=ROOT, env={**environment(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint-4").is_dir() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = _children(job.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        output = job.communicate(timeout=60)[0]
    finally:
        job.kill()
    assert job.returncode != 0
    assert "exitcode  : -9" in output or "Signal 9" in output, output[-3000:]
    found = sorted(path for path in folder.glob("checkpoint-*") if path.suffix != ".tmp")
    assert found
    assert [what_is_damaged(path) for path in found] == [None] * len(found)


def _children(pid: int) -> list[int]:
    """The worker processes of the launcher, oldest first."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return sorted(int(child) for child in text.split() if b"mopd_train" in Path(f"/proc/{child}/cmdline").read_bytes())


def test_refuses_a_number_of_processes_that_the_vocabulary_group_does_not_divide(warm, halting_model, tmp_path):
    job = warm.start(*arguments(halting_model, tmp_path / "run", write_rows(tmp_path), "--model.vocab_parallel", "3"))
    assert job.wait() == 1
    assert "that model.vocab_parallel=3 divides, got 1" in job.text()
    assert not (tmp_path / "run").exists()


def test_gradients_are_summed_in_buckets_of_one_dtype(monkeypatch):
    """Buckets hold every parameter once and in order; a mixed model is never concatenated."""
    from mopd_train import distributed

    monkeypatch.setattr(distributed, "BUCKET", 100)
    sizes = [(10, torch.float32), (14, torch.float32), (2, torch.float32), (3, torch.float64), (99, torch.float32)]
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in sizes]
    buckets = list(distributed._buckets(parameters))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[10, 14], [2], [3], [99]]
