"""The C++ row kernels against the eager backend in float64, at every instruction set this machine has."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mopd_kernels import Execution, LMHead, backends, linear_divergence
from mopd_kernels.backends import eager
from mopd_kernels.losses import divergence
from mopd_kernels.losses.stats import Terms

try:
    from mopd_kernels.backends import cpu
except OSError as error:
    pytest.skip(f"C++ kernels are not built: {error}", allow_module_level=True)

INFINITY = float("inf")
SHAPES = [(1, 1), (3, 257), (17, 1003), (33, 64), (16, 2 * 2048 + 5)]  # (C, V): tails of vectors, several slices
ALPHAS = (0.0, 0.3, 1.0)
DTYPES = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@pytest.fixture(params=cpu.levels(), autouse=True)
def level(request, monkeypatch):
    monkeypatch.setenv("MOPD_CPU_LEVEL", request.param)
    return request.param


def by_row(z: Tensor, spare: int = 0) -> Tensor:
    """A copy of z (C, V) that lies by vocabulary row, with `spare` values of NaN after each."""
    space = torch.full((z.size(1), z.size(0) + spare), torch.nan, dtype=z.dtype)
    out = space[:, : z.size(0)].T
    return out.copy_(z)


def logits(C: int, V: int, dtype: torch.dtype, spread: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two near-equal sides with a few impossible entries, drawn so that both dtypes see the same numbers."""
    generator = torch.Generator().manual_seed(1000 * C + V + seed)
    z_s = spread * torch.randn(C, V, generator=generator)
    z_t = z_s + 0.3 * spread * torch.randn(C, V, generator=generator)
    if V > 3:
        z_s[0, 1], z_t[0, 1] = -INFINITY, -INFINITY
        z_s[-1, 2] = 60 * spread
    return z_s.to(dtype), z_t.to(dtype)


def assert_as_good(actual: Tensor, exact: Tensor, plain: Tensor, eps: float, name: str) -> None:
    """No worse than three times the eager backend's own rounding in the same dtype, and a few units in the last place."""
    assert torch.equal(actual.isfinite(), exact.isfinite()), name
    exact = exact.nan_to_num()
    error, reference = ((x.double().nan_to_num() - exact).abs().max() for x in (actual, plain))
    bound = 3 * reference + 32 * eps * exact.abs().max().clamp(min=1)
    assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e}"


