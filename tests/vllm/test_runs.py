"""Whole runs of two steps from the command line, rollouts by vLLM in both modes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.train.launch import ROOT, environment

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4  # mean over a step's tokens


def python(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1500)


def train(config, folder, *more):
    settings = {
        "model.model_name_or_path": config.model.model_name_or_path,
        "data.max_prompt_length": 224,
        "rollout.num_prompts": 2,
        "rollout.num_generations": 4,
        "rollout.max_completion_length": 16,
        "rollout.temperature": 0.8,
        "rollout.use_vllm": "true",
        "context.context": "all",
        "training.output_dir": folder,
        "training.max_steps": 2,
        "training.learning_rate": 1e-4,
        "training.warmup_steps": 0,
        "evaluation.num_prompts": 2,
        "evaluation.k": 2,
    }
    return python(
        "mopd_train", "train", *(part for key, value in settings.items() for part in (f"--{key}", str(value))), *more
    )


def check(done, folder):
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["rollout/logprob_gap"] < TOLERANCE and row["grad_norm"] > 0 for row in rows), rows
    assert {"evaluation-before.json", "evaluation-after.json", "checkpoint-2"} <= {p.name for p in folder.iterdir()}


def test_colocated_run(config, tmp_path):
    check(train(config, tmp_path / "run"), tmp_path / "run")


def test_run_against_a_server(config, port, served, tmp_path):
    where = ("--rollout.vllm_mode", "server", "--rollout.vllm_server_port", str(port))
    check(train(config, tmp_path / "run", *where, "--rollout.vllm_weights_dir", str(tmp_path)), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "the weights' files were removed"


def test_a_sharded_student_on_two_ranks_with_an_engine_each(model_folder):
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    done = python(*launch, "tests.vllm.two_ranks", str(model_folder))
    assert done.returncode == 0, done.stderr[-4000:]
    lines = re.findall(r"rank (\d) of 2: (\S+) (\S+) sum 3", done.stdout)
    assert sorted(rank for rank, _, _ in lines) == ["0", "1"], done.stdout[-4000:]
    assert all(float(before) > 0.05 and float(after) < 1e-3 for _, before, after in lines), lines
