"""Ways to one answer that `bench cpu` compares: ours by mode, and those that users have today.

A provider builds a step from a case's inputs: a function without arguments that returns what the task asks for,
(loss, dH, dW) or log-probs (K, N). Its `bound` is the relative error against float64 beyond which it counts as wrong.

Legend: N tokens, V vocabulary, H hidden, K contexts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mopd_kernels import Execution, grouped_logprobs, linear_divergence

from .cases import Case, Inputs

Step = Callable[[], tuple[Tensor, ...]]
TOP_K = 100
ROUNDING = 2e-4  # relative error of float32 sums over 10^5 terms, with room


@dataclass(frozen=True)
class Provider:
    build: Callable[[Case, Inputs], Step]
    tasks: tuple[str, ...]
    bound: float = ROUNDING
    approximate: bool = False


def _gradients(loss: Tensor, p: Inputs) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, (p.hidden, p.weight)))


def ours(backend: str, grad_filter: float = 0.0) -> Callable[[Case, Inputs], Step]:
    def build(case: Case, p: Inputs) -> Step:
        execution = Execution(backend=backend, grad_filter=grad_filter)
        top_k = TOP_K if case.task == "topk" else None

        def divergence() -> tuple[Tensor, ...]:
            out = linear_divergence(
                p.hidden, p.weight, p.teacher_hidden[0], p.teacher_weight,
                alpha=case.alpha, top_k=top_k, execution=execution,
            )  # fmt: skip
            return _gradients(out.loss, p)

        def score() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (grouped_logprobs(p.teacher_hidden, p.teacher_weight, p.labels, execution=execution).logprobs,)

        return score if case.task == "score" else divergence

    return build


def divergence_of_logprobs(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """As a user writes it, without guards for impossible tokens. (..., V) -> (...)"""
    if alpha == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if alpha == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_q + math.log1p(-alpha), log_p + math.log(alpha))
    student, teacher = (log_q.exp() * (log_q - log_m)).sum(-1), (log_p.exp() * (log_p - log_m)).sum(-1)
    return (1 - alpha) * student + alpha * teacher


def dense_divergence(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, alpha: float) -> Tensor:
    log_q, log_p = (hidden @ weight.T).log_softmax(-1), (teacher @ teacher_weight.T).log_softmax(-1)
    return divergence_of_logprobs(log_q, log_p, alpha).mean()


def official_topk(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, alpha: float) -> Tensor:
    """The formulation of the method's own code: full logits, the student's top-k, a tail bucket."""
    z_s, z_t = hidden @ weight.T, teacher @ teacher_weight.T
    support = z_s.detach().topk(TOP_K, dim=-1).indices

    def buckets(z: Tensor) -> Tensor:
        top = z.gather(-1, support) - z.logsumexp(-1, keepdim=True)
        rest = -torch.expm1(top.logsumexp(-1, keepdim=True).clamp(max=-1e-7))
        return torch.cat([top, rest.log()], dim=-1)

    return divergence_of_logprobs(buckets(z_s), buckets(z_t), alpha).mean()


def dense_score(teacher: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    """(K, N)"""
    rows = [F.cross_entropy(states @ teacher_weight.T, labels, reduction="none") for states in teacher]
    return -torch.stack(rows)


def plain(wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Callable[[Case, Inputs], Step]:
    def build(case: Case, p: Inputs) -> Step:
        if case.task == "score":
            score = wrap(dense_score)

            def scored() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (score(p.teacher_hidden, p.teacher_weight, p.labels),)

            return scored
        loss = wrap(official_topk if case.task == "topk" else dense_divergence)
        return lambda: _gradients(loss(p.hidden, p.weight, p.teacher_hidden[0], p.teacher_weight, case.alpha), p)

    return build


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()  # each case has its own shapes: no recompilation for dynamic ones
    return torch.compile(function, dynamic=False)


def liger(chunk: int) -> Callable[[Case, Inputs], Step]:
    def build(case: Case, p: Inputs) -> Step:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

        def step() -> tuple[Tensor, ...]:
            loss = LigerFusedLinearJSDFunction.apply(
                p.hidden, p.weight, p.teacher_hidden[0], p.teacher_weight, p.labels,
                None, None, 0.0, 1.0, case.alpha, -100, 1.0, False, chunk,
            )  # fmt: skip
            return _gradients(loss, p)

        return step

    return build


def trl(case: Case, p: Inputs) -> Step:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def step() -> tuple[Tensor, ...]:
        per_token, _ = ChunkedDivergenceFunction.apply(
            p.hidden, p.weight, None, p.teacher_hidden[0], p.teacher_weight, None,
            case.alpha, 1.0, 1.0, None, 1.0, None,
        )  # fmt: skip
        return _gradients(per_token.mean(), p)

    return step


def cce(case: Case, p: Inputs) -> Step:
    from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            rows = [
                torch_compile_linear_cross_entropy(states, p.teacher_weight, p.labels, reduction="none")
                for states in p.teacher_hidden
            ]
            return (-torch.stack(rows),)

    return step


def floor(case: Case, p: Inputs) -> Callable[[], None]:
    """The plain GEMMs that any exact answer needs, into memory that is there already."""
    states, weight, teacher_weight = p.hidden.detach(), p.weight.detach(), p.teacher_weight
    logits = torch.empty(case.N, case.V)
    if case.task == "score":

        def products() -> None:
            for context in p.teacher_hidden:
                torch.mm(context, teacher_weight.T, out=logits)

        return products
    teacher_logits, grad_hidden, grad_weight = (torch.empty_like(x) for x in (logits, states, weight))

    def four() -> None:
        torch.mm(states, weight.T, out=logits)
        torch.mm(p.teacher_hidden[0], teacher_weight.T, out=teacher_logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, states, out=grad_weight)

    return four


ALL = ("divergence", "topk", "score")
PROVIDERS: dict[str, Provider] = {
    "ours, exact": Provider(ours("cpu"), ALL),
    "ours, filter 1e-7": Provider(ours("cpu", 1e-7), ("divergence",), bound=3e-3, approximate=True),
    "ours, filter 1e-6": Provider(ours("cpu", 1e-6), ("divergence",), bound=1e-2, approximate=True),
    "ours, eager backend": Provider(ours("eager"), ALL),
    "dense": Provider(plain(lambda function: function), ALL),
    "torch.compile of dense": Provider(plain(compiled), ALL),
    "Liger, chunk 64": Provider(liger(64), ("divergence",)),
    "Liger, chunk 128": Provider(liger(128), ("divergence",)),
    "Liger, chunk 256": Provider(liger(256), ("divergence",)),
    "Liger, chunk 1024": Provider(liger(1024), ("divergence",)),
    "TRL chunked": Provider(trl, ("divergence",)),
    "CCE torch_compile": Provider(cce, ("score",)),
}
