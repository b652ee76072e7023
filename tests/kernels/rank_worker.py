"""What runs inside the processes of test_vocab_parallel.py: importable, because they are started, not forked.

Legend: P ranks; the vocabulary is cut at `bounds`, P + 1 row indices.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from mopd_kernels import Execution, LMHead, VocabShard, grouped_logprobs, linear_logprobs
from tests.kernels import problems
from tests.kernels.problems import Problem, Result


@dataclass(frozen=True)
class Split:
    problem: Problem
    bounds: tuple[int, ...]
    reduction: str = "sum"


def start(processes: int, work: Callable[..., Any], arguments: list[Any], folder: Path, timeout: float = 60) -> Any:
    """By rank and argument, the result of work(rank, argument) or the exception it raised; None for a rank that
    died. The ranks are gloo processes of one machine."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mopd_kernels", "tests.kernels.rank_worker"])
    ranks = [
        context.Process(target=_enter, args=(rank, processes, work, arguments, str(folder), timeout))
        for rank in range(processes)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        assert process.exitcode is not None, "a rank hangs"
    files = [folder / f"{rank}.pt" for rank in range(processes)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _enter(rank: int, size: int, work: Callable[..., Any], arguments: list[Any], folder: str, timeout: float) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    dist.barrier()  # a short timeout is meant for the work, not for starting processes on a busy machine
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), dist.group.WORLD)
    torch.save([_outcome(work, rank, argument) for argument in arguments], f"{folder}/{rank}.pt")


def _outcome(work: Callable[..., Any], rank: int, argument: Any) -> Any:
    try:
        return work(rank, argument)
    except Exception as error:  # the tests assert on its type and text
        return error


def shard(problem: Problem, inputs: dict[str, torch.Tensor], bounds: tuple[int, ...], rank: int) -> dict[str, Any]:
    """This rank's leaves. The last rank holds the padding rows as well."""
    last = rank == len(bounds) - 2
    first, stop = bounds[rank], None if last else bounds[rank + 1]
    cut = ("student_weight", "teacher_weight", "student_bias", "teacher_bias")
    return problems.leaves_of(
        problem, {name: value[first:stop] if name in cut else value for name, value in inputs.items()}
    )


def heads(problem: Problem, leaves: dict[str, Any], start: int) -> tuple[LMHead, LMHead]:
    return problems.heads_of(problem, leaves, VocabShard(start))


def divergence(rank: int, split: Split) -> Result:
    problem = split.problem
    inputs = problems.tensors(problem)
    leaves = shard(problem, inputs, split.bounds, rank)
    return problems.fused(problem, inputs, split.reduction, leaves, heads(problem, leaves, split.bounds[rank]))


def recorded_divergence(rank: int, split: Split) -> tuple[Result, list[tuple[str, int]]]:
    with recorded() as collectives:
        result = divergence(rank, split)
    return result, collectives


