"""The loop over chunks of tokens for the log-prob of given labels, entropy and logsumexp.

Legend: N tokens, M kept tokens, C chunk, V vocabulary rows held here, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .chunked import chunks
from .projection import Buffers, Gradients, Needs, Projection
from .spec import accumulation_dtype
from .vocab_parallel import Ranks


@dataclass(frozen=True)
class LogprobProblem:
    """One call of `linear_logprobs` after all checks."""

    hidden: Tensor  # (N, H)
    head: Projection
    labels: Tensor  # (N,)
    kept: Tensor  # (M,)
    backend: ModuleType
    ranks: Ranks
    chunk: int

    def buffers(self) -> Buffers:
        column_major = getattr(self.backend, "COLUMN_MAJOR", False)
        return Buffers(self.chunk, self.head.weight.size(0), self.hidden, 1, column_major)


def logprobs_forward(problem: LogprobProblem) -> Tensor:
    """(3, N): log-prob of the label, entropy and logsumexp of each kept token."""
    dtype = accumulation_dtype(problem.hidden.dtype)
    result = problem.hidden.new_zeros(3, problem.hidden.size(0), dtype=dtype)
    buffers = problem.buffers()
    for index in chunks(problem.kept, problem.chunk):
        z = buffers.project(0, problem.head, problem.hidden[index])
        side = problem.ranks.side(problem.backend.side_stats(z, problem.labels[index], problem.head.start))
        lse = side.logsumexp
        result[:, index] = torch.stack([side.label - lse, side.entropy, lse])
    return result


def logprobs_backward(
    problem: LogprobProblem,
    result: Tensor,  # (3, N) of the forward
    grads: Tensor,  # (3, N)
    needs: Needs,
) -> Gradients:
    gradients = Gradients.empty(problem.hidden, problem.head, needs)
    buffers = problem.buffers()
    for index in chunks(problem.kept, problem.chunk):
        hidden = problem.hidden[index]
        z = buffers.project(0, problem.head, hidden)
        upstream = tuple(grads[:, index])
        _, entropy, lse = result[:, index]
        cap, start = problem.head.cap, problem.head.start
        problem.backend.logprob_grad_(z, lse, entropy, problem.labels[index], start, upstream, cap)
        add_product = getattr(problem.backend, "add_product_", None)
        gradients.add(index, z, hidden, problem.head, buffers, add_product)
    gradients.complete(problem.head)
    problem.ranks.reduce(gradients.hidden)
    return gradients
