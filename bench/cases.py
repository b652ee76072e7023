"""Named problems: shapes of known models scaled to fit a machine of two cores, and SmolLM2 with hidden states of real
rollouts.

Legend: N tokens, V vocabulary, H hidden, K contexts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import hidden as real


@dataclass(frozen=True)
class Case:
    """task: "divergence" (forward and backward with dW), "topk" (the same on the student's support of 100) or
    "score" (log-probs of K contexts, no gradients). states: "real" SmolLM2 or "drawn"."""

    task: str
    N: int
    H: int
    V: int
    alpha: float = 1.0
    K: int = 1
    states: str = "drawn"
    products: int = 4  # of the floor: plain GEMMs that any exact answer needs


REAL = Case("divergence", N=1024, H=576, V=49152, states="real")
CASES = {
    "smollm2": REAL,
    "smollm2, JSD": replace(REAL, alpha=0.5),
    "smollm2, forward KL": replace(REAL, alpha=0.0),
    "smollm2, top-100": replace(REAL, task="topk", alpha=0.5),
    "smollm2, scoring": replace(REAL, task="score", products=1),
    "smollm2, scoring 4 contexts": replace(REAL, task="score", N=512, K=4, products=4),
    "qwen3-0.6b": Case("divergence", N=192, H=1024, V=151936),
    "llama-3.2-1b": Case("divergence", N=128, H=2048, V=128256),
    "gemma-3-270m, JSD": Case("divergence", N=192, H=640, V=262144, alpha=0.5),
}
QUICK = {
    "smollm2": replace(REAL, N=256),
    "smollm2, scoring": replace(REAL, N=256, task="score", products=1),
}


@dataclass
class Inputs:
    hidden: Tensor  # (N, H), leaf
    weight: Tensor  # (V, H), leaf
    teacher_hidden: Tensor  # (K, N, H)
    teacher_weight: Tensor  # (V, H)
    labels: Tensor  # (N,)

    def cut(self, N: int, V: int) -> Inputs:
        """The first N tokens and V vocabulary rows."""
        return Inputs(
            self.hidden.detach()[:N].clone().requires_grad_(),
            self.weight.detach()[:V].clone().requires_grad_(),
            self.teacher_hidden[:, :N].clone(),
            self.teacher_weight[:V].clone(),
            self.labels[:N] % V,
        )


def inputs(case: Case) -> Inputs:
    if case.states == "real":
        found = real.smollm2()
        student, teacher, labels, weight = found.student, found.teacher, found.labels, found.weight
    else:
        student, teacher, labels, weight = _drawn(case)
    N = case.N
    contexts = [teacher[:N]] + [student[:N] + (k + 1) / case.K * (teacher - student)[:N] for k in range(1, case.K)]
    return Inputs(
        student[:N].clone().requires_grad_(),
        weight.requires_grad_(),
        torch.stack(contexts),
        weight.detach().clone(),
        labels[:N],
    )


def _drawn(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Peaked, near-equal distributions: states point at a label's row; the teacher's are a little elsewhere."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(case.V, case.H) / case.H**0.5
    labels = torch.randint(0, case.V, (case.N,), generator=generator)
    student = 12 * weight[labels] + 2 * normal(case.N, case.H)
    return student, student + 0.5 * normal(case.N, case.H), labels, weight
