"""Run by torchrun, two processes: a student sharded over both (FSDP2), a colocated engine in each."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mopd_train.config import Config
from mopd_train.models import load_model, load_tokenizer
from mopd_train.rollout import Prompt
from mopd_train.rollout_engines import build_rollout_engine
from mopd_train.sampler import Sampling
from tests.vllm.conftest import disturb, largest_gap


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    config = Config()
    config.model.model_name_or_path = folder
    config.rollout.use_vllm, config.rollout.max_completion_length, config.data.max_prompt_length = True, 8, 56
    whole, sharded, tokenizer = load_model(folder), load_model(folder), load_tokenizer(folder)
    for model in (whole, sharded):
        disturb(model.parameters())
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    engine = build_rollout_engine(config, whole, tokenizer)
    ids = tokenizer.encode(("The capital of France is", "One, two, three,")[rank])
    prompts, sampling = [Prompt([], ids, {})], Sampling(3, 8, 1.0, 1.0, 8)
    before = largest_gap(whole, engine.generate(prompts, sampling, [2], rank))
    engine.update_weights(sharded)
    groups = engine.generate(prompts, sampling, [2], rank)
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)  # the trainer's group still works
    print(f"rank {rank} of {dist.get_world_size()}: {before:.2e} {largest_gap(whole, groups):.2e} sum {total:.0f}")


if __name__ == "__main__":
    main(sys.argv[1])
