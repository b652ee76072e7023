"""The second model of a method, scored without gradients: a teacher that reads peers, or a fixed reference.

Legend: N completion tokens of a micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mopd_kernels import LMHead, trust_region_teacher

from .config import Config
from .models import check_same_tokenizer, load_model, load_tokenizer
from .objectives import Example, method_of
from .scoring import completion_hidden


def build_teacher(
    config: Config, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | None:
    """The weights that the method needs beside the student's; None where it needs none, the student for `self`.

    ema: a copy that `update_ema` moves. trust-region, and the reference of DPO: the initial student, always from
    model.model_name_or_path, so that a resumed run has the same. frozen: teacher_model_name_or_path or that.
    """
    kind, settings = method_of(config).teacher, config.distillation
    if kind is None:
        return None
    if kind == "context" and settings.teacher_regularization == "self":
        return student
    name = settings.teacher_model_name_or_path if kind == "context" else None
    if name is not None:
        check_same_tokenizer(tokenizer, load_tokenizer(name), name)
    dtype = settings.teacher_dtype or ("float32" if moves(config) else config.model.dtype)
    device = "cpu" if settings.teacher_offload else student.device
    path = name or config.model.model_name_or_path
    teacher = load_model(path, dtype, config.model.attn_implementation, device).requires_grad_(False)
    LMHead.from_model(teacher)  # refuses heads that the loss cannot use
    if mixes(config) and LMHead.from_model(student).softcap is not None:
        raise ValueError(
            "distillation.teacher_regularization=trust-region mixes logits, which a softcap (here "
            f"{LMHead.from_model(student).softcap}) does not allow: choose ema or frozen"
        )
    return teacher


def moves(config: Config) -> bool:
    """Whether the teacher changes during training and so belongs to the checkpoint."""
    return method_of(config).teacher == "context" and config.distillation.teacher_regularization == "ema"


def mixes(config: Config) -> bool:
    """Whether the teacher's logits are a mixture of the reference's and the student's."""
    return method_of(config).teacher == "context" and config.distillation.teacher_regularization == "trust-region"


@torch.no_grad()
def update_ema(teacher: PreTrainedModel, student: PreTrainedModel, rate: float) -> None:
    """teacher <- (1 - rate) teacher + rate student, parameter by parameter; tied ones once."""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.lerp_(theirs.to(ours), rate)


@contextmanager
def on_device(model: PreTrainedModel, device: torch.device, home: torch.device) -> Iterator[None]:
    """The model's weights on `device` within the block, at `home` after it."""
    model.to(device)  # type: ignore[arg-type]  # transformers' decorated signature
    try:
        yield
    finally:
        model.to(home)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scored:
    """What the second model says of a micro-batch."""

    hidden: Tensor  # (N, H)
    head: LMHead
    computed: int  # tokens that went through a model


class SecondModel:
    """Scores the micro-batches of one step; heads are built once, while the student stands still."""

    def __init__(self, model: PreTrainedModel | None, student: PreTrainedModel, config: Config, pad_id: int) -> None:
        self.model, self.student, self.config, self.pad_id = model, student, config, pad_id
        self.home = torch.device("cpu")  # of offloaded weights
        self.head: LMHead | None = None
        self.mixed: LMHead | None = None

    def scores(self, batches: list[list[Example]]) -> Iterator[Scored | None]:
        """One a micro-batch, in order, each when it is asked for; None where the method has no second model.

        Offloaded weights visit the device once: all batches are scored then, and their states wait in CPU memory.
        """
        if self.model is None:
            yield from (None for _ in batches)
        elif not self.config.distillation.teacher_offload:
            for batch in batches:
                yield self._score(batch)
        else:
            device = self.student.device
            with on_device(self.model, device, self.home):
                waiting = [self._score(batch) for batch in batches]
                waiting = [replace(scored, hidden=scored.hidden.cpu()) for scored in waiting]
            for scored in waiting:
                yield replace(scored, hidden=scored.hidden.to(device))

    @torch.no_grad()
    def _score(self, batch: list[Example]) -> Scored:
        assert self.model is not None
        hidden, computed = self._hidden(self.model, batch)
        hidden = hidden.to(self.student.dtype)
        if self.head is None:
            self.head = _constant(LMHead.from_model(self.model), LMHead.from_model(self.student))
        if not mixes(self.config):
            return Scored(hidden, self.head, computed)
        student_hidden, more = self._hidden(self.student, batch)
        rate = self.config.distillation.teacher_update_rate
        self.mixed, hidden = trust_region_teacher(
            self.head, hidden, LMHead.from_model(self.student), student_hidden, rate, mixed_head=self.mixed
        )
        return Scored(hidden, self.mixed, computed + more)

    def _hidden(self, model: PreTrainedModel, batch: list[Example]) -> tuple[Tensor, int]:
        prompts = [example.teacher_prompt_ids for example in batch]
        completions = [example.rollout.token_ids for example in batch]
        settings = self.config.training
        return completion_hidden(model, prompts, completions, self.pad_id, settings.tree, settings.max_pack_tokens)


def _constant(head: LMHead, student: LMHead) -> LMHead:
    """The head as it is now, in the student's precision: it keeps its tensors when the model moves away. One
    tokenizer serves both models, so rows past the smaller head are padding, however many."""
    dtype = student.weight.dtype
    rows = min(head.weight.size(0), student.weight.size(0))
    differs = head.shard is None and head.weight.size(0) != student.weight.size(0)
    return replace(
        head,
        weight=head.weight.detach().to(dtype),
        bias=None if head.bias is None else head.bias.detach().to(dtype),
        vocab_size=min(rows, head.vocab_size or rows) if differs else head.vocab_size,
    )
