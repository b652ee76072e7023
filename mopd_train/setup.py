"""What a run works on, and every check that can be made before work begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mopd_kernels import LMHead

from . import checkpoint
from .config import Config, validate
from .data import build_prompts, split_rows
from .engines import Engine, build_engine, check_engine
from .models import load_model, load_tokenizer
from .rollout import Prompt
from .rundir import check, claim
from .tasks import Task, find_task
from .teacher import build_teacher


@dataclass
class Run:
    """Everything a step works on."""

    config: Config
    folder: Path
    accelerator: Accelerator
    task: Task
    tokenizer: PreTrainedTokenizerBase
    student: PreTrainedModel
    teacher: PreTrainedModel
    engine: Engine
    optimizer: Any
    scheduler: Any
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    first_step: int


def set_up(config: Config) -> Run:
    """Every check that can be made before work begins is made here."""
    validate(config)
    task = find_task(config.data.task)
    settings = config.training
    resume = checkpoint.find_resume(settings.resume_from_checkpoint, Path(settings.output_dir))
    tokenizer = load_tokenizer(config.model.model_name_or_path)
    train_rows, eval_rows = split_rows(config.data, task)
    train_source = config.data.train_dataset or f"task {config.data.task!r}"
    train_prompts = build_prompts(train_rows, task, config.data, tokenizer, train_source)
    eval_prompts = []
    if eval_rows:
        eval_prompts = build_prompts(eval_rows, task, config.data, tokenizer, config.data.eval_dataset or train_source)
    resuming = settings.resume_from_checkpoint is not None
    folder = check(config, resuming)
    check_engine(config)

    accelerator = Accelerator(
        log_with=settings.report_to or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder)),
    )
    if accelerator.num_processes > 1:
        raise ValueError(
            f"training runs in one process so far, got {accelerator.num_processes}: start without a launcher"
        )
    name = str(resume or config.model.model_name_or_path)
    student = load_model(name, config.model.dtype, config.model.attn_implementation, accelerator.device)
    LMHead.from_model(student)
    if config.model.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    teacher = build_teacher(config.distillation, config.model, student, tokenizer)
    engine = build_engine(config, student, tokenizer)  # vLLM seeds torch anew: before states are loaded
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )
    warmup = max(1, settings.warmup_steps)  # the first step already moves: its rate is 1/warmup of the peak
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / warmup))
    checkpoint.check_space(folder, student, moves(config), settings.save_total_limit)
    student, optimizer, scheduler = accelerator.prepare(student, optimizer, scheduler)
    checkpoint.keep_weights_out(accelerator)
    first_step = 0
    if resume is not None:
        first_step = checkpoint.step_of(resume)
        if moves(config):
            teacher.load_state_dict(load_model(str(resume / "teacher"), config.model.dtype).state_dict())
        accelerator.load_state(str(resume / "state"))
    claim(folder, config, resuming)
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first_step + 1}})
    return Run(
        config, folder, accelerator, task, tokenizer, student, teacher, engine, optimizer, scheduler,
        train_prompts, eval_prompts, first_step,
    )  # fmt: skip


def moves(config: Config) -> bool:
    """Whether the teacher changes during training and so belongs to the checkpoint."""
    return config.distillation.teacher_regularization == "ema"
