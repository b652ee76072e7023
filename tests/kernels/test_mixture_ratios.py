"""Jensen-Shannon terms of near-equal rows: log(q / M) and log(p / M) keep their precision as p approaches q."""

from __future__ import annotations

import pytest
import torch

from mopd_kernels import Execution, backends, linear_divergence
from mopd_kernels.losses import divergence
from mopd_kernels.losses.stats import Terms
from tests.kernels.problems import backends_under_test

C, V = 5, 67
ALPHAS = (0.1, 0.5, 0.9)


def logits(distance):
    torch.manual_seed(0)
    z = 3 * torch.randn(C, V, dtype=torch.float64)
    return z, z + distance * torch.randn(C, V, dtype=torch.float64)


def single(backend, *tensors):
    """float32, in the layout that the backend's chunks have."""
    column_major = getattr(backend, "COLUMN_MAJOR", False)
    return [t.float().T.contiguous().T if column_major and t.ndim == 2 else t.float() for t in tensors]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", backends_under_test())
def test_equal_rows_have_no_divergence_at_all(name, alpha):
    backend = backends.pick(name, torch.empty(0))
    z = single(backend, logits(0)[0])[0]
    lse = z.logsumexp(1)
    student, teacher = backend.mixture_sums(z, z.clone(), lse, lse, alpha)
    assert student.eq(0).all()
    assert teacher.eq(0).all()
    grad = z.T.clone().T if z.stride(0) == 1 else z.clone()
    backend.divergence_grad_(grad, z, Terms(lse, lse, torch.zeros(C)), torch.ones(C), alpha, None, 0.0)
    assert grad.eq(0).all()


@pytest.mark.parametrize("distance", [1e-3, 0.1, 2.0, 20.0])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", backends_under_test())
def test_sums_against_float64(name, alpha, distance):
    """Of equal float32 log-probs, so that only the ratios' own rounding is seen; sums of terms of both signs."""
    backend = backends.pick(name, torch.empty(0))
    log_q, log_p = (single(backend, z.log_softmax(1))[0] for z in logits(distance))
    nothing = torch.zeros(C)
    found = backend.mixture_sums(log_q, log_p, nothing, nothing, alpha)
    wide = log_q.double(), log_p.double()
    ratios = divergence.mixture_ratios(*wide, alpha)
    for got, log_weight, ratio in zip(found, wide, ratios, strict=True):
        terms = log_weight.exp() * ratio
        assert ((got.double() - terms.sum(1)).abs() <= 1e-6 * terms.abs().sum(1)).all()


@pytest.mark.parametrize("name", backends_under_test())
def test_a_student_that_equals_its_teacher_has_loss_zero(name):
    torch.manual_seed(0)
    hidden, weight = torch.randn(C, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True)
    out = linear_divergence(
        hidden, weight, hidden.detach(), weight.detach(), alpha=0.5, execution=Execution(backend=name)
    )
    out.loss.backward()
    assert out.loss == 0
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()
