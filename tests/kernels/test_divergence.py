"""linear_divergence against the dense float64 definition: values and all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mopd_kernels import Execution
from mopd_kernels.losses import LOSSES
from tests.kernels.problems import (
    Problem,
    assert_equal,
    backends_under_test,
    call,
    dense,
    fused,
    head_logits,
    leaves_of,
    tensors,
)

ALPHAS = (0.0, 0.3, 0.5, 1.0)
OPTIONS = {
    "plain": Problem(),
    "bias": Problem(bias=True),
    "softcap": Problem(softcap=2.0, bias=True),
    "scale": Problem(scale=0.25),
    "temperatures": Problem(temperature=0.7, teacher_temperature=1.6, softcap=3.0),
    "padding": Problem(padding=(3, 11), bias=True),
    "labels": Problem(labels=True),
    "weights": Problem(weights=True, labels=True),
    "one token": Problem(N=1, V=2),
    "contexts": Problem(K=3),
    "context weights": Problem(K=2, context_weights="context"),
    "token context weights": Problem(K=3, context_weights="token", weights=True),
    "one context": Problem(K=1, context_weights="context"),
    "top-k": Problem(top_k=5),
    "top-k without tail": Problem(top_k=5, add_tail=False),
    "top-k of all": Problem(top_k=64, labels=True),
    "top-k, everything": Problem(top_k=7, K=2, bias=True, softcap=3.0, labels=True, weights=True, padding=(2, 0)),
    "everything": Problem(
        K=2, bias=True, softcap=3.0, scale=0.5, temperature=0.8, labels=True, weights=True, padding=(2, 0)
    ),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize("backend", backends_under_test())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("option", OPTIONS)
def test_equals_the_dense_definition(backend, dtype, alpha, option):
    problem = replace(OPTIONS[option], alpha=alpha, dtype=dtype, execution=Execution(backend=backend, chunk_tokens=4))
    inputs = tensors(problem)
    expected = dense(problem, inputs)
    for reduction in ("none", "sum"):
        assert_equal(fused(problem, inputs, reduction), expected, TOLERANCE[dtype], TOLERANCE[dtype])


@pytest.mark.parametrize("backend", backends_under_test())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("option", ["plain", "softcap", "contexts"])
def test_low_precision_error_is_bounded_by_the_plain_path(backend, dtype, alpha, option):
    problem = replace(
        OPTIONS[option],
        N=16, V=64, Hs=32, Ht=32, alpha=alpha, dtype=dtype, spread=2.0,
        execution=Execution(backend=backend, chunk_tokens=5),
    )  # fmt: skip
    inputs = tensors(problem)
    exact, plain = dense(problem, inputs), dense(problem, inputs, dtype)
    for reduction in ("none", "sum"):
        ours = fused(problem, inputs, reduction)
        for name in ("value", *exact.grads):
            truth, theirs, mine = (_field(result, name).double() for result in (exact, plain, ours))
            bound = 2 * (theirs - truth).norm() + torch.finfo(dtype).eps * truth.norm()
            assert (mine - truth).norm() <= bound, name


def _field(result, name):
    return result.value if name == "value" else result.grads[name]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("option", ["everything", "top-k, everything", "top-k without tail"])
def test_gradcheck(alpha, option):
    problem = replace(OPTIONS[option], alpha=alpha, N=4, V=9, Hs=3, Ht=3, top_k=OPTIONS[option].top_k and 3)
    problem = replace(problem, execution=Execution(chunk_tokens=3, save="statistics"))
    leaves = leaves_of(problem, tensors(problem))
    names = [name for name in ("student_hidden", "student_weight", "student_bias") if name in leaves]

    for reduction in ("none", "sum", "mean"):

        def loss(*values, reduction=reduction):
            return call(problem, leaves | dict(zip(names, values, strict=True)), reduction).loss

        assert torch.autograd.gradcheck(loss, [leaves[name] for name in names])


@pytest.mark.parametrize("option", ["everything", "top-k, everything"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_chunks_do_not_change_the_result(option, alpha):
    results = []
    for chunk in (1, 3, 100):
        problem = replace(OPTIONS[option], alpha=alpha, execution=Execution(chunk_tokens=chunk))
        results.append(fused(problem, tensors(problem), "sum"))
    for other in results[1:]:
        assert_equal(other, results[0], 1e-13, 1e-13)


@pytest.mark.parametrize("backend", backends_under_test())
@pytest.mark.parametrize("option", ["plain", "top-k", "contexts"])
def test_runs_are_bitwise_equal(backend, option):
    problem = replace(OPTIONS[option], dtype=torch.float32, execution=Execution(backend=backend, chunk_tokens=4))
    first, second = (fused(problem, tensors(problem), "sum") for _ in range(2))
    assert torch.equal(first.value, second.value)
    assert all(torch.equal(first.grads[name], second.grads[name]) for name in first.grads)


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("tied", ["all", "boundary"])
def test_ties_in_the_support_go_to_the_lowest_index(top_k, tied):
    problem = Problem(top_k=top_k, bias=True, alpha=0.5)
    inputs = tensors(problem)
    inputs["student_hidden"].zero_()
    inputs["student_bias"].zero_()
    if tied == "boundary":
        inputs["student_bias"][20] = 1.0
    assert_equal(fused(problem, inputs), dense(problem, inputs), 1e-12, 1e-12)


def test_topk_mass_is_the_support_probability():
    problem = Problem(top_k=3)
    inputs = tensors(problem)
    out = call(problem, leaves_of(problem, inputs), "sum")
    q = (inputs["student_hidden"] @ inputs["student_weight"].T).softmax(-1)
    p = (inputs["teacher_hidden"] @ inputs["teacher_weight"].T).softmax(-1)
    largest = q.topk(3).indices
    torch.testing.assert_close(out.student_topk_mass, q.gather(1, largest).sum(1))
    torch.testing.assert_close(out.teacher_topk_mass, p.gather(1, largest).sum(1))


def test_a_tail_far_below_the_rounding_of_one_keeps_its_gradient():
    """1 - Σ of the support is 0 in float32 here; the tail's logsumexp is not."""
    problem = Problem(N=1, V=6, Hs=1, Ht=1, top_k=1, alpha=1.0, dtype=torch.float32)
    inputs = {
        "student_hidden": torch.ones(1, 1), "student_weight": torch.tensor([[40.0], [0], [1], [2], [3], [4]]),
        "teacher_hidden": torch.ones(1, 1), "teacher_weight": torch.tensor([[0.0], [90], [0], [0], [0], [0]]),
        "upstream": torch.ones(1),
    }  # fmt: skip
    inputs = {name: value.double() for name, value in inputs.items()}
    expected = dense(problem, inputs).grads["student_weight"][1:]
    assert (expected != 0).all()
    actual = fused(problem, inputs).grads["student_weight"][1:].double()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_grad_filter_drops_entries_up_to_its_bound(top_k, softcap, alpha):
    """Of d(value)/dz, and with top-k of the gradient behind the softcap; a weight of 1 shows it as dH."""
    problem = Problem(Hs=37, alpha=alpha, top_k=top_k, softcap=softcap, spread=3.0)
    inputs = tensors(problem)
    inputs["student_weight"] = torch.eye(problem.V, dtype=torch.float64)
    inputs["student_hidden"] *= 3
    inputs["upstream"] = torch.ones(problem.N, dtype=torch.float64)
    z_s, z_t = (head_logits(problem, side, inputs) for side in ("student", "teacher"))
    z_s.requires_grad_()
    value = LOSSES["topk"](z_s, z_t, alpha, top_k) if top_k else LOSSES["divergence"](z_s, z_t, alpha)
    (exact,) = torch.autograd.grad(value.sum(), z_s)
    slope = torch.ones_like(exact) if softcap is None else 1 - (z_s.detach() / softcap).square()
    bound = float((exact * slope).abs().max()) / 3
    before, behind = exact.abs() <= bound, (exact * slope).abs() <= bound
    assert softcap is None or (before != behind).any()
    expected = torch.where(behind if top_k else before, 0.0, exact * slope)
    sparse = fused(replace(problem, execution=Execution(chunk_tokens=4, grad_filter=bound)), inputs)
    torch.testing.assert_close(sparse.grads["student_hidden"], expected)
    assert (expected == 0).any()
    assert (expected != 0).any()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("backend", backends_under_test())
