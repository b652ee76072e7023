"""The second model of a method, scored without gradients: a teacher that reads peers, or a fixed reference.

Legend: N completion tokens of a micro-batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mopd_kernels import LMHead, softcap_of, trust_region_teacher

from .config import Config
from .fsdp import local
from .models import check_same_tokenizer, load_model, load_tokenizer
from .objectives import Example, method_of


def build_teacher(
    config: Config,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    load: Callable[[str, str, torch.device], PreTrainedModel] | None = None,  # name, dtype, device; default: plainly
) -> PreTrainedModel | None:
    """The weights that the method needs beside the student's; None where it needs none, the student for `self`.

    ema: a copy that `update_ema` moves. trust-region, and the reference of DPO: the initial student, always from
    model.model_name_or_path, so that a resumed run has the same. frozen: teacher_model_name_or_path or that. With an
    adapter all of them share the student's weights (adapters.py).
    """
    kind, settings = method_of(config).teacher, config.distillation
    if kind is None:
        return None
    softcap = softcap_of(student.config.get_text_config())
    if mixes(config) and softcap is not None:
        raise ValueError(
            f"distillation.teacher_regularization=trust-region mixes logits, which a softcap (here {softcap}) does not "
            "allow: choose ema or frozen"
        )
    if config.model.use_peft or (kind == "context" and settings.teacher_regularization == "self"):
        return student
    name = settings.teacher_model_name_or_path if kind == "context" else None
    if name is not None:
        check_same_tokenizer(tokenizer, load_tokenizer(name), name)
    dtype = settings.teacher_dtype or ("float32" if moves(config) else config.model.dtype)
    device = torch.device("cpu") if settings.teacher_offload else student.device
    plain = partial(load_model, attn_implementation=config.model.attn_implementation)
    path = name or config.model.model_name_or_path
    teacher = load(path, dtype, device) if load else plain(path, dtype, device=device)
    return teacher.requires_grad_(False)


def moves(config: Config) -> bool:
    """Whether the teacher changes during training and so belongs to the checkpoint."""
    return method_of(config).teacher == "context" and config.distillation.teacher_regularization == "ema"


def mixes(config: Config) -> bool:
    """Whether the teacher's logits are a mixture of the reference's and the student's."""
    return method_of(config).teacher == "context" and config.distillation.teacher_regularization == "trust-region"


def adapter_of_teacher(config: Config) -> str:
    """How a model with an adapter becomes the teacher: without it where the initial student is meant."""
    reads = method_of(config).teacher == "context" and not mixes(config)
    return config.distillation.teacher_regularization if reads else "frozen"


@torch.no_grad()
def update_ema(teacher: PreTrainedModel, student: PreTrainedModel, rate: float) -> None:
    """teacher <- (1 - rate) teacher + rate student, parameter by parameter; tied ones once."""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        local(ours).lerp_(local(theirs).to(local(ours)), rate)  # under FSDP each process moves its shard


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


@dataclass
class SecondModel:
    """Scores the micro-batches of one step; what can be is built once, while the student stands still."""

    model: PreTrainedModel | None
    student: PreTrainedModel
    config: Config
    states: Callable[[PreTrainedModel, list[Example]], tuple[Tensor, int]]  # (N, H) under the teacher's context
    head_of: Callable[[PreTrainedModel], LMHead]  # after `states` of the same model
    as_teacher: Callable[[], AbstractContextManager[None]]  # within, a model with an adapter is the teacher
    dtype: torch.dtype  # of the student's states
    vocabulary: int  # rows that both heads have
    home: torch.device = field(default_factory=lambda: torch.device("cpu"))  # of offloaded weights
    mixed: LMHead | None = None

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
        with self.as_teacher():
            hidden, computed = self.states(self.model, batch)
            head = self._constant(self.head_of(self.model))
        hidden = hidden.to(self.dtype)
        if not mixes(self.config):
            return Scored(hidden, head, computed)
        student_hidden, more = self.states(self.student, batch)
        own = self._constant(self.head_of(self.student))
        rate = self.config.distillation.teacher_update_rate
        mixed, hidden = trust_region_teacher(head, hidden, own, student_hidden, rate, mixed_head=self.mixed)
        if mixed.weight.size(1) > own.weight.size(1):  # a copy, which no gather of shards can take away
            self.mixed = mixed
        return Scored(hidden, mixed, computed + more)

    def _constant(self, head: LMHead) -> LMHead:
        """The head as it is now, in the student's precision: it keeps its tensors when the model moves away. One
        tokenizer serves both models, so rows past the smaller head are padding, however many."""
        rows = min(self.vocabulary, head.vocab_size or self.vocabulary)
        return replace(
            head,
            weight=head.weight.detach().to(self.dtype),
            bias=None if head.bias is None else head.bias.detach().to(self.dtype),
            vocab_size=rows if head.shard is None else head.vocab_size,
        )
