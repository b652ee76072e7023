"""Hypothesis: arbitrary shapes, chunks, weights and shards, and logits at the edge of the number format.

Arbitrary logits Z (N, V) are made from hidden = identity and weight = Zᵀ; -inf entries from the bias.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopd_kernels import Execution, LMHead, linear_divergence
from mopd_kernels.backends import eager
from mopd_kernels.losses import LOSSES, divergence
from mopd_kernels.losses.stats import SideStats
from mopd_kernels.vocab_parallel import Ranks
from tests.kernels.problems import Problem, assert_equal, backends_under_test, dense, fused, tensors

ALPHAS = st.sampled_from([0.0, 1e-3, 0.3, 0.5, 0.999, 1.0])
EXTREMES = ("normal", "large", "far below zero", "one-hot", "equal", "-inf bias", "spike")
FEW = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def problems(draw):
    contexts = draw(st.integers(0, 3))
    return Problem(
        N=draw(st.integers(0, 7)),
        V=draw(st.integers(1, 40)),
        Hs=draw(st.integers(1, 9)),
        Ht=draw(st.integers(1, 9)),
        K=contexts,
        alpha=draw(ALPHAS),
        top_k=draw(st.none() | st.integers(1, 45)),
        add_tail=draw(st.booleans()),
        bias=draw(st.booleans()),
        softcap=draw(st.none() | st.floats(0.5, 30)),
        temperature=draw(st.floats(0.3, 3)),
        padding=(draw(st.integers(0, 3)), draw(st.integers(0, 3))),
        labels=draw(st.booleans()),
        weights=draw(st.booleans()),
        context_weights=draw(st.sampled_from([None, "context", "token"])) if contexts else None,
        execution=Execution(chunk_tokens=draw(st.integers(1, 8)), backend="eager"),
    )


@FEW
@given(problems(), st.integers(0, 1000), st.sampled_from(["sum", "none"]))
def test_any_problem_equals_the_dense_definition(problem, seed, reduction):
    inputs = tensors(problem, seed)
    assert_equal(fused(problem, inputs, reduction), dense(problem, inputs), 1e-9, 1e-10)


def extreme(kind, rows, columns, generator):
    z = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if kind == "large":
        z = z.sign() * 1e4
    if kind == "far below zero":
        z = z - 1e4
    if kind in ("one-hot", "spike"):
        z = torch.full_like(z, 0.0 if kind == "one-hot" else -80.0)
        z[torch.arange(rows), torch.randint(columns, (rows,), generator=generator)] = 1e4 if kind == "one-hot" else 5.0
    return z.float().double() if kind != "equal" else torch.full_like(z, 3.0)


@pytest.mark.parametrize("backend", backends_under_test())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@FEW
@given(
    st.sampled_from(EXTREMES), st.sampled_from(EXTREMES), ALPHAS, st.integers(2, 20),
    st.none() | st.integers(1, 6), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_extreme_logits(backend, dtype, student, teacher, alpha, columns, top_k, add_tail, seed):
    rows, generator = 3, torch.Generator().manual_seed(seed)
    z = [extreme(kind, rows, columns, generator) for kind in (student, teacher)]
    bias = torch.zeros(columns, dtype=torch.float64)
    if "-inf bias" in (student, teacher):
        bias[:: max(2, columns // 2)] = float("-inf")
    there = bias.isfinite()  # a column at -inf on both sides is as good as not there
    logits = [side[:, there].requires_grad_() for side in z]
    oracle = LOSSES["topk"](*logits, alpha, top_k, add_tail) if top_k else LOSSES["divergence"](*logits, alpha)
    (expected,) = torch.autograd.grad(oracle.sum(), logits[0])
    identity = torch.eye(rows, dtype=dtype).requires_grad_()
    heads = [LMHead(side.T.to(dtype).contiguous().requires_grad_(), bias.to(dtype)) for side in z]
    out = linear_divergence(
        identity, heads[0], identity.detach(), heads[1], alpha=alpha, top_k=top_k, add_tail=add_tail,
        reduction="none", execution=Execution(backend=backend),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss.sum(), heads[0].weight)
    # float32 logits and logsumexps of 1e4 are known to 1e-3, and probabilities to that factor
    scale = max(1.0, float(torch.stack(z).abs().max())) * torch.finfo(dtype).eps
    torch.testing.assert_close(out.per_token.double(), oracle.detach(), rtol=1e-5, atol=20 * scale)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad.double()[there], expected.T, rtol=1e-4 + 2 * scale, atol=40 * scale)


class InProcess(Ranks):
    """Ranks of which this process plays all: `_gather` gives what they would have sent."""

    def __init__(self, sent):
        super().__init__(group=object())
        object.__setattr__(self, "sent", sent)

    def _gather(self, part):
        return self.sent


@FEW
@given(
    st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 30), st.lists(st.integers(0, 30), max_size=4),
    st.sampled_from(EXTREMES), st.sampled_from(EXTREMES), st.integers(0, 1000),
)  # fmt: skip
def test_statistics_of_shards_merge_to_those_of_the_whole(alpha, columns, cuts, student, teacher, seed):
    generator = torch.Generator().manual_seed(seed)
    z_s, z_t = (extreme(kind, 4, columns, generator) for kind in (student, teacher))
    labels = torch.randint(columns, (4,), generator=generator)
    bounds = [0, *sorted(min(cut, columns) for cut in cuts), columns]
    parts = [eager.pair_stats(z_s[:, a:b], z_t[:, a:b], labels, a, alpha) for a, b in itertools.pairwise(bounds)]
    sent = [torch.stack([*s.student, *s.teacher, *(() if s.cross is None else (s.cross,))]) for s in parts]
    merged = InProcess(torch.stack(sent)).pair(parts[0], alpha)
    whole = eager.pair_stats(z_s, z_t, labels, 0, alpha)
    for mine, truth in zip(merged.student + merged.teacher, whole.student + whole.teacher, strict=True):
        torch.testing.assert_close(mine, truth)
    assert isinstance(merged.student, SideStats)
    if alpha in (0, 1):
        mine, truth = (divergence.kl_from_stats(stats, alpha) for stats in (merged, whole))
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-10)


@FEW
@given(ALPHAS, st.integers(0, 1000), st.none() | st.integers(1, 9))
def test_a_teacher_equal_to_the_student_costs_nothing(alpha, seed, top_k):
    problem = Problem(alpha=alpha, Hs=6, Ht=6, top_k=top_k)
    inputs = tensors(problem, seed)
    inputs |= {f"teacher_{name}": inputs[f"student_{name}"] for name in ("hidden", "weight")}
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
        result = fused(replace(problem, dtype=dtype), inputs)
        assert result.value.abs().max() <= bound
        assert all(grad.abs().max() <= 10 * bound for grad in result.grads.values())
