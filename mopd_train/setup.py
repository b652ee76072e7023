"""What a run works on, and every check that can be made before work begins."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mopd_kernels import LMHead

from . import adapters, checkpoint, fsdp, trackers
from .config import Config, validate
from .data import build_prompts, split_rows
from .distributed import Ranks
from .engine import Engine, enable_checkpointing
from .models import check_vocabulary, empty_model, load_model, load_tokenizer, warn_of_length
from .objectives import settle
from .rewards import task_of
from .rollout import Prompt
from .rollout_engines import RolloutEngine, build_rollout_engine, check_rollout_engine
from .rundir import check, claim
from .tasks import RewardFunction, Task
from .teacher import build_teacher, moves


@dataclass
class Run:
    """Everything a step works on."""

    config: Config
    folder: Path
    accelerator: Accelerator
    ranks: Ranks
    engine: Engine
    rollouts: RolloutEngine
    task: Task
    tokenizer: PreTrainedTokenizerBase
    student: PreTrainedModel
    teacher: PreTrainedModel | None  # of the methods that score with a second model
    optimizer: Any
    scheduler: Any
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    first_step: int


def set_up(config: Config, reward_fns: Sequence[RewardFunction] | None = None) -> Run:
    """Every check that can be made before work begins is made here."""
    validate(config)
    config = settle(config)
    task = task_of(config, reward_fns)
    settings = config.training
    trackers.check(settings)
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    train_rows, eval_rows = split_rows(config.data, task)
    train_source = config.data.train_dataset or f"task {config.data.task!r}"
    train_prompts = build_prompts(train_rows, task, config.data, tokenizer, train_source)
    eval_prompts = []
    if eval_rows:
        eval_prompts = build_prompts(eval_rows, task, config.data, tokenizer, config.data.eval_dataset or train_source)
    resuming = settings.resume_from_checkpoint is not None
    folder = check(config, resuming)
    check_rollout_engine(config)

    accelerator, ranks = start_processes(config)
    resume = ranks.on_main(lambda: checkpoint.find_resume(settings.resume_from_checkpoint, folder))
    student = build_student(config, ranks, resume)
    check_vocabulary(tokenizer, student, config.model.model_name_or_path)
    longest = max(len(prompt.token_ids) for prompt in train_prompts + eval_prompts)
    remedy = "lower rollout.max_completion_length or data.max_prompt_length"
    warn_of_length(student, longest + config.rollout.max_completion_length, remedy)
    moved = str(resume / checkpoint.TEACHER) if resume is not None and moves(config) else None
    teacher = build_teacher(
        config, student, tokenizer, lambda name, dtype, device: load(moved or name, config, ranks, dtype, device)
    )
    if teacher is not None:
        check_vocabulary(tokenizer, teacher, config.distillation.teacher_model_name_or_path or "the teacher")
    rows = [int(model.get_output_embeddings().weight.size(0)) for model in (student, teacher) if model]
    engine = Engine(config, ranks, student, teacher, min(rows))
    rollouts = build_rollout_engine(config, student, tokenizer, engine.sampling)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in student.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )
    warmup = max(1, settings.warmup_steps)  # the first step already moves: its rate is 1/warmup of the peak
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / warmup))
    checkpoint.check_space(folder, student, moves(config), settings.save_total_limit)
    first_step = 0
    if resume is not None:
        first_step = checkpoint.step_of(resume)
        checkpoint.load_optimizer(resume, student, optimizer, scheduler)
    ranks.on_main(lambda: claim(folder, config, resuming, resume))
    run_id = ranks.on_main(lambda: trackers.identity(folder))
    accelerator.log_with = trackers.build(config, first_step, run_id)
    accelerator.init_trackers(trackers.PROJECT)
    return Run(
        config, folder, accelerator, ranks, engine, rollouts, task, tokenizer, student, teacher, optimizer, scheduler,
        train_prompts, eval_prompts, first_step,
    )  # fmt: skip


def start_processes(config: Config) -> tuple[Accelerator, Ranks]:
    """Join the other processes of torchrun or accelerate launch, if there are any. What accelerate's launcher was told
    about engines must agree with the config, which alone decides."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.training.ddp_timeout))],
    )
    told = accelerator.distributed_type.value
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        told = "FSDP" if config.model.sharding != "fsdp" else "MULTI_GPU"
    if told in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ValueError(
            f"accelerate launch was configured for {told}: configure it for several plain processes, and shard by "
            "--model.sharding fsdp"
        )
    if accelerator.mixed_precision not in ("no", config.training.mixed_precision):
        raise ValueError(
            f"accelerate launch was configured for {accelerator.mixed_precision}, and training.mixed_precision is "
            f"{config.training.mixed_precision!r}: leave it to the latter"
        )
    ranks = Ranks.of(
        accelerator.process_index, accelerator.num_processes, accelerator.device, config.model.vocab_parallel
    )
    return accelerator, ranks


def build_student(config: Config, ranks: Ranks, resume: Path | None) -> PreTrainedModel:
    """The model of the config or of the checkpoint, with its adapters, sharded as the config says."""

    def adapted(model: PreTrainedModel, real: bool) -> PreTrainedModel:
        if config.model.use_peft:
            adapters.add(model, config.model, moves(config), config.training.seed)
            if resume is not None and real:
                adapters.load(model, adapters.STUDENT, resume)
                if moves(config):
                    adapters.load(model, adapters.TEACHER, resume / checkpoint.TEACHER)
        LMHead.from_model(model)  # its refusals come before any work
        if config.model.gradient_checkpointing:
            enable_checkpointing(model)
        return model

    from_checkpoint = resume is not None and not config.model.use_peft
    name = str(resume) if from_checkpoint else config.model.model_name_or_path
    return load(name, config, ranks, config.model.dtype, ranks.device, adapted)


def load(
    name: str,
    config: Config,
    ranks: Ranks,
    dtype: str,
    device: torch.device,
    adapt: Callable[[PreTrainedModel, bool], PreTrainedModel] = lambda model, real: model,
) -> PreTrainedModel:
    """A model as this run holds it: on `device`, or sharded. adapt(model, real) changes it before it is sharded; real:
    its weights were read."""
    attention = config.model.attn_implementation
    if config.model.sharding == "none":
        return adapt(load_model(name, dtype, attention, device), True)

    def build(real: bool) -> PreTrainedModel:
        return adapt(load_model(name, dtype, attention) if real else empty_model(name, dtype, attention), real)

    return fsdp.load(build, ranks, torch.bfloat16 if config.training.mixed_precision == "bf16" else None)
