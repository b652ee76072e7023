"""Methods by name: which rollouts have a loss, what it is, and what it needs.

A new method is an objective, a selection, and one line in METHODS; docs/methods.md has the formulas.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ..config import Config, ContextName
from ..contexts import TeacherPrompt
from ..rollout import Group
from . import checks, distillation, policy, preference, sft
from .batch import Example, Loss, Objective, Selection, TokenBatch

logger = logging.getLogger(__name__)

__all__ = ["METHODS", "Example", "Loss", "Method", "Selection", "TokenBatch", "method_of", "settle"]

Select = Callable[[int, Group, list[TeacherPrompt | None], Config], Selection]


@dataclass(frozen=True)
class Method:
    """What learning needs to know of a method."""

    objective: Objective
    select: Select  # from a group (its place in the step, itself, its teacher prompts) to rollouts with a loss
    teacher: Literal["context", "reference"] | None = None
    """The second model that scores the tokens: a teacher under its context, by distillation.teacher_regularization;
    the initial student under the rollout's own prompt; none."""
    whole_groups: bool = False  # the loss couples rollouts of a group: micro-batches must not cut one
    compares: bool = False  # learns from differences of reward within a group
    context: ContextName | None = None  # the only context of the method


METHODS: dict[str, Method] = {
    "mopd": Method(distillation.distill, distillation.select, teacher="context"),
    "opd": Method(distillation.distill, distillation.select, teacher="context", context="none"),
    "sdpo": Method(distillation.distill, distillation.select, teacher="context", context="1s"),
    "grpo": Method(policy.grpo, policy.select, compares=True),
    "dpo": Method(preference.dpo, preference.select, teacher="reference", whole_groups=True, compares=True),
    "simpo": Method(preference.simpo, preference.select, whole_groups=True, compares=True),
    "sft": Method(sft.sft, sft.select),
}


def method_of(config: Config) -> Method:
    return METHODS[config.method]


def settle(config: Config) -> Config:
    """The configuration with the method's own context, once its settings are checked (ValueError)."""
    method = method_of(config)
    if method.context is not None and method.context != config.context.context:
        logger.info("method %s: context %s (context.context is not read)", config.method, method.context)
        config = replace(config, context=replace(config.context, context=method.context))
    checks.check_baseline(config)
    if method.teacher == "context":
        checks.check_context(config)
        checks.check_distillation(config)
    if method.teacher is not None:
        checks.check_second_model(config)
    reads_peers = method.teacher == "context" and config.context.context != "none"
    least = 2 if reads_peers or method.compares else 1
    if config.rollout.num_generations < least:
        what = f"context {config.context.context!r} (peers of the same prompt)" if reads_peers else config.method
        raise ValueError(
            f"expected rollout.num_generations >= {least} for {what}, got {config.rollout.num_generations}; raise it, "
            "or use --context.context none or --method sft"
        )
    settings = config.distillation
    if method.context == "none" and settings.teacher_model_name_or_path is None:
        logger.warning(
            "method %s: without distillation.teacher_model_name_or_path the teacher starts as the student and reads "
            "what it reads: the loss is 0 and only rounding is learnt",
            config.method,
        )
    return config
