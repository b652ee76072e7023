"""torch custom operators with fake implementations and autograd formulas.

`mopd::divergence_with_grads` computes the loss and its gradients together (4 products); `mopd::divergence` and
`mopd::logprobs` compute values and leave a few floats per token, from which their backward recomputes. They take
plain tensors and numbers, so that torch.compile can carry them. Each operator's arguments are one NamedTuple,
from which its schema is read. Gradients come back as dH, dW, db; an unwanted one costs no product and is empty.

Legend: N tokens, V vocabulary rows of the parameter, H hidden, K contexts, R = len(DivergenceRows._fields).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from . import backends, chunked, chunked_logprobs, tiled
from .checks import kept_mask
from .chunked import DivergenceProblem, DivergenceRows, Saved
from .chunked_logprobs import LogprobProblem
from .projection import Gradients, Needs, Projection
from .spec import accumulation_dtype
from .vocab_parallel import Part, Ranks


class DivergenceArguments(NamedTuple):
    """One call of `linear_divergence`. The tensors with gradients come first."""

    student_hidden: Tensor  # (N, Hs)
    student_weight: Tensor  # (Vs, Hs)
    student_bias: Tensor | None  # (Vs,)
    teacher_hidden: Tensor  # (K, N, Ht)
    teacher_weight: Tensor  # (Vt, Ht)
    teacher_bias: Tensor | None  # (Vt,)
    labels: Tensor | None  # (N,)
    token_weights: Tensor | None  # (N,)
    context_weights: Tensor | None  # (K, N), sums to 1 over K; None for K = 1
    student_logits: list[float]  # softcap or 0, scale, temperature
    teacher_logits: list[float]
    vocabulary: int  # rows that count, of all ranks; the rest of both heads is padding
    start: int  # vocabulary index of row 0 of the weights
    group: str  # name of the process group that shares the vocabulary, or ""
    alpha: float
    top_k: int  # 0: full vocabulary
    add_tail: bool
    backend: str  # "": by device
    chunk_tokens: int  # 0: from the budget
    memory_budget: int  # 0: the default
    grad_filter: float
    needs: list[bool]  # which of dH, dW, db are wanted


class LogprobArguments(NamedTuple):
    """One call of `linear_logprobs`; fields as above."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,)
    logits: list[float]
    vocabulary: int
    start: int
    group: str
    backend: str
    chunk_tokens: int
    memory_budget: int
    needs: list[bool]


TILES = "divergence_products"  # what a backend has that never forms logits

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    list[float]: "float[]",
    list[bool]: "bool[]",
}

Operator = TypeVar("Operator", bound=Callable[..., Any])


def _operator(name: str, arguments: type, returns: int, extra: str = "") -> Callable[[Operator], CustomOpDef]:
    """A custom operator of the fields of `arguments` after the tensors named in `extra`."""
    fields = [f"{_SCHEMA_TYPES[kind]} {field}" for field, kind in get_type_hints(arguments).items()]
    fields = [f"Tensor {tensor}" for tensor in extra.split()] + fields
    results = ", ".join(["Tensor"] * returns)
    schema = f"({', '.join(fields)}) -> {results if returns == 1 else f'({results})'}"
    return lambda body: custom_op(f"mopd::{name}", mutates_args=(), schema=schema)(_alone(body))


def _alone(body: Operator) -> Operator:
    """`body` without autocast, which would lower some of its products but not the buffers they are written to, and
    with its tensors' device as the current one, on which Triton launches."""

    @functools.wraps(body)
    def run(*arguments: Any) -> Any:
        with torch.autocast(arguments[0].device.type, enabled=False), torch.cuda.device_of(arguments[0]):
            return body(*arguments)

    return run  # type: ignore[return-value]


@_operator("divergence_with_grads", DivergenceArguments, returns=5)
def divergence_with_grads(*arguments: Any) -> tuple[Tensor, ...]:
    """loss = sum_i w_i d_i, stacked DivergenceRows (R, N), dH, dW, db of the loss."""
    a = DivergenceArguments(*arguments)
    weights = a.token_weights
    if weights is None:
        weights = a.student_hidden.new_ones(a.student_hidden.size(0), dtype=accumulation_dtype(a.student_hidden.dtype))
    problem = _divergence_problem(a)
    saved, gradients = _loop(problem, chunked).divergence_forward(problem, weights, _triple(a.needs))
    return (saved.rows[0] * weights).sum(), saved.rows, *_as_parameters(gradients, *a[:2])


