"""vLLM in a process of its own, over HTTP: the stock `vllm serve` with its development routes.

A weight update writes safetensors files where the server can read them and asks it to load them in place.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import RolloutConfig
from ..rollout import Group, Prompt, Rollout, to_rollout
from ..sampler import Sampling
from .colocate import WHOLE_DISTRIBUTION, prompt_seed
from .weights import save_weights

logger = logging.getLogger(__name__)

LOGPROBS_MODE = "processed_logprobs"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy of the environment
CONCURRENT = 128  # requests in flight, one a prompt; the server batches them


class Server:
    """A server's address, and requests to it. Errors name the address and what to do."""

    def __init__(self, config: RolloutConfig) -> None:
        self.timeout = config.vllm_server_timeout
        self.address = f"{config.vllm_server_host}:{config.vllm_server_port}"

    def wait_until_ready(self) -> None:
        """Until it answers, at most `vllm_server_timeout` seconds; then its settings are checked."""
        deadline = time.monotonic() + self.timeout
        told = False
        while True:
            try:
                self._open("/health", None, timeout=min(10.0, self.timeout))
                break
            except (OSError, urllib.error.URLError) as error:
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"no vLLM server answers at {self.address} within {self.timeout:g} s ({error}): start it with "
                        "`mopd serve` and the same configuration, or correct rollout.vllm_server_host, "
                        "rollout.vllm_server_port or rollout.vllm_server_timeout"
                    ) from error
                if not told:
                    logger.info("waiting for the vLLM server at %s (up to %g s)", self.address, self.timeout)
                    told = True
                time.sleep(min(1.0, self.timeout / 10))
        try:
            settings = self.call("/server_info?config_format=json")["vllm_config"]["model_config"]
        except LookupError as error:
            raise ValueError(
                f"the server at {self.address} has no route to replace weights ({error}): start it with `mopd serve`, "
                "or with VLLM_SERVER_DEV_MODE=1 in its environment"
            ) from error
        if settings["logprobs_mode"] != LOGPROBS_MODE:
            raise ValueError(
                f"expected the server at {self.address} to run with --logprobs-mode {LOGPROBS_MODE} (log-probs of the "
                f"distribution it samples from), got {settings['logprobs_mode']}; `mopd serve` sets it"
            )

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET, or POST if there is a body. LookupError for a route or model it does not have, RuntimeError for any
        other answer than success, ConnectionError if there is none."""
        try:
            answer = self._open(path, body, timeout=None)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if error.code == 404:
                raise LookupError(f"{path}: {said:.300}") from error
            raise RuntimeError(
                f"vLLM server at {self.address} answered {error.code} to {path}: {said:.1000}"
            ) from error
        except (OSError, urllib.error.URLError) as error:
            raise ConnectionError(
                f"lost the vLLM server at {self.address} during {path} ({error}): see its log, start it again with "
                "`mopd serve`, and go on with --training.resume_from_checkpoint latest"
            ) from error
        return json.loads(answer) if answer else None

    def _open(self, path: str, body: dict[str, Any] | None, timeout: float | None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://{self.address}{path}", data=data, headers={"Content-Type": "application/json"}
        )
        with DIRECT.open(request, timeout=timeout) as response:
            return bytes(response.read())


class ServerRollouts:
    """Each process asks for its own prompts; the first one sends the weights of all."""

    def __init__(self, config: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.server, self.tokenizer = Server(config), tokenizer
        self.folder = Path(config.vllm_weights_dir) / f"mopd-weights-{config.vllm_server_port}"
        self.model = self.server.call("/v1/models")["data"][0]["id"]

    def generate(self, prompts: list[Prompt], sampling: Sampling, stop_ids: list[int], seed: int) -> list[Group]:
        if not prompts:
            return []
        bodies = [self._request(p, sampling, stop_ids, prompt_seed(seed + i)) for i, p in enumerate(prompts)]
        with ThreadPoolExecutor(min(CONCURRENT, len(prompts))) as pool:
            answers = list(pool.map(lambda body: self.server.call("/v1/completions", body), bodies))
        return [
            Group(prompt, choices_to_rollouts(answer["choices"], self.tokenizer, stop_ids))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _request(self, prompt: Prompt, sampling: Sampling, stop_ids: list[int], seed: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt.token_ids,
            "n": sampling.num_generations,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_completion_length,
            "stop_token_ids": stop_ids,
            "seed": seed,
            "logprobs": 0,  # of the sampled token
            "return_token_ids": True,
            **WHOLE_DISTRIBUTION,
        }

    def update_weights(self, model: PreTrainedModel) -> None:
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
            self.folder.mkdir(parents=True)
        try:
            save_weights(model, self.folder, write=first)
            if first:
                path = {"weights_path": str(self.folder.absolute())}
                self.server.call("/collective_rpc", {"method": "reload_weights", "kwargs": path})
                if not self.server.call("/reset_prefix_cache", {})["success"]:
                    raise RuntimeError(
                        f"the vLLM server at {self.server.address} kept its prefix cache over a weight update; is it "
                        "serving others as well? Give the trainer a server of its own"
                    )
        finally:
            if first:
                shutil.rmtree(self.folder, ignore_errors=True)
        if dist.is_initialized():
            dist.barrier()  # no process samples from the old weights


def choices_to_rollouts(
    choices: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]
) -> list[Rollout]:
    """One prompt's choices of /v1/completions as rollouts. ValueError if token ids or log-probs are missing."""
    rollouts = []
    for choice in sorted(choices, key=lambda one: int(one["index"])):
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not ids or logprobs is None or len(ids) != len(logprobs):
            raise ValueError(
                f"vLLM gave {len(ids or [])} token ids and {len(logprobs or [])} log-probs for a completion: the "
                "server must know return_token_ids (vLLM >= 0.10.2)"
            )
        rollouts.append(to_rollout(list(ids), tokenizer, stop_ids, [float(value) for value in logprobs]))
    return rollouts
