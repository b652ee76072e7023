"""Triton kernels under the interpreter against the dense float64 definition: row kernels, tiles and top-k.

The whole parametrised suite runs on them with MOPD_INTERPRET_ALL=1 (minutes); here are the cases that differ in
code: losses, dtypes, tails of blocks, split rows, masks of -inf, options of the head, blocks of the backward.
"""

from dataclasses import replace

import pytest
import torch

from mopd_kernels import Execution, LMHead, backends, linear_logprobs
from mopd_kernels.backends import eager
from mopd_kernels.losses import LOSSES, divergence
from mopd_kernels.losses.stats import Terms
from tests.kernels.problems import Problem, assert_equal, call, dense, fused, leaves_of, tensors

triton = pytest.importorskip("triton")
rows = backends.pick("triton", torch.empty(0))
tiles = backends.pick("triton-tiles", torch.empty(0))
configs = pytest.importorskip("mopd_kernels.backends.triton.configs")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = Problem(
    bias=True, softcap=3.0, scale=0.5, temperature=0.8, teacher_temperature=1.3, labels=True, weights=True,
    padding=(2, 5),
)  # fmt: skip
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
LOW = (torch.bfloat16, torch.float16)
EXACT = {torch.float64: 1e-11, torch.float32: 3e-5}


def extreme_rows(columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits as they break online softmax: large, masked in part and from the start, one-hot, equal, far below 0."""
    generator = torch.Generator().manual_seed(columns)
    z = torch.randn(2, 7, columns, generator=generator, dtype=torch.float64) * 3
    z[0, 0, : columns // 2] = float("-inf")
    z[:, 1, ::2] = float("-inf")
    z[:, 2] *= 3000
    z[0, 3] = -1e4
    z[0, 3, -1] = 1e4
    z[1, 3] = -1e4
    z[1, 3, 0] = 1e4
    z[1, 4] = z[0, 4]
    z[:, 5] -= 9e3
    z[1, 6] = float("-inf")
    z[1, 6, columns // 3] = 0
    student, teacher = z.to(dtype).to(DEVICE)
    return student, teacher


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of several programs, each of several blocks."""
    for table in (configs.ROWS, configs.TOPK):
        monkeypatch.setitem(table, "interpreter", configs.Rows(block=64, warps=1, least=128))
    monkeypatch.setitem(configs.STATISTICS, "interpreter", configs.Rows(block=32, warps=1, least=128, deep=2))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("columns", "dtype"),
    [(2, torch.float32), (1003, torch.float32), *((257, dtype) for dtype in (torch.float64, torch.float32, *LOW))],
    ids=str,
)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_statistics_of_rows(alpha, columns, dtype):
    z_s, z_t = extreme_rows(columns, dtype)
    start = 5
    labels = torch.arange(7, device=DEVICE) * (columns // 6) + start
    bound = EXACT.get(dtype, EXACT[torch.float32])
    actual = rows.pair_stats(z_s, z_t, labels, start, alpha)
    expected = eager.pair_stats(z_s.double(), z_t.double(), labels, start, alpha)
    for side, oracle in ((actual.student, expected.student), (actual.teacher, expected.teacher)):
        for name, value, reference in zip(side._fields, side, oracle, strict=True):
            torch.testing.assert_close(value.double(), reference, rtol=bound, atol=bound, msg=lambda m, n=name: n + m)
        alone = rows.side_stats(z_s if side is actual.student else z_t, labels, start)
        assert all(torch.equal(a, b) for a, b in zip(alone, side, strict=True))
    if alpha == 0.3:
        lse = expected.student.logsumexp, expected.teacher.logsumexp
        sums = rows.mixture_sums(z_s, z_t, *(x.to(actual.student.sumexp.dtype) for x in lse), alpha)
        oracle = eager.mixture_sums(z_s.double(), z_t.double(), *lse, alpha)
        atol = bound if dtype == torch.float64 else 2e-2  # lse reaches 1e4, and float32 holds it to 1e-3
        torch.testing.assert_close(
            torch.stack(sums).double(), torch.stack(oracle), rtol=bound, atol=atol, equal_nan=True
        )
    else:
        torch.testing.assert_close(actual.cross.double(), expected.cross, rtol=bound, atol=bound)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("alpha", "cap", "eps"), [(0.0, None, 0.0), (0.3, 40.0, 0.0), (1.0, None, 1e-3)])
