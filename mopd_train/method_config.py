"""Settings of what is learnt from a group of rollouts: the method, what the teacher reads, the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mopd_kernels import Execution

MethodName = Literal["mopd", "opd", "sdpo", "grpo", "dpo", "simpo", "sft"]
ContextName = Literal["none", "1s", "2s", "1f", "1s1f", "2s1f", "all", "random_peer", "score_ordered"]


@dataclass
class ContextConfig:
    context: ContextName = "2s1f"
    """What the teacher reads beside the prompt: none, successes and failures counted (2s1f), all peers,
    random_peer (one, whatever its verdict) or score_ordered (all, from the lowest reward to the highest).
    Read by method mopd; opd is none, sdpo is 1s, the others have no teacher that reads peers."""
    success_reward_threshold: float = 1.0
    """A rollout succeeds if its reward is at least this."""
    failure_solution_condition: Literal["always", "when_no_solution"] = "always"
    """Show the failed peer always, or only where no success can be shown."""
    feedback_condition: Literal["never", "always", "when_no_solution"] = "when_no_solution"
    """When the verifier's feedback on the shown failure is shown as well. always: also, by itself, on the attempt that
    is scored, where nothing succeeded and the context has no peer to show (1s or 2s, all failed)."""
    peer_choice: Literal["shared", "random"] = "shared"
    """shared: rollouts of a group see the same peers where leave-one-out allows; random: drawn for each."""
    peer_control_mode: Literal["none", "random_peer", "unrelated_prompt", "success_only_matched"] = "none"
    """A control fills the context's blocks with something else, so that length and number of blocks stay:
    random_peer: peers of the group whatever their verdict, under the label of the block they fill;
    unrelated_prompt: successes of the batch's other prompts; success_only_matched: successes of the same prompt,
    then of others."""
    peer_control_match: Literal["block", "token"] = "block"
    """What a control matches: the number of blocks, or their tokens (random_peer: block by block)."""
    summary_k: int = 0
    """Further peers shown as one-sentence summaries after the whole ones."""
    summary_source: Literal["success", "failure", "all"] = "success"
    """Which peers are summarised."""
    summary_max_tokens: int = 64
    """Tokens of a summary. The student is asked for one where the peer's own text has no <summary>...</summary>;
    where its reply has none either, so many first tokens of the peer are shown."""
    max_reprompt_len: int = 10240
    """Tokens of a teacher prompt. Peers are shortened to fit; question and instruction never are."""
    remove_thinking_from_demonstration: bool = True
    """Drop <think>...</think> from shown peers, successes and failures alike."""
    success_template: str = "\n\nA correct answer to this question:\n{text}"
    """One block a successful peer; {text} is the peer."""
    failure_template: str = "\n\nA wrong answer to this question, not to be repeated:\n{text}"
    """One block a failed peer."""
    success_summary_template: str = "\n\nSummary of another correct answer:\n{text}"
    """One block a summarised success."""
    failure_summary_template: str = "\n\nSummary of another wrong answer:\n{text}"
    """One block a summarised failure."""
    summary_request: str = (
        "\n\nAn answer to this question:\n{text}\n\nState its key approach in one sentence inside <summary></summary>."
    )
    """Joins the question when the student is asked for a summary; {text} is the peer."""
    feedback_template: str = "\n\nWhat the checker says of the wrong answer:\n{text}"
    """Block of the verifier's feedback on the failed peer."""
    instruction_template: str = "\n\nNow answer the question at the top yourself."
    """Ends the message wherever a block was shown."""


@dataclass
class DistillationConfig:
    """Methods mopd, opd and sdpo."""

    alpha: float = 0.5
    """0 forward KL(T||S), 1 reverse KL(S||T), between: Jensen-Shannon."""
    teacher_temperature: float | None = None
    """Divides the teacher's logits; null: rollout.temperature, as the student's. Lower sharpens the teacher."""
    distillation_topk: int | None = None
    """Divergence on the student's k likeliest tokens (the paper's code: 100); null is exact, at no more memory."""
    distillation_add_tail: bool = True
    """With distillation_topk: the other tokens are one more outcome; false renormalises both sides without them."""
    full_logit_distillation: bool = True
    """false: the sampled token alone, a policy gradient with advantage log p - log q (needs alpha 1, which it
    estimates)."""
    step_level_kl: bool = False
    """With full_logit_distillation false: a token's advantage is the mean over its step of the completion."""
    step_separator: str = "\n\n"
    """What ends a step."""
    is_clip: float | None = 2.0
    """Cap of the importance ratio q / q_old from the second of training.num_iterations on; null: no ratio."""
    teacher_regularization: Literal["ema", "trust-region", "frozen", "self"] = "ema"
    """ema: moving average of the student; trust-region: logits (1 - r) initial student + r student, both under the
    teacher's context; frozen: teacher_model_name_or_path (or the initial student); self."""
    teacher_update_rate: float = 0.05
    """r: of the EMA, teacher <- (1 - r) teacher + r student once an optimizer step; of the trust region."""
    teacher_model_name_or_path: str | None = None
    """Frozen teacher, may be larger; must share the student's tokenizer. null: the initial student."""
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Weights of the teacher (or reference); null: the student's, and float32 for ema, whose small updates lower
    precisions round away."""
    teacher_offload: bool = False
    """Keep the teacher in CPU memory between uses. It scores a whole step at once, its states wait on the CPU."""
    chunk_tokens: int | None = None
    """Rows of logits held at a time by the loss; null derives it from the device."""
    grad_filter: float = 0.0
    """Entries of d(loss)/d(logits) up to this size are dropped; 0 is exact."""

    def execution(self) -> Execution:
        return Execution(chunk_tokens=self.chunk_tokens, grad_filter=self.grad_filter)


@dataclass
class BaselineConfig:
    """Methods grpo, dpo, simpo and sft."""

    scale_rewards: bool = False
    """GRPO: divide a group's advantages by its standard deviation; it then weighs easy and hard prompts up."""
    epsilon: float = 0.2
    """GRPO: the ratio q / q_old is clipped to 1 +- epsilon; active from the second of training.num_iterations on."""
    dpo_beta: float = 0.1
    """DPO: temperature of the implicit reward beta (log q - log reference)."""
    simpo_beta: float = 2.0
    """SimPO: temperature of the implicit reward beta log q / length."""
    simpo_gamma: float = 1.0
    """SimPO: margin by which the chosen reward must exceed the rejected one."""
    sft_length_normalize: bool = True
    """SFT: mean over a completion's tokens, then over completions; false: mean over all tokens."""
