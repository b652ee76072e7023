"""The ways to one loss that `bench gpu` compares. A provider makes a step: forward and backward of one problem,
returning the loss, dH and dW.

    divergence   Jensen-Shannon at alpha 0.5, mean over tokens: ours by both backends, dense, torch.compile, Liger
    logprobs     mean -log q[label]: ours by both backends, dense, torch.compile, Liger, CCE (exact)

Legend: N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mopd_kernels import Execution, linear_divergence, linear_logprobs
from mopd_kernels.losses import LOSSES

ALPHA = 0.5
Step = Callable[[], tuple[Tensor, Tensor, Tensor]]
Loss = Callable[["Problem"], Tensor]


@dataclass
class Problem:
    hidden: Tensor  # (N, H), leaf
    weight: Tensor  # (V, H), leaf
    teacher_hidden: Tensor  # (N, H)
    teacher_weight: Tensor  # (V, H)
    labels: Tensor  # (N,)

    @classmethod
    def random(cls, tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype, device: str) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

        return cls(
            normal(tokens, hidden, std=1.0).requires_grad_(),
            normal(vocabulary, hidden, std=2 / hidden**0.5).requires_grad_(),
            normal(tokens, hidden, std=1.0),
            normal(vocabulary, hidden, std=2 / hidden**0.5),
            torch.randint(0, vocabulary, (tokens,), generator=generator, device=device),
        )

    def first(self, tokens: int, dtype: torch.dtype) -> Problem:
        """A copy of the first tokens, in another precision."""
        return Problem(
            self.hidden[:tokens].detach().to(dtype).requires_grad_(),
            self.weight.detach().to(dtype).requires_grad_(),
            self.teacher_hidden[:tokens].to(dtype),
            self.teacher_weight.to(dtype),
            self.labels[:tokens],
        )


def ours_divergence(backend: str) -> Loss:
    def loss(p: Problem) -> Tensor:
        execution = Execution(backend=backend)
        out = linear_divergence(
            p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, alpha=ALPHA, execution=execution
        )
        return out.loss

    return loss


def ours_logprobs(backend: str) -> Loss:
    def loss(p: Problem) -> Tensor:
        return -linear_logprobs(p.hidden, p.weight, p.labels, execution=Execution(backend=backend)).logprobs.mean()

    return loss


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def dense_divergence(p: Problem) -> Tensor:
    student, teacher = _wide(p.hidden @ p.weight.T), _wide(p.teacher_hidden @ p.teacher_weight.T)
    return LOSSES["divergence"](student, teacher, ALPHA).mean()


def dense_logprobs(p: Problem) -> Tensor:
    return torch.nn.functional.cross_entropy(_wide(p.hidden @ p.weight.T), p.labels)


def liger_divergence(p: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=ALPHA)(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight)


def liger_logprobs(p: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(p.weight, p.hidden, p.labels)


def cce_logprobs(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(p.hidden, p.weight, p.labels, filter_eps=None)


PROVIDERS: dict[str, dict[str, Loss]] = {
    "divergence": {
        "ours, rows": ours_divergence("triton"),
        "ours, tiles": ours_divergence("triton-tiles"),
        "ours, eager": ours_divergence("eager"),
        "dense": dense_divergence,
        "torch.compile": torch.compile(dense_divergence),
        "Liger": liger_divergence,
    },
    "logprobs": {
        "ours, rows": ours_logprobs("triton"),
        "ours, tiles": ours_logprobs("triton-tiles"),
        "ours, eager": ours_logprobs("eager"),
        "dense": dense_logprobs,
        "torch.compile": torch.compile(dense_logprobs),
        "Liger": liger_logprobs,
        "CCE": cce_logprobs,
    },
}
ORACLE = {"divergence": dense_divergence, "logprobs": dense_logprobs}
PACKAGES = {"Liger": "liger_kernel", "CCE": "cut_cross_entropy"}


def missing(provider: str, dry: bool) -> str | None:
    """Why a provider cannot run here."""
    package = PACKAGES.get(provider)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install mopd[bench])"
    if dry and (package is not None or provider == "torch.compile"):
        return "left out of a dry run: needs a GPU to mean anything"
    return None


def step_of(loss: Loss, problem: Problem) -> Step:
    def step() -> tuple[Tensor, Tensor, Tensor]:
        value = loss(problem)
        hidden, weight = torch.autograd.grad(value, [problem.hidden, problem.weight])
        return value.detach(), hidden, weight

    return step