def test_an_offset_of_all_logits_costs_no_precision(backend, alpha):
    """Two near sides at -1000: logsumexps that are rounded there differ by more than their KL."""
    execution = Execution(backend=backend)
    problem = Problem(N=32, V=300, Hs=32, Ht=32, bias=True, alpha=alpha, dtype=torch.float32, execution=execution)
    inputs = tensors(problem)
    inputs["teacher_weight"] = inputs["student_weight"].clone()
    inputs["teacher_hidden"] = (inputs["student_hidden"] + 0.02 * inputs["teacher_hidden"]).float().double()
    for side in ("student", "teacher"):
        inputs[f"{side}_bias"] = torch.full((problem.V,), -1000.0, dtype=torch.float64)
    exact, plain, ours = dense(problem, inputs), dense(problem, inputs, torch.float32), fused(problem, inputs)
    error, allowed = (float((result.value.double() - exact.value).norm()) for result in (ours, plain))
    assert error <= 4 * allowed, (error, allowed)


@pytest.mark.parametrize("backend", backends_under_test())
@pytest.mark.parametrize("weight", [1e-4, 1e-6])
def test_small_token_weights_do_not_underflow_in_half_precision(backend, weight):
    """With the loss scale of a GradScaler, which a gradient taken in the forward meets too late."""
    problem = Problem(
        N=16, V=300, Hs=32, Ht=32, alpha=1.0, dtype=torch.float16, execution=Execution(backend=backend, chunk_tokens=8)
    )
    inputs = tensors(problem)
    inputs["upstream"] = torch.full((problem.N,), weight, dtype=torch.float64)
    exact = dense(problem, inputs)
    leaves = leaves_of(problem, inputs)
    (65536.0 * call(problem, leaves, "sum", token_weights=inputs["upstream"]).loss).backward()
    for name, truth in exact.grads.items():
        error = (leaves[name].grad.double() / 65536 - truth).norm() / truth.norm()
        assert error < 2 * torch.finfo(torch.float16).eps, (name, float(error))
