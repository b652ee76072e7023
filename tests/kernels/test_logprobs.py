"""linear_logprobs and grouped_logprobs against the dense float64 definition."""

from __future__ import annotations

import pytest
import torch

from mopd_kernels import Execution, LMHead, grouped_logprobs, linear_logprobs
from mopd_kernels.losses import LOSSES
from tests.kernels.problems import Problem, backends_under_test, head_logits, tensors

OPTIONS = {
    "plain": Problem(),
    "bias": Problem(bias=True, padding=(5, 0)),
    "softcap": Problem(softcap=2.0, scale=0.7, bias=True),
    "temperature": Problem(temperature=0.6),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}


def setup(problem, dtype):
    inputs = tensors(problem)
    inputs["labels"] = torch.randint(0, problem.V, (problem.N,), generator=torch.Generator().manual_seed(1))
    names = [name for name in ("student_hidden", "student_weight", "student_bias") if name in inputs]
    leaves = {name: inputs[name].to(dtype).requires_grad_() for name in names}
    head = LMHead(
        leaves["student_weight"], leaves.get("student_bias"), problem.softcap, problem.scale, vocab_size=problem.V
    )
    oracle = {name: inputs[name].to(dtype).double().requires_grad_() for name in names}
    return inputs, leaves, head, oracle


@pytest.mark.parametrize("backend", backends_under_test())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_the_dense_definition(backend, dtype, option):
    problem = OPTIONS[option]
    inputs, leaves, head, oracle = setup(problem, dtype)
    labels = inputs["labels"].clone()
    labels[::4] = -100
    mask = labels != -100
    out = linear_logprobs(
        leaves["student_hidden"], head, labels, temperature=problem.temperature,
        execution=Execution(backend=backend, chunk_tokens=4),
    )  # fmt: skip
    z = head_logits(problem, "student", oracle)
    expected = [torch.where(mask, value, 0.0) for value in LOSSES["logprob"](z, labels.clamp(min=0))]
    tolerance = TOLERANCE[dtype]
    for ours, theirs in zip((out.logprobs, out.entropy, out.logsumexp), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    mix = torch.randn(3, problem.N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = torch.autograd.grad(
        (torch.stack([out.logprobs, out.entropy, out.logsumexp]) * mix).sum(), [*leaves.values()]
    )
    theirs = torch.autograd.grad((torch.stack(expected) * mix).sum(), [*oracle.values()])
    for mine, truth in zip(ours, theirs, strict=True):
        assert (mine - truth).abs().max() <= tolerance * (1 + truth.abs().max())


@pytest.mark.parametrize("which", ["logprobs", "entropy", "logsumexp"])
def test_gradcheck(which):
    problem = Problem(N=3, V=7, Hs=3, softcap=2.0, bias=True)
    inputs, leaves, _, _ = setup(problem, torch.float64)

    def result(hidden, weight, bias):
        head = LMHead(weight, bias, problem.softcap)
        return getattr(linear_logprobs(hidden, head, inputs["labels"], execution=Execution(chunk_tokens=2)), which)

    assert torch.autograd.gradcheck(result, list(leaves.values()))


def test_grouped_is_each_context_by_itself():
    problem = Problem(N=6)
    inputs, leaves, head, _ = setup(problem, torch.float64)
    hidden = torch.stack([inputs["student_hidden"] * factor for factor in (1, 2, -1)]).requires_grad_()
    grouped = grouped_logprobs(hidden, head, inputs["labels"])
    single = [linear_logprobs(part, head, inputs["labels"]) for part in hidden]
    upstream = torch.randn(3, 6, dtype=torch.float64)
    for name in ("logprobs", "entropy", "logsumexp"):
        torch.testing.assert_close(getattr(grouped, name), torch.stack([getattr(one, name) for one in single]))
    ours = torch.autograd.grad((grouped.logprobs * upstream).sum(), [hidden, leaves["student_weight"]])
    each = torch.stack([one.logprobs for one in single])
    theirs = torch.autograd.grad((each * upstream).sum(), [hidden, leaves["student_weight"]])
    for mine, truth in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, truth)


def test_without_gradients_nothing_is_kept_for_them():
    _, leaves, head, _ = setup(Problem(), torch.float32)
    with torch.no_grad():
        out = linear_logprobs(leaves["student_hidden"], head, torch.zeros(9, dtype=torch.int64))
    assert out.logprobs.grad_fn is None
    assert out.logprobs.lt(0).all()