def test_gradient_of_rows(alpha, cap, eps, dtype):
    z_s, z_t = (z.clamp(min=-30, max=30) for z in extreme_rows(257, dtype))
    terms = Terms(z_s.logsumexp(1), z_t.logsumexp(1), torch.linspace(0, 1, 7, dtype=dtype, device=DEVICE))
    coefficient = torch.linspace(-1, 1, 7, dtype=dtype, device=DEVICE)
    expected, actual = z_s.double(), z_s.clone()
    wide = Terms(*(term.double() for term in terms))
    eager.divergence_grad_(expected, z_t.double(), wide, coefficient.double(), alpha, cap, eps)
    rows.divergence_grad_(actual, z_t, terms, coefficient, alpha, cap, eps)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    assert eps == 0 or 0 < int((actual == 0).sum()) < actual.numel()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.float64), ("triton", torch.float32), ("triton-tiles", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("option", ["plain", "everything", "split"])
def test_divergence_equals_the_dense_definition(backend, dtype, alpha, option):
    problem = {"plain": Problem(N=5), "everything": EVERYTHING, "split": Problem(N=3, V=257, bias=True)}[option]
    execution = Execution(backend=backend, chunk_tokens=2)
    problem = replace(problem, alpha=alpha, dtype=dtype, execution=execution)
    inputs = tensors(problem)
    expected = dense(problem, inputs)
    for reduction in ("none", "sum"):
        assert_equal(fused(problem, inputs, reduction), expected, TOLERANCE[dtype], TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["triton", "triton-tiles"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_low_precision_error_is_bounded_by_the_plain_path(backend, dtype, alpha):
    execution = Execution(backend=backend, chunk_tokens=8)
    problem = Problem(N=16, V=64, Hs=32, Ht=32, alpha=alpha, dtype=dtype, spread=2.0, execution=execution)
    inputs = tensors(problem)
    oracle, plain, ours = dense(problem, inputs), dense(problem, inputs, dtype), fused(problem, inputs)
    for name, expected in oracle.grads.items():
        error, allowed = (
            float((result.grads[name].double() - expected).norm() / expected.norm()) for result in (ours, plain)
        )
        assert error <= 4 * allowed, f"gradient of {name}: error {error:.2e}, plain path {allowed:.2e}"
    error, allowed = (float((result.value.double() - oracle.value).norm()) for result in (ours, plain))
    assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize("backend", ["triton", "triton-tiles"])
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_logprobs_equal_the_dense_definition(backend, option):
    p = replace(EVERYTHING if option == "everything" else Problem(N=5, V=131, labels=True), dtype=torch.float32)
    inputs = tensors(p)
    leaves = leaves_of(p, inputs)
    head = LMHead(leaves["student_weight"], leaves.get("student_bias"), p.softcap, p.scale, p.V)
    execution = Execution(backend=backend, chunk_tokens=2)
    out = linear_logprobs(leaves["student_hidden"], head, leaves["labels"], temperature=0.7, execution=execution)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items() if leaf.requires_grad}
    x = p.scale * (wide["student_hidden"] @ wide["student_weight"].T + wide.get("student_bias", 0))
    z = (x if p.softcap is None else p.softcap * torch.tanh(x / p.softcap))[:, : p.V] / 0.7
    kept = leaves["labels"] != -100
    expected = torch.where(kept, torch.stack(LOSSES["logprob"](z, leaves["labels"].clamp(min=0))), 0.0)
    actual = torch.stack([out.logprobs, out.entropy, out.logsumexp])
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5)
    upstream = torch.randn(3, p.N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * upstream).sum(), list(wide.values()))
    got = torch.autograd.grad((actual * upstream.float()).sum(), [leaves[name] for name in wide])
    for name, grad, oracle in zip(wide, got, wanted, strict=True):
        torch.testing.assert_close(grad.double(), oracle, rtol=0, atol=2e-5 * float(oracle.abs().max()), msg=name)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_a_filter_leaves_out_what_is_small_and_nothing_else(tma, monkeypatch):
    """Sharp distributions: most tiles hold no entry above the filter, and their products are skipped."""
    for table in configs.TILES.values():
        monkeypatch.setitem(table, "interpreter", table["interpreter"]._replace(tma=tma, pieces=4))
    execution = Execution(backend="triton-tiles", chunk_tokens=8, grad_filter=1e-2)
    problem = Problem(N=24, V=120, Hs=8, Ht=8, alpha=1.0, spread=6.0, dtype=torch.float32, execution=execution)
    inputs = tensors(problem)
    leaves = leaves_of(problem, inputs)
    wide = [leaves[name].detach().double() for name in ("student_hidden", "student_weight")]
    z_s = (wide[0] @ wide[1].T).requires_grad_()
    z_t = inputs["teacher_hidden"] @ inputs["teacher_weight"].T
    slope = torch.autograd.grad(LOSSES["divergence"](z_s, z_t, 1.0).sum(), z_s)[0]
    slope = torch.where(slope.abs() <= execution.grad_filter, 0.0, slope)
    assert 0 < int((slope != 0).sum()) < slope.numel() // 4
    call(problem, leaves, "sum").loss.backward()
    for leaf, expected in (("student_hidden", slope @ wide[1]), ("student_weight", slope.T @ wide[0])):
        torch.testing.assert_close(leaves[leaf].grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "triton-tiles"])
