"""Settings that a method cannot work with are refused before any work: ValueError with key, value and remedy."""

from __future__ import annotations

from ..config import Config


def check_context(config: Config) -> None:
    context = config.context
    for key in ("success", "failure", "feedback", "success_summary", "failure_summary"):
        template = getattr(context, f"{key}_template")
        if "{text}" not in template:
            raise ValueError(f"expected {{text}} in context.{key}_template, got {template!r}")
    if "{text}" not in context.summary_request:
        raise ValueError(f"expected {{text}} in context.summary_request, got {context.summary_request!r}")
    at_least = {"max_reprompt_len": 1, "summary_k": 0, "summary_max_tokens": 1}
    for key, least in at_least.items():
        if getattr(context, key) < least:
            raise ValueError(f"expected context.{key} >= {least}, got {getattr(context, key)}")
    if context.peer_control_mode != "none" and context.context in ("none", "random_peer", "score_ordered"):
        raise ValueError(
            f"context.peer_control_mode={context.peer_control_mode!r} fills the blocks of a context of successes and "
            f"failures, got context.context={context.context!r}: choose e.g. 2s1f"
        )
    if config.method == "opd" and context.summary_k:
        raise ValueError(f"the teacher of method opd reads no peers, got context.summary_k={context.summary_k}")


def check_distillation(config: Config) -> None:
    settings = config.distillation
    if not 0 <= settings.alpha <= 1:
        raise ValueError(f"expected distillation.alpha in [0, 1], got {settings.alpha}")
    if not 0 < settings.teacher_update_rate <= 1:
        raise ValueError(f"expected distillation.teacher_update_rate in (0, 1], got {settings.teacher_update_rate}")
    if settings.teacher_temperature is not None and not settings.teacher_temperature > 0:
        raise ValueError(f"expected distillation.teacher_temperature > 0 or null, got {settings.teacher_temperature}")
    if settings.is_clip is not None and not settings.is_clip > 0:
        raise ValueError(f"expected distillation.is_clip > 0 or null, got {settings.is_clip}")
    if settings.distillation_topk is not None and settings.distillation_topk < 1:
        raise ValueError(f"expected distillation.distillation_topk >= 1 or null, got {settings.distillation_topk}")
    _check_sampled_token(config)
    named = settings.teacher_model_name_or_path
    if named and settings.teacher_regularization != "frozen":
        raise ValueError(
            f"distillation.teacher_model_name_or_path={named!r} is only read with "
            f"distillation.teacher_regularization=frozen, got {settings.teacher_regularization!r}"
        )
    _check_engine(config)
    if settings.teacher_regularization == "ema" and settings.teacher_dtype not in (None, "float32"):
        raise ValueError(
            f"distillation.teacher_dtype={settings.teacher_dtype!r} rounds the small steps of a moving average away: "
            "leave it null (float32) with teacher_regularization=ema"
        )
    if settings.teacher_regularization == "self" and (settings.teacher_offload or settings.teacher_dtype):
        raise ValueError("teacher_regularization=self has no weights of its own: no teacher_offload, no teacher_dtype")


def _check_engine(config: Config) -> None:
    """What does not go with the way in which the models are held."""
    settings, model = config.distillation, config.model
    if model.use_peft and settings.teacher_model_name_or_path:
        raise ValueError(
            "model.use_peft takes the model itself as teacher, got distillation.teacher_model_name_or_path="
            f"{settings.teacher_model_name_or_path!r}: leave it out, or set model.use_peft false"
        )


def check_second_model(config: Config) -> None:
    """Of every method that has one."""
    settings, model = config.distillation, config.model
    if model.use_peft and (settings.teacher_offload or settings.teacher_dtype):
        raise ValueError("with model.use_peft the teacher shares the student's weights: no teacher_offload or _dtype")
    if model.sharding == "fsdp" and settings.teacher_offload:
        raise ValueError("distillation.teacher_offload does not go with model.sharding=fsdp, which shards the teacher")


def _check_sampled_token(config: Config) -> None:
    settings = config.distillation
    if settings.full_logit_distillation:
        if settings.step_level_kl:
            raise ValueError(
                "distillation.step_level_kl needs full_logit_distillation=false: means over steps, handed back to "
                "their tokens, add up to the same loss and gradient as the tokens' own divergences"
            )
        return
    if settings.alpha != 1:
        raise ValueError(
            f"full_logit_distillation=false estimates reverse KL: set distillation.alpha 1, got {settings.alpha}"
        )
    if settings.distillation_topk is not None:
        raise ValueError(
            f"distillation_topk={settings.distillation_topk} is not read with full_logit_distillation=false: leave it "
            "null"
        )
    if settings.step_level_kl and not settings.step_separator:
        raise ValueError("expected a distillation.step_separator that is not empty, got ''")


def check_baseline(config: Config) -> None:
    baseline, rollout = config.baseline, config.rollout
    positive = {
        "baseline.epsilon": baseline.epsilon,
        "baseline.dpo_beta": baseline.dpo_beta,
        "baseline.simpo_beta": baseline.simpo_beta,
        "rollout.rollout_is_threshold": rollout.rollout_is_threshold,
    }
    for key, value in positive.items():
        if not value > 0:
            raise ValueError(f"expected {key} > 0, got {value}")
    if baseline.simpo_gamma < 0:
        raise ValueError(f"expected baseline.simpo_gamma >= 0, got {baseline.simpo_gamma}")
