"""FSDP2: weights, gradients, optimizer state and teacher sharded over all processes.

Every forward gathers weights layer by layer, so all processes must run the same number of forwards in the same
order, however many prompts, packs and sampled tokens each has. `InStep` sees to that: before each forward a process
says that it has one; one that has no more runs forwards of a single token until nobody has any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from .distributed import Ranks


def shard(model: PreTrainedModel, ranks: Ranks, compute_dtype: torch.dtype | None) -> None:
    """Shard in place: a unit for each decoder layer, and one for embeddings, last norm and lm_head.

    The last unit stays gathered after a forward, because the loss reads the lm_head outside of it; `release` ends
    that. Gradients are summed, not averaged: losses carry the global token count.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
    layers = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the way to a factor of 1 that every backend has
    inside: Any = MethodType(_run_inside, model)
    model.run_inside = inside
    register_fsdp_forward_method(model, "run_inside")


def _run_inside(model: PreTrainedModel, compute: Callable[[], tuple[Tensor, int]], ranks: Ranks) -> tuple[Tensor, int]:
    trunk = model.get_decoder()

    def idle() -> Tensor:
        return trunk(input_ids=torch.zeros(1, 1, dtype=torch.long, device=ranks.device), use_cache=False)[0]

    turns = InStep(trunk, ranks, idle)
    hidden, tokens = compute()
    for extra in turns.finish():  # in the graph, because the others' backward waits for this one's as well
        hidden = hidden + 0 * extra.sum()
    return hidden, tokens


def through(
    model: PreTrainedModel, ranks: Ranks, compute: Callable[[], tuple[Tensor, int]]
) -> tuple[Tensor, int]:  # (N, H), tokens computed
    """compute(), which calls the trunk of `model` any number of times, with the weights it needs gathered."""
    return model.run_inside(compute, ranks) if isinstance(model, FSDPModule) else compute()  # type: ignore[operator]


def release(model: nn.Module) -> None:
    """Drop gathered weights: before they are updated, which only reaches the shards."""
    if isinstance(model, FSDPModule):
        model.reshard()


@contextmanager
def sampling_in_step(model: PreTrainedModel, ranks: Ranks) -> Iterator[None]:
    """Within, whole forwards of `model` without gradients run in step."""
    if not isinstance(model, FSDPModule):
        yield
        return

    @torch.no_grad()
    def idle() -> Tensor:
        ids = torch.zeros(1, 1, dtype=torch.long, device=ranks.device)
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    turns = InStep(model, ranks, idle)
    yield
    turns.finish()


class InStep:
    """From construction to `finish`, forwards of `module` wait for each other over all processes."""

    def __init__(self, module: nn.Module, ranks: Ranks, idle: Callable[[], Tensor]) -> None:
        self.ranks, self.idle = ranks, idle
        # Before FSDP's own hook, which gathers weights.
        self.hook = module.register_forward_pre_hook(self._turn, prepend=True)

    def _turn(self, *_: Any) -> None:
        self.ranks.any(True)

    def finish(self) -> list[Tensor]:
        """No more forwards here: run idle ones while others go on. Returns their results."""
        self.hook.remove()
        results = []
        while self.ranks.any(False):
            results.append(self.idle())
        return results


def load(build: Callable[[bool], PreTrainedModel], ranks: Ranks, compute_dtype: torch.dtype | None) -> PreTrainedModel:
    """A sharded model of which only the main process reads the weights, in host memory.

    build(real): the whole model on the CPU, with weights read (real) or left uninitialised, which costs no memory
    until a layer is sharded.
    """
    model = build(ranks.is_main)
    source = {name: parameter.detach() for name, parameter in model.named_parameters()} if ranks.is_main else {}
    shard(model, ranks, compute_dtype)
    parameters: Any = model.named_parameters()
    for name, parameter in parameters:
        whole = source.pop(name) if ranks.is_main else torch.empty(parameter.shape, dtype=parameter.dtype)
        scattered = distribute_tensor(whole.to(ranks.device), parameter.device_mesh, parameter.placements)
        local(parameter).copy_(local(scattered))
    for name, buffer in model.named_buffers():
        model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer.to(ranks.device)
    return model


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def whole_weights(model: PreTrainedModel, ranks: Ranks) -> dict[str, Tensor]:
    """The state by name; gathered on the main process, one tensor after the other, empty on the others."""
    release(model)
    if not isinstance(model, FSDPModule):
        return model.state_dict() if ranks.is_main else {}
    weights: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # by identity: a tied weight has several
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first == name:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if ranks.is_main:
            weights[name] = whole.detach().cpu() if first == name else weights[first]
    return weights
