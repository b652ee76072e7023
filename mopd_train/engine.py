"""How student and teacher are held and run: precision, sharding, split heads, adapters; what a loop calls instead of
the models themselves, so that one process and many read the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mopd_kernels import LMHead

from . import adapters, fsdp
from .config import Config
from .distributed import Ranks
from .teacher import adapter_of_teacher, update_ema


@dataclass
class Engine:
    """Student and teacher (one object where the teacher is the student, with or without an adapter)."""

    config: Config
    ranks: Ranks
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    vocabulary: int  # rows that both heads have

    @property
    def sharded(self) -> bool:
        return self.config.model.sharding == "fsdp"

    @property
    def loss_dtype(self) -> torch.dtype:
        """Of the hidden states and heads that the loss is given."""
        return self.low_precision or self.student.dtype

    @property
    def low_precision(self) -> torch.dtype | None:
        """Of forwards and losses, where it differs from that of the weights."""
        return torch.bfloat16 if self.config.training.mixed_precision == "bf16" else None

    def through(
        self, model: PreTrainedModel, compute: Callable[[], tuple[Tensor, int]]
    ) -> tuple[Tensor, int]:  # hidden (N, H), tokens computed
        """compute(), which calls the trunk of `model`, in the run's precision; with gradients, under checkpointing."""
        with ExitStack() as stack:
            stack.enter_context(self._precision())
            if torch.is_grad_enabled() and self.config.model.gradient_checkpointing:
                stack.enter_context(_recomputing(model))
            hidden, tokens = fsdp.through(model, self.ranks, compute)
        return hidden.to(self.low_precision or hidden.dtype), tokens

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Around everything that samples from the student."""
        with self._precision(), fsdp.sampling_in_step(self.student, self.ranks):
            yield

    def _precision(self) -> Any:
        # FSDP casts weights as it gathers them, which autocast would repeat for every product.
        wanted = self.low_precision if not self.sharded else None
        return torch.autocast(self.ranks.device.type, wanted or torch.bfloat16, enabled=wanted is not None)

    def head(self, model: PreTrainedModel) -> LMHead:
        """After a `through` of the same model: its head, or this process's rows of it, as the loss takes them."""
        head = self.ranks.rows_of(LMHead.from_model(model), self.vocabulary)
        dtype = self.low_precision or head.weight.dtype
        return replace(head, weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))

    def in_step(self, batches: list[Any]) -> list[Any]:
        """Sharded: as many batches as on the process that has most, the missing ones empty."""
        return batches + [[]] * (self.ranks.most(len(batches)) - len(batches)) if self.sharded else batches

    def nothing(self, hidden: Tensor, head: LMHead) -> Tensor:
        """A loss of zero that reaches every weight, as sharded gradients are reduced by all processes."""
        return 0 * (hidden.sum() + head.weight.sum() + (0 if head.bias is None else head.bias.sum()))

    def as_teacher(self) -> Any:
        """Within, `teacher` has the teacher's adapter (where it shares the student's weights)."""
        return adapters.as_teacher(self.student, adapter_of_teacher(self.config))

    def reduce_and_clip(self, max_norm: float) -> float:
        """Gradients of the whole step on every process, scaled down to `max_norm`; their norm before."""
        trained = [p for p in self.student.parameters() if p.requires_grad]
        if not self.sharded:
            self.ranks.sum_gradients(trained)
        norm: Any = torch.nn.utils.clip_grad_norm_(trained, max_norm)
        return float(norm.full_tensor() if self.sharded else norm)

    def update_teacher(self, rate: float) -> None:
        """One EMA step, shard by shard."""
        if self.config.model.use_peft:
            adapters.update_ema(self.student, rate)
            return
        assert self.teacher is not None
        fsdp.release(self.student)
        fsdp.release(self.teacher)
        update_ema(self.teacher, self.student, rate)


@contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Checkpointed layers recompute in training mode only, which models here are never in (no dropout)."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def enable_checkpointing(model: PreTrainedModel) -> None:
    """ValueError for a model that would drop out activations in training mode."""
    rates = {
        name: value
        for name, value in model.config.get_text_config().to_dict().items()
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0
    }
    if rates:
        raise ValueError(
            f"model.gradient_checkpointing runs layers in training mode, and this model has {rates}: set it to false, "
            "or these rates to 0 in the model's config.json"
        )
    new_name = getattr(model, "activation_checkpointing_enable", None)  # the old one warns where the new one exists
    (new_name or model.gradient_checkpointing_enable)()
