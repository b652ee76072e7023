"""Small problems and their dense definition, shared by the kernel tests.

A `Problem` fixes shapes and options; `tensors` draws its inputs in float64, rounded to the dtype under test, so
that the dense oracle in float64 and the op see the same numbers.

Legend: N tokens, V vocabulary, Hs/Ht student/teacher hidden, K contexts (0: a plain teacher).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mopd_kernels import Execution, LMHead, VocabShard, backends, linear_divergence
from mopd_kernels.losses import LOSSES
from mopd_kernels.spec import Divergence

PARAMETERS = ("student_hidden", "student_weight", "student_bias")


@dataclass(frozen=True)
class Problem:
    N: int = 9
    V: int = 37
    Hs: int = 8
    Ht: int = 6
    K: int = 0
    alpha: float = 0.5
    top_k: int | None = None
    add_tail: bool = True
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0
    teacher_temperature: float | None = None
    padding: tuple[int, int] = (0, 0)  # extra rows of the student's and the teacher's weight
    labels: bool = False
    weights: bool = False
    context_weights: str | None = None  # "context": (K,), "token": (K, N)
    spread: float = 1.0  # standard deviation of the logits, about
    dtype: torch.dtype = torch.float64
    execution: Execution = field(default_factory=lambda: Execution(chunk_tokens=4))


@dataclass
class Result:
    value: Tensor  # (N,) before weights
    grads: dict[str, Tensor]  # of sum(upstream * weights * value)
    extras: dict[str, Tensor]


def tensors(problem: Problem, seed: int = 0) -> dict[str, Tensor]:
    p, generator = problem, torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(p.dtype).double()

    inputs = {
        "student_hidden": normal(p.N, p.Hs),
        "student_weight": normal(p.V + p.padding[0], p.Hs, std=p.spread / p.Hs**0.5),
        "teacher_hidden": normal(*([p.K] if p.K else []), p.N, p.Ht),
        "teacher_weight": normal(p.V + p.padding[1], p.Ht, std=p.spread / p.Ht**0.5),
        "upstream": torch.randn(p.N, generator=generator, dtype=torch.float64),
    }
    if p.bias:
        inputs["student_bias"], inputs["teacher_bias"] = normal(p.V + p.padding[0]), normal(p.V + p.padding[1])
    if p.labels:
        inputs["labels"] = torch.randint(0, p.V, (p.N,), generator=generator)
        inputs["labels"][:: max(2, p.N // 2)] = -100
    if p.weights:
        inputs["token_weights"] = torch.rand(p.N, generator=generator, dtype=torch.float64)
        inputs["token_weights"][1::3] = 0
    if p.context_weights:
        shape = (p.K,) if p.context_weights == "context" else (p.K, p.N)
        inputs["context_weights"] = torch.rand(shape, generator=generator, dtype=torch.float64)
    return inputs


def head_logits(problem: Problem, side: str, inputs: dict[str, Tensor]) -> Tensor:
    p = problem
    u = inputs[f"{side}_hidden"] @ inputs[f"{side}_weight"].T
    if f"{side}_bias" in inputs:
        u = u + inputs[f"{side}_bias"]
    x = p.scale * u
    z = x if p.softcap is None else p.softcap * torch.tanh(x / p.softcap)
    temperature = p.teacher_temperature if side == "teacher" and p.teacher_temperature else p.temperature
    return z[..., : p.V] / temperature


def kept(problem: Problem, inputs: dict[str, Tensor]) -> Tensor:
    mask = torch.ones(problem.N, dtype=torch.bool)
    if "labels" in inputs:
        mask &= inputs["labels"] != -100
    if "token_weights" in inputs:
        mask &= inputs["token_weights"] != 0
    return mask


def dense(problem: Problem, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Result:
    """The definition on full logits by autograd; in float64 the oracle, in `dtype` the plain path."""
    p = problem
    leaves = {
        name: value.to(dtype).requires_grad_(name in PARAMETERS) if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    z_s, z_t = (head_logits(p, side, leaves) for side in ("student", "teacher"))
    if dtype != torch.float64:
        z_s, z_t = z_s.float(), z_t.float()
    if p.K:
        weights = leaves.get("context_weights", torch.ones(p.K, dtype=z_t.dtype)).to(z_t.dtype)
        weights = weights.reshape(p.K, -1, 1)
        z_t = (z_t.log_softmax(-1) + (weights / weights.sum(0)).log()).logsumexp(0)
    if p.top_k:
        value = LOSSES["topk"](z_s, z_t, p.alpha, p.top_k, p.add_tail)
    else:
        value = LOSSES["divergence"](z_s, z_t, p.alpha)
    mask = kept(p, inputs)
    value = torch.where(mask, value, 0.0)
    upstream = inputs["upstream"].to(value.dtype) * inputs.get("token_weights", torch.ones(p.N)).to(value.dtype)
    names = [name for name in PARAMETERS if name in leaves]
    grads = torch.autograd.grad((value * upstream).sum(), [leaves[name] for name in names])
    extras = {"student_entropy": _entropy(z_s, mask), "teacher_entropy": _entropy(z_t, mask)}
    if "labels" in inputs:
        for side, z in (("student", z_s), ("teacher", z_t)):
            chosen = z.log_softmax(-1).gather(-1, inputs["labels"].clamp(min=0)[:, None])[:, 0]
            extras[f"{side}_logprobs"] = torch.where(mask, chosen, 0.0).detach()
    return Result(value.detach(), dict(zip(names, grads, strict=True)), extras)


def _entropy(z: Tensor, mask: Tensor) -> Tensor:
    log_q = z.log_softmax(-1)
    return torch.where(mask, -torch.where(log_q > float("-inf"), log_q.exp() * log_q, 0.0).sum(-1), 0.0).detach()


def heads_of(problem: Problem, leaves: dict[str, Tensor], shard: VocabShard | None = None) -> tuple[LMHead, LMHead]:
    p = problem
    student, teacher = (
        LMHead(leaves[f"{side}_weight"], leaves.get(f"{side}_bias"), p.softcap, p.scale, p.V, shard)
        for side in ("student", "teacher")
    )
    return student, teacher


def call(
    problem: Problem,
    leaves: dict[str, Tensor],
    reduction: str,
    heads: tuple[LMHead, LMHead] | None = None,
    **options: object,
) -> Divergence:
    p = problem
    student, teacher = heads or heads_of(p, leaves)
    arguments: dict[str, object] = {
        "alpha": p.alpha,
        "temperature": p.temperature,
        "teacher_temperature": p.teacher_temperature,
        "labels": leaves.get("labels"),
        "token_weights": leaves.get("token_weights"),
        "context_weights": leaves.get("context_weights"),
        "top_k": p.top_k,
        "add_tail": p.add_tail,
        "reduction": reduction,
        "execution": p.execution,
    }
    return linear_divergence(
        leaves["student_hidden"], student, leaves["teacher_hidden"], teacher, **arguments | options
    )


def leaves_of(problem: Problem, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs in the problem's dtype, the student's parameters as leaves with gradients."""
    constant = ("upstream", "token_weights", "context_weights")
    leaves = {
        name: value.to(problem.dtype) if value.is_floating_point() and name not in constant else value
        for name, value in inputs.items()
    }
    return {name: v.detach().clone().requires_grad_() if name in PARAMETERS else v for name, v in leaves.items()}