@contextmanager
def recorded():  # type: ignore[no-untyped-def]
    """(operation, bytes this rank contributes) of every collective called inside."""
    calls: list[tuple[str, int]] = []
    originals = dist.all_gather, dist.all_reduce

    def gather(output: list[torch.Tensor], part: torch.Tensor, **options: Any) -> Any:
        calls.append(("gather", part.nbytes))
        return originals[0](output, part, **options)

    def reduce(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(("reduce", tensor.nbytes))
        return originals[1](tensor, *arguments, **options)

    dist.all_gather, dist.all_reduce = gather, reduce
    try:
        yield calls
    finally:
        dist.all_gather, dist.all_reduce = originals


def logprobs(rank: int, split: Split) -> list[torch.Tensor]:
    """Log-probs, entropy, logsumexp and the gradients of their weighted sum, hidden (K, N, H) if K."""
    problem = split.problem
    inputs = problems.tensors(problem)
    names = ("student_hidden", "student_weight")
    leaves = {name: inputs[name] for name in names}
    if problem.K:
        leaves["student_hidden"] = inputs["student_hidden"] * torch.arange(1, problem.K + 1)[:, None, None]
    if split.bounds:
        leaves["student_weight"] = leaves["student_weight"][split.bounds[rank] : split.bounds[rank + 1]]
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    place = VocabShard(split.bounds[rank]) if split.bounds else None
    head = LMHead(leaves["student_weight"], softcap=problem.softcap, vocab_size=problem.V, shard=place)
    op = grouped_logprobs if problem.K else linear_logprobs
    out = op(leaves["student_hidden"], head, inputs["labels"], execution=problem.execution)
    parts = [out.logprobs, out.entropy, out.logsumexp]
    total = sum(
        (factor * (part * inputs["upstream"]).sum() for factor, part in zip((1, 0.5, -0.3), parts, strict=True))
    )
    return [*(part.detach() for part in parts), *torch.autograd.grad(total, list(leaves.values()))]


def disagree(rank: int, how: str) -> Result:
    """Rank 1 calls with something that the others do not have."""
    changed = rank == 1
    problem = Problem(V=12)
    bounds = (0, 5, 12)
    if changed and how in CHANGES:
        problem = replace(problem, **CHANGES[how])
    inputs = problems.tensors(problem)
    leaves = shard(problem, inputs, bounds, rank)
    start = bounds[rank] + (1 if changed and how == "gap" else 0)
    if how in OPTIONS:
        return _with_options(problem, leaves, heads(problem, leaves, start), OPTIONS[how][rank])
    if changed and how == "gap":
        leaves = {n: v[1:].detach() if n.endswith("weight") else v for n, v in leaves.items()}
    if changed and how == "refused":
        leaves["student_hidden"] = leaves["student_hidden"][:, :3]
    if changed and how == "dead":
        os._exit(1)
    if changed and how == "asleep":
        time.sleep(4)
    if changed and how == "logprobs":
        head = heads(problem, leaves, start)[0]
        return linear_logprobs(leaves["student_hidden"], head, torch.zeros(problem.N, dtype=torch.int64)).logprobs
    return problems.call(problem, leaves, "sum", heads=heads(problem, leaves, start)).loss.detach()


def _with_options(
    problem: Problem, leaves: dict[str, Any], both: tuple[LMHead, LMHead], options: dict[str, Any]
) -> torch.Tensor:
    if "grouped" in options:
        hidden, labels = leaves["student_hidden"].expand(2, -1, -1), torch.zeros(options["grouped"], dtype=torch.int64)
        return grouped_logprobs(hidden, both[0], labels).logprobs.detach()
    options = dict(options)
    teacher, reduction = options.pop("teacher", both[1]), options.pop("reduction", "sum")
    return problems.call(problem, leaves, reduction, (both[0], teacher), **options).loss.detach()


# Arguments of rank 0 and rank 1.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "backend": ({}, {"execution": Execution(backend="fast")}),
    "tiles with top-k": ({"top_k": 3}, {"top_k": 3, "execution": Execution(backend="triton-tiles")}),
    "save": ({"reduction": "none"}, {"reduction": "none", "execution": Execution(save="gradients")}),
    "no head": ({}, {"teacher": "head"}),
    "grouped": ({"grouped": 9}, {"grouped": 8}),
    "token weights": ({"token_weights": torch.ones(9)}, {"token_weights": torch.full((9,), 2.0)}),
    "teacher dtype": ({}, {"teacher": LMHead(torch.ones(7, 6))}),
}
CHANGES: dict[str, dict[str, Any]] = {
    "tokens": {"N": 8},
    "hidden": {"Hs": 5},
    "alpha": {"alpha": 0.25},
    "top_k": {"top_k": 3},
    "contexts": {"K": 2},
    "labels": {"labels": True},
    "weights": {"weights": True},
    "temperature": {"temperature": 0.5},
}


def split_model() -> tuple[torch.nn.Module, torch.Tensor]:
    """Something with an lm_head of 37 rows, and hidden states for it."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(5, 37, bias=False)
    model.get_output_embeddings = lambda: model.lm_head
    model.config = SimpleNamespace(get_text_config=SimpleNamespace)
    return model, torch.randn(6, 5)


def from_split_model(rank: int, _: None) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Log-probs, the shard's start and the local gradient, of a weight that is a DTensor over all ranks."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    model, hidden = split_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight, mesh, [Shard(0)]))
    head = LMHead.from_model(model)
    logprobs = linear_logprobs(hidden, head, torch.arange(6) % 37).logprobs
    logprobs.sum().backward()
    return logprobs.detach(), head.shard.start, model.lm_head.weight.grad.to_local()


class SmallModel(torch.nn.Module):
    """A trunk and a head; with `loss`, the log-probs of fixed labels are summed inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.lm_head = torch.nn.Linear(5, 5), torch.nn.Linear(5, 36, bias=False)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def loss(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear_logprobs(hidden, LMHead.from_model(self), torch.arange(6) % 36).logprobs.sum()

    def forward(self, x: torch.Tensor, loss: bool = False) -> torch.Tensor:
        hidden = self.trunk(x)
        return self.loss(hidden) if loss else hidden


def fully_sharded(rank: int, _: None) -> tuple[str, list[torch.Tensor], list[torch.Tensor]]:
    """The refusal outside, and the gradients of all ranks' tokens by the two ways that it names."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    x, model = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))[rank], SmallModel()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        LMHead.from_model(model)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    model(x, loss=True).backward()
    inside = [parameter.grad.full_tensor() for parameter in model.parameters()]
    model.zero_grad()
    hidden = model(x)
    model.unshard()
    model.loss(hidden).backward()
    return refusal, inside, [parameter.grad.full_tensor() for parameter in model.parameters()]