@pytest.mark.parametrize(("name", "low", "high", "ulps"), [("exp", -87.33, 88.72, 1.0), ("log", 1.2e-38, 3e38, 2.0)])
def test_elementary_functions_over_their_range(name, low, high, ulps):
    x = torch.arange(-(2**31), 2**31, 1021, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = x[(x >= low) & (x <= high)].contiguous()
    y = torch.empty_like(x)
    getattr(cpu.library(), f"mopd_{name}")(cpu._run(x), x.data_ptr(), y.data_ptr(), x.numel())
    exact = getattr(torch, name)(x.double())
    spacing = 2.0 ** (exact.abs().log2().floor() - 23).clamp(min=-149)
    error = float(((y.double() - exact).abs() / spacing).max())
    assert x.numel() > 1_000_000
    assert error <= ulps, f"{name}: {error:.2f} units in the last place, bound {ulps}"


def test_exp_outside_the_normal_range():
    x = torch.tensor([-INFINITY, -1e30, -104.1, -100.0, -88.0, 0.0, 88.8, INFINITY, torch.nan])
    y = torch.empty_like(x)
    cpu.library().mopd_exp(cpu._run(x), x.data_ptr(), y.data_ptr(), x.numel())
    torch.testing.assert_close(y, x.double().exp().float(), rtol=1e-6, atol=2e-45, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_statistics(shape, dtype, alpha):
    z_s, z_t = logits(*shape, dtype)
    labels = torch.arange(shape[0]) * 7 % shape[1] + 100 - (torch.arange(shape[0]) % 3 == 2) * 10**6
    ours = cpu.pair_stats(by_row(z_s, 3), by_row(z_t), labels, 100, alpha)
    exact = eager.pair_stats(z_s.double(), z_t.double(), labels, 100, alpha)
    plain = eager.pair_stats(z_s, z_t, labels, 100, alpha)
    for name in ("maximum", "label", "argmax"):
        for side in ("student", "teacher"):
            assert torch.equal(getattr(getattr(ours, side), name), getattr(getattr(plain, side), name)), (side, name)
    for name in ("sumexp", "moment", "entropy"):
        for side in ("student", "teacher"):
            values = [getattr(getattr(stats, side), name) for stats in (ours, exact, plain)]
            assert_as_good(*values, DTYPES[dtype], f"{side} {name}")
    assert (ours.cross is None) == (plain.cross is None)
    if ours.cross is not None:
        assert_as_good(ours.cross, exact.cross, plain.cross, DTYPES[dtype], "cross")
    for mine, same in zip(cpu.side_stats(by_row(z_s), labels, 100), ours.student, strict=True):
        assert torch.equal(mine, same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixtures(shape, dtype):
    z_s, z_t = logits(*shape, dtype)
    lse_s, lse_t = z_s.logsumexp(1), z_t.logsumexp(1)
    arguments = [(z.double(), t.double(), a.double(), b.double()) for z, t, a, b in [(z_s, z_t, lse_s, lse_t)]][0]
    ours = cpu.mixture_sums(by_row(z_s), by_row(z_t, 5), lse_s, lse_t, 0.3)
    sums = zip(ours, eager.mixture_sums(*arguments, 0.3), eager.mixture_sums(z_s, z_t, lse_s, lse_t, 0.3), strict=True)
    for name, values in zip(("student", "teacher"), sums, strict=True):
        assert_as_good(*values, DTYPES[dtype], name)

    log_weight = torch.linspace(-3, -0.1, shape[0], dtype=dtype)
    ours, exact, plain = by_row(z_s - lse_s[:, None]), (z_s - lse_s[:, None]).double(), z_s - lse_s[:, None]
    cpu.mix_(ours, by_row(z_t), lse_t, log_weight)
    eager.mix_(exact, z_t.double(), lse_t.double(), log_weight.double())
    eager.mix_(plain, z_t, lse_t, log_weight)
    assert_as_good(ours, exact, plain, DTYPES[dtype], "mix_")


def terms_of(z_s: Tensor, z_t: Tensor, alpha: float) -> Terms:
    stats = eager.pair_stats(z_s, z_t, None, 0, alpha)
    kls = None
    if stats.cross is None:
        kls = eager.mixture_sums(z_s, z_t, stats.student.logsumexp, stats.teacher.logsumexp, alpha)
    return divergence.value_and_terms(stats, kls, alpha)[1]


def gradients(z_s: Tensor, z_t: Tensor, alpha: float, cap: float | None, grad_filter: float) -> list[Tensor]:
    """Ours, exact and plain, from the same terms."""
    terms = terms_of(z_s.double(), z_t.double(), alpha)
    coefficient = torch.linspace(-1, 2, z_s.size(0), dtype=torch.float64)
    results = []
    for backend, dtype in ((cpu, z_s.dtype), (eager, torch.float64), (eager, z_s.dtype)):
        student = by_row(z_s.to(dtype), 1) if backend is cpu else z_s.to(dtype, copy=True)
        rounded = Terms(*(term.to(dtype) for term in terms))
        backend.divergence_grad_(student, z_t.to(dtype), rounded, coefficient.to(dtype), alpha, cap, grad_filter)
        results.append(student)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("cap", [None, 40.0])
def test_divergence_gradient(shape, dtype, alpha, cap):
    z_s, z_t = logits(*shape, dtype)
    if cap is not None:
        z_s, z_t = z_s.clamp(-cap, cap), z_t.clamp(-cap, cap)
    assert_as_good(*gradients(z_s, z_t, alpha, cap, 0.0), DTYPES[dtype], "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("grad_filter", [1e-6, 1e-3, 10.0])
def test_filtered_gradient_and_its_products(dtype, alpha, grad_filter, monkeypatch):
    """Packed, expanded and dense hold the same entries; sparse products are the dense ones."""
    C, V, H = 33, 2 * 2048 + 5, 37
    z_s, z_t = logits(C, V, dtype)
    terms = Terms(*(term.to(dtype) for term in terms_of(z_s.double(), z_t.double(), alpha)))
    coefficient = torch.linspace(-1, 2, C, dtype=dtype)
    dense = by_row(z_s)
    cpu.divergence_grad_(dense, by_row(z_t), terms, coefficient, alpha, 200.0, grad_filter)
    unfiltered = by_row(z_s)
    cpu.divergence_grad_(unfiltered, by_row(z_t), terms, torch.ones_like(coefficient), alpha, None, 0.0)
    scale = coefficient[:, None] * (1 - (z_s / 200.0).square())
    expected = torch.where(unfiltered.abs() > grad_filter, unfiltered * scale.nan_to_num(), 0.0)
    torch.testing.assert_close(dense, expected, rtol=1e-5, atol=0)

    packed = by_row(z_s, 2), by_row(z_t)
    monkeypatch.setattr(cpu, "SPARSE_BELOW", -1.0)
    assert cpu.divergence_grad_kept_(*packed, terms, coefficient, alpha, 200.0, grad_filter) is None
    assert torch.equal(packed[0], dense)

    packed = by_row(z_s, 2), by_row(z_t)
    monkeypatch.setattr(cpu, "SPARSE_BELOW", 1.0)
    kept = cpu.divergence_grad_kept_(*packed, terms, coefficient, alpha, 200.0, grad_filter)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, H, generator=generator, dtype=dtype) for size in (C, V))
    grads = [torch.full((C, H), torch.nan, dtype=dtype), torch.ones(V, H, dtype=dtype), torch.ones(V, dtype=dtype)]
    kept.products(hidden, weight, 0.5, *grads)
    references = 0.5 * dense @ weight, 1 + 0.5 * dense.T @ hidden, 1 + 0.5 * dense.sum(0)
    for name, ours, reference in zip(("dH", "dW", "db"), grads, references, strict=True):
        tolerance = 200 * DTYPES[dtype] * float(reference.abs().max())
        torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    only_weight = torch.ones(V, H, dtype=dtype)
    kept.products(hidden, weight, 0.5, None, only_weight, None)
    assert torch.equal(only_weight, grads[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cap", [None, 40.0])
def test_logprob_gradient(shape, dtype, cap):
    z, _ = logits(*shape, dtype)
    z = z if cap is None else z.clamp(-cap, cap)
    side = eager.side_stats(z.double(), None, 0)
    labels = 50 + (torch.arange(shape[0]) * 5 % (shape[1] + 3))  # some lie past the last row
    grads = tuple(torch.linspace(a, b, shape[0], dtype=torch.float64) for a, b in ((-1, 2), (0.5, -0.5), (0, 1)))
    results = []
    for backend, to in ((cpu, dtype), (eager, torch.float64), (eager, dtype)):
        target = by_row(z.to(to)) if backend is cpu else z.to(to, copy=True)
        statistics = side.logsumexp.to(to), side.entropy.to(to)
        backend.logprob_grad_(target, *statistics, labels, 50, tuple(g.to(to) for g in grads), cap)
        results.append(target)
    assert_as_good(*results, DTYPES[dtype], "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "k"), [((1, 1), 1), ((3, 257), 257), ((17, 1003), 5), ((33, 4101), 100)])
def test_topk(shape, k, dtype):
    """With many equal values: among equals the lower row comes first."""
    z = torch.randint(-40, 40, shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    values, rows = cpu.topk(by_row(z, 1), k)
    order = z.double().sort(dim=1, descending=True, stable=True)
    assert torch.equal(rows, order.indices[:, :k])
    assert torch.equal(values, order.values[:, :k].to(dtype))


def test_topk_refuses_more_than_there_is():
    with pytest.raises(ValueError, match=r"expected k in \[1, 4\], got 5"):
        cpu.topk(torch.zeros(2, 4), 5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_impossible_entries_count_nothing_and_nan_stays(alpha):
    """p = q = 0 adds 0; NaN in one token leaves the others alone."""
    z_s, z_t = (z[:, :9].contiguous() for z in logits(5, 9, torch.float32, spread=1.0))
    clean = cpu.pair_stats(by_row(z_s), by_row(z_t), None, 0, alpha), terms_of(z_s, z_t, alpha)
    padded = [torch.cat([z, torch.full((5, 4), -INFINITY)], dim=1) for z in (z_s, z_t)]
    padded[0][2, 3] = torch.nan
    stats = cpu.pair_stats(by_row(padded[0]), by_row(padded[1]), None, 0, alpha)
    others = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(stats.student.sumexp[others], clean[0].student.sumexp[others])
    assert stats.student.sumexp[2].isnan()
    grad = by_row(padded[0])
    cpu.divergence_grad_(grad, by_row(padded[1]), clean[1], torch.ones(5), alpha, None, 0.0)
    assert grad[2, 3].isnan()
    assert torch.equal(grad[:, 9:], torch.zeros(5, 4))


def test_rows_of_nothing_match_eager():
    z = torch.full((3, 20), -INFINITY)
    for ours, theirs in zip(cpu.side_stats(by_row(z), None, 0), eager.side_stats(z, None, 0), strict=True):
        assert torch.equal(ours, theirs)
    empty = torch.empty(3, 0)
    for ours, theirs in zip(cpu.side_stats(empty, None, 7), eager.side_stats(empty, None, 7), strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_results_do_not_depend_on_layout_or_threads():
    z_s, z_t = logits(37, 3 * 2048 + 11, torch.float32)
    terms, ones = terms_of(z_s, z_t, 1.0), torch.ones(37)
    hidden, weight = torch.randn(37, 24), torch.randn(z_s.size(1), 24)

    def everything(layout) -> list[Tensor]:  # type: ignore[no-untyped-def]
        student, teacher = layout(z_s), layout(z_t)
        results = [*cpu.side_stats(student, None, 0), *cpu.topk(student, 9)]
        results += [cpu.pair_stats(student, teacher, None, 0, 1.0).cross]
        results += cpu.mixture_sums(student, teacher, terms.student_lse, terms.teacher_lse, 0.5)
        kept = cpu.divergence_grad_kept_(by_row(z_s), by_row(z_t), terms, ones, 1.0, None, 1e-3)
        grads = torch.empty_like(hidden), torch.zeros_like(weight)
        kept.products(hidden, weight, 1.0, *grads, None)
        cpu.divergence_grad_(student, teacher, terms, ones, 1.0, None, 0.0)
        return [*results, *grads, student]

    threads = torch.get_num_threads()
    runs = [everything(by_row), everything(torch.Tensor.clone)]
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        runs.append(everything(by_row))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        for first, other in zip(runs[0], run, strict=True):
            assert torch.equal(first, other)


def random_op(backend: str, alpha: float, grad_filter: float, **head_options: object) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden, noise = (torch.randn(40, 16, generator=generator) for _ in range(2))
    weight = torch.randn(700, 16, generator=generator)
    bias = torch.randn(700, generator=generator).requires_grad_()
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(), bias
    out = linear_divergence(
        leaves[0], LMHead(leaves[1], bias, **head_options), hidden + 0.1 * noise, weight,
        alpha=alpha, reduction="sum", execution=Execution(backend, chunk_tokens=16, grad_filter=grad_filter),
    )  # fmt: skip
    return [out.loss, *torch.autograd.grad(out.loss, leaves)]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "scale": 0.5}], ids=str)
@pytest.mark.parametrize("grad_filter", [0.0, 1e-7, 1e-3])
def test_op_with_filter_matches_eager(alpha, options, grad_filter):
    for ours, eagers in zip(*(random_op(name, alpha, grad_filter, **options) for name in ("cpu", "eager")), strict=True):
        tolerance = 2e-5 * float(eagers.detach().abs().max()) + 40 * 2e-6 * grad_filter  # entries at the filter may fall either way
        torch.testing.assert_close(ours, eagers, rtol=0, atol=tolerance)


def test_exact_mode_never_packs(monkeypatch):
    def refuse(*arguments: object) -> None:
        raise AssertionError("exact gradients were packed")

    monkeypatch.setattr(cpu, "divergence_grad_kept_", refuse)
    random_op("cpu", 1.0, 0.0)
    with pytest.raises(AssertionError, match="packed"):
        random_op("cpu", 1.0, 1e-6)


def test_default_backend_of_cpu_tensors(monkeypatch, caplog):
    assert backends.pick(None, torch.empty(0)) is cpu
    monkeypatch.setenv("MOPD_CPU_LIBRARY", "/nowhere/libmopd_cpu.so")
    monkeypatch.delitem(sys.modules, cpu.__name__)
    backends._on_cpu.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert backends.pick(None, torch.empty(0)) is eager
        assert backends.pick(None, torch.empty(0)) is eager
    backends._on_cpu.cache_clear()
    assert len(caplog.records) == 1
    assert "/nowhere/libmopd_cpu.so" in caplog.text


def test_unknown_level_is_refused(monkeypatch):
    monkeypatch.setenv("MOPD_CPU_LEVEL", "mmx")
    with pytest.raises(ValueError, match="expected MOPD_CPU_LEVEL in .*portable.*, got 'mmx'"):
        cpu.side_stats(torch.zeros(1, 1), None, 0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    C=st.integers(1, 40),
    V=st.integers(1, 90),
    spread=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    special=st.sampled_from([0.0, -INFINITY, 3e38, -3e38]),
    alpha=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
    spare=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_fuzz(C, V, spread, special, alpha, spare, seed):
    z_s, z_t = logits(C, V, torch.float32, spread, seed)
    z_s[seed % C, seed % V] = special
    z_t[seed % C, (seed + seed % 2) % V] = special
    double = z_s.double(), z_t.double()
    ours = cpu.pair_stats(by_row(z_s, spare), by_row(z_t, spare), None, 0, alpha)
    exact = eager.pair_stats(*double, None, 0, alpha)
    plain = eager.pair_stats(z_s, z_t, None, 0, alpha)
    for name in ("sumexp", "entropy"):
        values = [getattr(stats.teacher, name) for stats in (ours, exact, plain)]
        assert_as_good(values[0], values[1], values[2], DTYPES[torch.float32], name)
    if bool(exact.student.sumexp.gt(0).all()) and bool(exact.teacher.sumexp.gt(0).all()):
        assert_as_good(*gradients(z_s, z_t, alpha, None, 0.0), DTYPES[torch.float32], "gradient")