def test_runs_are_bitwise_equal_and_blocks_do_not_matter(backend):
    def run(chunk: int):
        execution = Execution(backend=backend, chunk_tokens=chunk)
        problem = replace(EVERYTHING, V=131, alpha=1.0, dtype=torch.float32, execution=execution)
        return fused(problem, tensors(problem), "sum")

    first, again, other = run(4), run(4), run(1)
    assert all(torch.equal(first.grads[name], again.grads[name]) for name in first.grads)
    assert torch.equal(first.value, again.value)
    assert_equal(first, other, 1e-6, 1e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "k"), [(5, 5), (150, 12)])
def test_topk_in_order_and_ties_to_the_lower_column(columns, k, dtype):
    z = torch.randn(4, columns, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    z[0] = z[0].round()
    z[1, columns // 2 :] = float("-inf")
    z[2] = 0.0
    z[2, ::2] = -0.0
    z[3] = -z[3].abs()
    values, indices = rows.topk(z, k)
    expected, order = (z + 0.0).sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices, order[:, :k])
    assert torch.equal(values, expected[:, :k])


@pytest.mark.parametrize("backend", ["triton", "triton-tiles"])
def test_layouts_do_not_matter(backend):
    """A weight that lies by hidden dimension, every other value as bias, hidden states that lie by token."""
    problem = replace(EVERYTHING, alpha=1.0, dtype=torch.float32, execution=Execution(backend=backend, chunk_tokens=4))
    inputs = tensors(problem)
    whole, strided = fused(problem, inputs), leaves_of(problem, inputs)
    for name, value in strided.items():
        if value.is_floating_point():
            value = value.detach().repeat_interleave(2, -1)[..., ::2] if value.ndim == 1 else value.detach().mT
            value = value if value.ndim == 1 else value.contiguous().mT
            strided[name] = value.requires_grad_(name in whole.grads)
            assert value.ndim > 1 or value.stride() == (2,)
    other = fused(problem, inputs, leaves=strided)
    assert_equal(other, whole, 1e-6, 1e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's maximum, which passes over NaN
@pytest.mark.parametrize("backend", ["triton", "triton-tiles"])
@pytest.mark.parametrize(("alpha", "grad_filter"), [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (1.0, 1e-3)])
def test_nan_stays_in_its_token_and_is_seen(backend, alpha, grad_filter):
    execution = Execution(backend=backend, chunk_tokens=4, grad_filter=grad_filter)
    problem = Problem(N=5, alpha=alpha, dtype=torch.float32, execution=execution)
    inputs = tensors(problem)
    inputs["student_hidden"][2] = torch.nan
    result = fused(problem, inputs)
    only = [False, False, True, False, False]
    assert result.value.isnan().tolist() == only
    grad = result.grads["student_hidden"].isnan()
    assert grad.all(1).tolist() == grad.any(1).tolist() == only


def test_refusals_name_the_backend(monkeypatch):
    device = pytest.importorskip("mopd_kernels.backends.triton.device")
    monkeypatch.setattr(device, "INTERPRETED", False)
    for backend in ("triton", "triton-tiles"):
        problem = Problem(dtype=torch.float32, execution=Execution(backend=backend))
        with pytest.raises(ValueError, match=f"backend '{backend}' needs CUDA or HIP tensors, got a tensor on cpu"):
            fused(problem, tensors(problem))


def test_tiles_refuse_what_they_cannot_do():
    problem = Problem(execution=Execution(backend="triton-tiles"))
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16, got torch.float64"):
        fused(problem, tensors(problem))
    problem = replace(problem, dtype=torch.float32, top_k=3)
    with pytest.raises(ValueError, match=r"never holds a row of logits, got top_k"):
        fused(problem, tensors(problem))
    problem = replace(problem, top_k=None, K=2)
    with pytest.raises(ValueError, match=r"never holds a row of logits, got context_weights"):
        fused(problem, tensors(problem))


def test_everything_left_out_is_zero_without_a_launch():
    problem = Problem(dtype=torch.float32, execution=Execution(backend="triton-tiles"))
    leaves = leaves_of(problem, tensors(problem))
    out = call(problem, leaves, "sum", labels=torch.full((problem.N,), -100))
    out.loss.backward()
    assert out.loss == 0
    assert not leaves["student_weight"].grad.any()
    assert not leaves["student_hidden"].grad.any()


@pytest.mark.parametrize("alpha", [0.1, 0.9])
def test_jensen_shannon_of_near_equal_rows(alpha):
    """Exactly 0 where q = p, and sums to float32 rounding of their terms where p is close to q."""
    generator = torch.Generator().manual_seed(0)
    log_q = torch.randn(3, 40, generator=generator).log_softmax(1).to(DEVICE)
    nothing = torch.zeros(3, device=DEVICE)
    assert all(sums.eq(0).all() for sums in rows.mixture_sums(log_q, log_q, nothing, nothing, alpha))
    grad = log_q.clone()
    rows.divergence_grad_(grad, log_q, Terms(nothing, nothing, nothing), nothing + 1, alpha, None, 0.0)
    assert grad.eq(0).all()
    for distance in (1e-3, 0.3, 3.0):
        log_p = (log_q + distance * torch.randn(3, 40, generator=generator).to(DEVICE)).log_softmax(1)
        wide = log_q.double(), log_p.double()
        ratios = divergence.mixture_ratios(*wide, alpha)
        sums = rows.mixture_sums(log_q, log_p, nothing, nothing, alpha)
        for got, log_weight, ratio in zip(sums, wide, ratios, strict=True):
            terms = log_weight.exp() * ratio
            assert ((got - terms.sum(1)).abs() <= 1e-6 * terms.abs().sum(1)).all()
