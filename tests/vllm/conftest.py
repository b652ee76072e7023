"""Both vLLM engines, real, on the embedded model; and the trainer's own view of a rollout's log-probs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mopd_train.config import Config
from mopd_train.files import write_json
from mopd_train.models import embedded_model, load_model, load_tokenizer
from mopd_train.rollout_engines import build_rollout_engine
from tests.train.launch import ROOT, environment

# Read when vLLM and OpenMP start.
os.environ |= {"KMP_BLOCKTIME": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """SmolLM2 with generation defaults that would spoil every rollout if an engine took them over."""
    folder = tmp_path_factory.mktemp("smollm2")
    for path in embedded_model().iterdir():
        if path.name != "generation_config.json":
            (folder / path.name).symlink_to(path)
    write_json(
        folder / "generation_config.json", {"eos_token_id": 2, "do_sample": True, "top_k": 1, "repetition_penalty": 1.5}
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return load_tokenizer(str(model_folder))


@pytest.fixture
def student(model_folder):
    return load_model(str(model_folder))


@pytest.fixture(scope="session")
def port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="session")
def config(model_folder, port, tmp_path_factory) -> Config:
    config = Config()
    config.model.model_name_or_path = str(model_folder)
    config.data.max_prompt_length, config.rollout.max_completion_length = 224, 16
    config.rollout.vllm_server_port = port
    return config


@pytest.fixture(scope="session")
def server(config, port, tmp_path_factory):
    """`mopd serve`, as a user starts it."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "mopd_train", "serve", "--rollout.vllm_server_port", str(port)]
    command += ["--model.model_name_or_path", config.model.model_name_or_path]
    command += ["--data.max_prompt_length", "224", "--rollout.max_completion_length", "16"]
    with open(log, "w") as handle:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=handle, stderr=handle, start_new_session=True
        )
    yield process
    died = process.poll()
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)
    assert died is None, log.read_text()[-4000:]


@pytest.fixture(scope="session")
def colocated(config, tokenizer, model_folder):
    config.rollout.use_vllm, config.rollout.vllm_mode = True, "colocate"
    return build_rollout_engine(config, load_model(str(model_folder)), tokenizer)


@pytest.fixture(scope="session")
def served(config, tokenizer, model_folder, server):
    from mopd_train.rollout_engines.server import Server, ServerRollouts

    Server(config.rollout).wait_until_ready()
    return ServerRollouts(config.rollout, tokenizer)


@pytest.fixture(params=["colocated", "served"])
def engine(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def dense_logprobs(model, prompt_ids: list[int], completion_ids: list[int], warp) -> torch.Tensor:
    """log softmax of warp(logits) at the completion's tokens, from the whole sequence's dense logits."""
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return warp(logits).log_softmax(-1).gather(1, torch.tensor(completion_ids)[:, None])[:, 0]


def largest_gap(model, groups, warp=lambda logits: logits) -> float:
    """max over all tokens of |engine's log-prob - dense log-prob|"""
    gaps = [
        (dense_logprobs(model, group.prompt.token_ids, r.token_ids, warp) - torch.tensor(r.logprobs)).abs().max()
        for group in groups
        for r in group.rollouts
    ]
    return float(max(gaps))


@torch.no_grad()
def disturb(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02 * parameter.std())