def fused(
    problem: Problem,
    inputs: dict[str, Tensor],
    reduction: str = "none",
    leaves: dict[str, Tensor] | None = None,
    heads: tuple[LMHead, LMHead] | None = None,
) -> Result:
    """The op. With "sum" the upstream gradient is folded into the token weights, where tokens are kept."""
    leaves = leaves or leaves_of(problem, inputs)
    if reduction == "none":
        out = call(problem, leaves, "none", heads)
        total = (out.loss * inputs["upstream"]).sum()
    else:
        weights = inputs["upstream"] * inputs.get("token_weights", torch.ones(problem.N))
        out = call(problem, leaves, reduction, heads, token_weights=weights)
        total = out.loss
    names = [name for name in PARAMETERS if name in leaves]
    grads = torch.autograd.grad(total, [leaves[name] for name in names])
    names_of_extras = ("student_entropy", "teacher_entropy", "student_logprobs", "teacher_logprobs")
    extras = {name: getattr(out, name) for name in names_of_extras if getattr(out, name) is not None}
    return Result(out.per_token, dict(zip(names, grads, strict=True)), extras)


def assert_equal(actual: Result, expected: Result, rtol: float, atol: float) -> None:
    """Values and extras entry by entry; gradients relative to the largest entry of each."""
    torch.testing.assert_close(
        actual.value.double(), expected.value.double(), rtol=rtol, atol=atol, msg=_named("value")
    )
    for name, value in actual.extras.items():
        torch.testing.assert_close(
            value.double(), expected.extras[name].double(), rtol=rtol, atol=atol, msg=_named(name)
        )
    for name, value in expected.grads.items():
        assert actual.grads[name].shape == value.shape, name
        if value.numel() == 0:
            continue
        bound = atol + rtol * float(value.abs().max())
        error = float((actual.grads[name].double() - value.double()).abs().max())
        assert error <= bound, f"gradient of {name}: error {error:.3e}, bound {bound:.3e}"


def _named(name: str):  # type: ignore[no-untyped-def]
    return lambda message: f"{name}: {message}"


def backends_under_test() -> list[object]:
    """Every backend of row kernels, as pytest parameters; those that cannot run on this machine are skipped.

    Triton takes minutes under its interpreter and is left to `test_triton`, but for MOPD_INTERPRET_ALL=1; its
    tiles, which take fewer options, always are.
    """
    left_out = {"triton-tiles"}
    if not torch.cuda.is_available() and os.environ.get("MOPD_INTERPRET_ALL") != "1":
        left_out.add("triton")
    return [pytest.param(name, marks=_marks(name)) for name in backends.BACKENDS if name not in left_out]


def _marks(name: str) -> list[pytest.MarkDecorator]:
    try:
        getattr(backends.pick(name, torch.empty(0)), "library", int)()
    except (ImportError, OSError, RuntimeError) as error:
        return [pytest.mark.skip(reason=f"backend {name}: {error}")]
    return []