@_operator("divergence", DivergenceArguments, returns=4)
def divergence(*arguments: Any) -> tuple[Tensor, ...]:
    """The fields of Saved; gradients flow through row 0 of the first, the divergence of each token."""
    problem = _divergence_problem(DivergenceArguments(*arguments))
    return tuple(_loop(problem, chunked).divergence_forward(problem)[0])


@_operator("divergence_backward", DivergenceArguments, returns=3, extra="grad rows context_lse support bucket_grads")
def divergence_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """dH, dW, db of sum_i grad_i d_i."""
    saved, a = Saved(*rest[:4]), DivergenceArguments(*rest[4:])
    problem = _divergence_problem(a, agree=False)
    gradients = _loop(problem, chunked).divergence_backward(problem, saved, grad, _triple(a.needs))
    return _as_parameters(gradients, *a[:2])


@_operator("logprobs", LogprobArguments, returns=1)
def logprobs(*arguments: Any) -> Tensor:
    """(3, N): log-prob of the label, entropy, logsumexp."""
    problem = _logprob_problem(LogprobArguments(*arguments))
    result: Tensor = _loop(problem, chunked_logprobs).logprobs_forward(problem)
    return result


@_operator("logprobs_backward", LogprobArguments, returns=3, extra="grads result")
def logprobs_backward(grads: Tensor, result: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """dH, dW, db of sum(grads * result)."""
    a = LogprobArguments(*arguments)
    problem = _logprob_problem(a, agree=False)
    gradients = _loop(problem, chunked_logprobs).logprobs_backward(problem, result, grads, _triple(a.needs))
    return _as_parameters(gradients, *a[:2])


def _loop(problem: DivergenceProblem | LogprobProblem, over_chunks: ModuleType) -> ModuleType:
    """The loop over chunks of logits, or `tiled` for a backend that never forms them."""
    return tiled if hasattr(problem.backend, TILES) else over_chunks


def _divergence_problem(a: DivergenceArguments, agree: bool = True) -> DivergenceProblem:
    """The problem on this rank; `agree` compares it with the other ranks', which the backward need not do again."""
    hidden, labels, ranks = a.student_hidden, a.labels, Ranks.named(a.group)
    student = _projection(a.student_weight, a.student_bias, a.student_logits, a)
    kept = _kept(hidden, labels, a.token_weights)
    buffers = 2 if a.context_weights is None else 3
    columns = student.weight.size(0)
    backend = _backend(a, columns, ranks if agree else Ranks())
    chunk = chunked.chunk_rows(kept.numel(), columns, hidden, a.chunk_tokens, a.memory_budget, buffers)
    if agree and ranks.group is not None:
        facts = _facts(a, ("alpha", "top_k", "add_tail"), kept) | {
            "number of contexts": a.teacher_hidden.size(0),
            "teacher hidden size": a.teacher_hidden.size(2),
            "temperature": a.student_logits[2],
            "teacher temperature": a.teacher_logits[2],
            "context_weights given": a.context_weights is not None,
            "context_weights (checksum)": _checksum(a.context_weights),
            "token_weights (checksum)": _checksum(a.token_weights),
        }
        chunk = ranks.agree("divergence", facts, Part(a.start, columns, a.vocabulary, chunk), hidden.device)
    return DivergenceProblem(
        student_hidden=hidden,
        student=student,
        teacher_hidden=a.teacher_hidden,
        teacher=_projection(a.teacher_weight, a.teacher_bias, a.teacher_logits, a),
        labels=labels,
        log_weights=None if a.context_weights is None else a.context_weights.log(),
        kept=kept,
        alpha=a.alpha,
        top_k=min(a.top_k, a.vocabulary),
        add_tail=a.add_tail,
        backend=backend,
        ranks=ranks,
        chunk=chunk,
        grad_filter=a.grad_filter,
    )


def _logprob_problem(a: LogprobArguments, agree: bool = True) -> LogprobProblem:
    hidden, ranks = a.hidden, Ranks.named(a.group)
    head, kept = _projection(a.weight, a.bias, a.logits, a), _kept(hidden, a.labels, None)
    columns = head.weight.size(0)
    backend = _backend(a, columns, ranks if agree else Ranks())
    chunk = chunked.chunk_rows(kept.numel(), columns, hidden, a.chunk_tokens, a.memory_budget, buffers=1)
    if agree and ranks.group is not None:
        facts = _facts(a, (), kept) | {"temperature": a.logits[2]}
        chunk = ranks.agree("logprobs", facts, Part(a.start, columns, a.vocabulary, chunk), hidden.device)
    return LogprobProblem(hidden, head, a.labels, kept, backend, ranks, chunk)


def _facts(a: DivergenceArguments | LogprobArguments, names: tuple[str, ...], kept: Tensor) -> dict[str, float]:
    """Numbers that ranks sharing a vocabulary must have in common."""
    hidden = a[0]
    place = torch.arange(1, hidden.size(0) + 1, device=hidden.device)
    return {name: getattr(a, name) for name in names} | {
        "number of tokens": hidden.size(0),
        "hidden size": hidden.size(1),
        "dtype (bytes)": hidden.element_size(),
        "number of kept tokens": kept.numel(),
        "kept tokens (checksum)": int(place[kept].sum()),
        "labels given": a.labels is not None,
        "labels (checksum)": _checksum(a.labels),
        "need of a gradient of hidden": a.needs[0],
    }


def _checksum(values: Tensor | None) -> int:
    """Of the bits, in order and exact: a sum of floats would depend on the device."""
    if values is None:
        return 0
    bits = values.contiguous().view({4: torch.int32, 8: torch.int64}[values.element_size()]).flatten().long()
    return int((bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum())


def _backend(a: DivergenceArguments | LogprobArguments, columns: int, ranks: Ranks) -> ModuleType:
    """The backend, which takes this problem; `ranks` that are about to agree hear of a refusal. A rank without valid
    rows has nothing that a kernel could be launched on."""
    try:
        backend = backends.pick(a.backend if columns > 0 else "eager", a[0])
        if hasattr(backend, "require"):
            backend.require(a[0])
        if hasattr(backend, TILES) and isinstance(a, DivergenceArguments):
            tiled.require(a.top_k, a.context_weights)
    except Exception:
        ranks.refuse(a[0].device)
        raise
    return backend


def _projection(
    weight: Tensor, bias: Tensor | None, logits: list[float], a: DivergenceArguments | LogprobArguments
) -> Projection:
    softcap, scale, temperature = logits
    rows = max(0, min(weight.size(0), a.vocabulary - a.start))
    bias = None if bias is None else bias[:rows]
    return Projection(weight[:rows], bias, scale, softcap or None, temperature, a.start, weight.size(0))


def _kept(hidden: Tensor, labels: Tensor | None, weights: Tensor | None) -> Tensor:
    mask = kept_mask(labels, weights)
    return torch.arange(hidden.size(0), device=hidden.device) if mask is None else mask.nonzero()[:, 0]


def _triple(needs: list[bool]) -> Needs:
    return needs[0], needs[1], needs[2]


def _as_parameters(gradients: Gradients, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients in their parameters' dtype. A float16 weight's gradient stays in float32 until it is scaled:
    sums over tokens may pass 65504."""
    wide = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    empty = hidden.new_empty(0)
    results = (gradients.hidden, gradients.weight, gradients.bias)
    return tuple(empty.clone() if g is None else g if i == 0 else g.to(wide) for i, g in enumerate(results))


def _fake_gradients(hidden: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor]:
    wide = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return [
        hidden.new_empty(shape if wanted else (0,), dtype=hidden.dtype if place == 0 or not wanted else wide)
        for place, (shape, wanted) in enumerate(zip(shapes, needs, strict=True))
    ]


@divergence_with_grads.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    a = DivergenceArguments(*arguments)
    rows = _fake_rows(a.student_hidden, len(DivergenceRows._fields))
    return rows.new_empty(()), rows, *_fake_gradients(a.student_hidden, a.student_weight, a.needs)


@divergence.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    a = DivergenceArguments(*arguments)
    contexts = 0 if a.context_weights is None else a.context_weights.size(0)
    return tuple(Saved.empty(a.student_hidden, contexts, min(a.top_k, a.vocabulary)))


@divergence_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    a = DivergenceArguments(*arguments[5:])
    return tuple(_fake_gradients(a.student_hidden, a.student_weight, a.needs))


@logprobs.register_fake
def _(*arguments: Any) -> Tensor:
    return _fake_rows(LogprobArguments(*arguments).hidden, 3)


@logprobs_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    a = LogprobArguments(*arguments[2:])
    return tuple(_fake_gradients(a.hidden, a.weight, a.needs))


def _fake_rows(hidden: Tensor, count: int) -> Tensor:
    return hidden.new_empty(count, hidden.size(0), dtype=accumulation_dtype(hidden.dtype))
