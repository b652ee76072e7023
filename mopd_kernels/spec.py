"""What the ops are given and what they return. Frozen dataclasses, no arithmetic.

Legend: N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SAVE = ("auto", "gradients", "statistics")


@dataclass(frozen=True)
class VocabShard:
    """This rank holds the vocabulary rows from `start` on; shards may be uneven.

    group: the process group that the vocabulary is split over, None for the default one.
    """

    start: int
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"expected VocabShard.start >= 0, got {self.start}")


@dataclass(frozen=True, eq=False)  # tensors have no one answer to ==
class LMHead:
    """Logits from hidden states: u = h Wᵀ + b; x = scale·u; z = softcap·tanh(x / softcap) or x.

    vocab_size: rows at or past it are padding and count as -inf. It is the global size where the
    head is one shard of a split vocabulary.
    """

    weight: Tensor  # (V_local, H)
    bias: Tensor | None = None  # (V_local,)
    softcap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None
    shard: VocabShard | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"expected LMHead.weight of 2 dimensions (V, H), got shape {tuple(self.weight.shape)}")
        if not self.weight.is_floating_point():
            raise TypeError(f"expected a floating-point LMHead.weight, got {self.weight.dtype}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"expected LMHead.bias of shape ({self.weight.size(0)},), got {tuple(self.bias.shape)}")
        if self.bias is not None and self.bias.dtype != self.weight.dtype:
            raise TypeError(
                f"expected LMHead.bias in the weight's dtype {self.weight.dtype}, got {self.bias.dtype}: cast it with "
                f"bias.to({self.weight.dtype})"
            )
        if self.bias is not None and self.bias.device != self.weight.device:
            raise ValueError(
                f"expected LMHead.bias on the weight's device {self.weight.device}, got {self.bias.device}"
            )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"expected LMHead.softcap > 0 and finite, or None, got {self.softcap}")
        if self.scale == 0 or not math.isfinite(self.scale):
            raise ValueError(f"expected LMHead.scale != 0 and finite, got {self.scale}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"expected LMHead.vocab_size >= 1, got {self.vocab_size}")
        if self.shard is not None and self.vocab_size is None:
            raise ValueError("a head with a VocabShard needs LMHead.vocab_size, the rows of all ranks together")
        if self.shard is None and self.vocab_size is not None and self.vocab_size > self.weight.size(0):
            raise ValueError(
                f"expected LMHead.vocab_size <= {self.weight.size(0)} rows of the weight, got {self.vocab_size}"
            )

    @classmethod
    def from_model(cls, model: Any) -> LMHead:
        """The output head of a transformers causal language model.

        Reads the weight and bias of `get_output_embeddings()`, the softcap of Gemma, RecurrentGemma and xLSTM, and the
        factor that Cohere, Granite and others put on their logits. A tied embedding stays tied: its gradient arrives at
        the shared parameter. LoRA on lm_head gives W + s B A, with gradients to A and B. A DTensor split over the
        vocabulary gives this rank's rows and their VocabShard.

        Raises ValueError where the model has no such head, or has it in a form that is not one matrix here (DoRA,
        adapter dropout, FSDP shards), with what to do instead.
        """
        from .model_heads import head_of

        return head_of(model)


@dataclass(frozen=True)
class Execution:
    """How an op is run. None of it changes the result, except `grad_filter`.

    backend: "cpu", "eager", "triton", "triton-tiles" or None to choose by device.
    chunk_tokens: rows of logits held at a time; None derives it from `memory_budget`.
    memory_budget: bytes for the logits buffers; None is 80 MiB on CPU and 1 GiB elsewhere.
    grad_filter: entries of a token's d(loss)/d(logits), before token weight and normalizer, with
        |g| <= grad_filter are dropped from dH and dW. 0 is exact.
    save: "gradients" computes dH and dW in the forward (4 products), "statistics" keeps a few
        floats per token and recomputes both logits in the backward (6 products; needed for a
        second backward). "auto" takes gradients where the loss is a scalar and hidden is not float16,
        whose small gradients would underflow before the loss scale reaches them.
    """

    backend: str | None = None
    chunk_tokens: int | None = None
    memory_budget: int | None = None
    grad_filter: float = 0.0
    save: str = "auto"

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"expected Execution.chunk_tokens >= 1, got {self.chunk_tokens}")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ValueError(f"expected Execution.memory_budget >= 1 byte, got {self.memory_budget}")
        if not self.grad_filter >= 0:
            raise ValueError(f"expected Execution.grad_filter >= 0, got {self.grad_filter}")
        if self.save not in SAVE:
            raise ValueError(f"expected Execution.save in {SAVE}, got {self.save!r}")


@dataclass(frozen=True)
class Divergence:
    """Result of `linear_divergence`. Only `loss` carries gradients; tokens left out hold 0."""

    loss: Tensor  # () or, with reduction="none", (...) times token_weights
    per_token: Tensor  # (...) unweighted divergence in nats, detached
    student_entropy: Tensor  # (...) nats
    teacher_entropy: Tensor  # (...) nats
    top1_agreement: Tensor  # (...) 1.0 where both argmax are the same row
    student_logprobs: Tensor | None = None  # (...) of `labels`, nats
    teacher_logprobs: Tensor | None = None  # (...) of `labels`, nats
    student_topk_mass: Tensor | None = None  # (...) probability of the support, with top_k
    teacher_topk_mass: Tensor | None = None  # (...)


@dataclass(frozen=True)
class LogProbs:
    """Result of `linear_logprobs`, all in nats and all differentiable; tokens left out hold 0."""

    logprobs: Tensor  # (...)
    entropy: Tensor  # (...)
    logsumexp: Tensor  # (...)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything below is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
