"""Some steps of SDPO in a process of its own: `python -m bench.sdpo_worker ours|trl MODEL STEPS BATCH LENGTH FOLDER`.

Prints {"steps": [{"seconds", "phases", "tokens"}], "extra_bytes", "state_bytes"}: extra is the peak of resident memory
beyond the interpreter and both models' weights, state the gradients and Adam moments among it. The first step warms up.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .worker import resident, trim

PROMPTS, GENERATIONS, TEMPERATURE, SEED = 8, 8, 0.5, 0
SUCCESS = "\n{text}"  # as in examples/smollm2.yaml: what the teacher reads is the prompt and one right answer


def reset_peak() -> None:
    trim()
    Path("/proc/self/clear_refs").write_text("5")


def rate(optimizer: Any) -> None:
    """Every step starts from the same model; the optimizer's work is done all the same."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-12


def ours(model: str, steps: int, batch: int, length: int, folder: str) -> tuple[list[dict[str, Any]], int, int]:
    from mopd_train import setup, train
    from mopd_train.config import Config

    base = resident("VmRSS")
    config = Config()
    config.model.model_name_or_path = model
    config.rollout.num_prompts, config.rollout.num_generations = PROMPTS, GENERATIONS
    config.rollout.max_completion_length, config.rollout.temperature = length, TEMPERATURE
    config.context.context, config.context.success_template, config.context.instruction_template = "1s", SUCCESS, ""
    config.distillation.alpha = 1.0
    config.training.per_device_train_batch_size, config.training.learning_rate = batch, 1e-12
    config.training.output_dir, config.training.report_to, config.training.seed = folder, [], SEED
    run = setup.set_up(config)
    rows = []
    for step in range(1, steps + 2):
        begun = time.perf_counter()
        metrics = train.train_step(run, step)
        phases = {key.removeprefix("time/"): value for key, value in metrics.items() if key.startswith("time/")}
        tokens = metrics["completions/mean_length"] * PROMPTS * GENERATIONS
        rows.append({"seconds": time.perf_counter() - begun, "phases": phases, "tokens": tokens})
        if step == 1:
            reset_peak()
    weights = sum(p.nbytes for p in run.student.parameters())
    return rows[1:], resident("VmHWM") - base - 2 * weights, 3 * weights


def trl(model: str, steps: int, batch: int, length: int, folder: str) -> tuple[list[dict[str, Any]], int, int]:
    """TRL's SDPO trainer, full logits: the same prompts a step, model, teacher, context, temperature and divergence."""
    from transformers import TrainerCallback
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    from mopd_train.models import load_model, load_tokenizer
    from mopd_train.tasks import arithmetic

    base = resident("VmRSS")
    settings = SDPOConfig(
        output_dir=folder, max_steps=steps + 1, per_device_train_batch_size=batch,
        gradient_accumulation_steps=PROMPTS * GENERATIONS // batch, num_generations=GENERATIONS,
        max_completion_length=length, temperature=TEMPERATURE, learning_rate=1e-12, lr_scheduler_type="constant",
        distillation_mode="full_logits", distillation_alpha=1.0, teacher_model_kind="ema", teacher_update_rate=0.05,
        solution_template="\n{successful_previous_attempt}", reprompt_template="{prompt}{solution}{feedback}",
        report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        seed=SEED, disable_tqdm=True, diagnostics_warning_interval=0,
    )  # fmt: skip
    train_rows, _ = arithmetic.rows()
    prompts = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in train_rows]

    def reward(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [verdict["score"] for verdict in arithmetic.reward(prompts, texts, [], answer=answer)]

    student = load_model(model)
    trainer = SDPOTrainer(student, [reward], settings, train_dataset=prompts, processing_class=load_tokenizer(model))
    phases, rows = defaultdict(float), []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                phases[name] += time.perf_counter() - begun

        return call

    tokens = [0.0]
    generate = trainer._generate

    def counted(*arguments: Any) -> Any:
        result = generate(*arguments)
        tokens[0] += sum(len(ids) for ids in result[1])
        return result

    trainer._generate = timed("rollout", counted)
    trainer._calculate_rewards = timed("verify", trainer._calculate_rewards)
    trainer.compute_loss = timed("teacher and student forward, loss", trainer.compute_loss)
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            phases.clear()
            tokens[0], self.begun = 0.0, time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            rows.append({"seconds": time.perf_counter() - self.begun, "phases": dict(phases), "tokens": tokens[0]})
            if len(rows) == 1:
                reset_peak()

    trainer.add_callback(Steps())
    trainer.train()
    weights = sum(p.nbytes for p in student.parameters())
    return rows[1:], resident("VmHWM") - base - 2 * weights, 3 * weights


def main(way: str, model: str, steps: str, batch: str, length: str, folder: str) -> None:
    import logging

    logging.disable(logging.WARNING)
    rows, extra, state = {"ours": ours, "trl": trl}[way](model, int(steps), int(batch), int(length), folder)
    print(json.dumps({"steps": rows, "extra_bytes": extra, "state_bytes": state}))


if __name__ == "__main__":
    main(*sys.argv[1:])
