"""A vocabulary split over real gloo processes equals one process: values, gradients, and what is exchanged.

Legend: P ranks, C tokens a chunk, k support, K contexts; float64, 8 bytes a number.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mopd_kernels import Execution
from mopd_kernels.losses.stats import SideStats, merge_sides
from tests.kernels import rank_worker
from tests.kernels.problems import Problem, assert_equal, fused, tensors
from tests.kernels.rank_worker import Split, start

BOUNDS = {2: (0, 30, 37), 3: (0, 2, 37, 37), 4: (0, 9, 10, 20, 37)}  # uneven; 3 has an empty shard
PROBLEMS = {
    "forward KL": Problem(alpha=0.0, labels=True),
    "reverse KL": Problem(alpha=1.0, bias=True, softcap=3.0, padding=(3, 11)),
    "Jensen-Shannon": Problem(weights=True),
    "contexts": Problem(alpha=1.0, K=3, context_weights="token"),
    "top-k": Problem(top_k=5, labels=True, alpha=0.0),
    "top-k without tail": Problem(top_k=3, add_tail=False, alpha=1.0),
    "top-k of contexts": Problem(top_k=12, K=2, softcap=2.0, weights=True),
    "nothing kept": Problem(N=0),
}
HANDSHAKE = 32 * 8


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By number of ranks: by problem and reduction, every rank's result and collectives."""
    found = {}
    for size, bounds in BOUNDS.items():
        splits = [Split(p, bounds, reduction) for p in PROBLEMS.values() for reduction in ("sum", "none")]
        keys = [(name, reduction) for name in PROBLEMS for reduction in ("sum", "none")]
        ranks = start(size, rank_worker.recorded_divergence, splits, tmp_path_factory.mktemp("ranks"))
        found[size] = dict(zip(keys, zip(*ranks, strict=True), strict=True))
    return found


@pytest.mark.parametrize("size", BOUNDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_one_process(results, size, reduction, name):
    problem = PROBLEMS[name]
    whole = fused(problem, tensors(problem), reduction)
    ranks = [_unwrapped(outcome)[0] for outcome in results[size][name, reduction]]
    for rank, result in enumerate(ranks):
        first, stop = BOUNDS[size][rank], None if rank == size - 1 else BOUNDS[size][rank + 1]
        grads = {n: g if n == "student_hidden" else g[first:stop] for n, g in whole.grads.items()}
        assert_equal(result, replace(whole, grads=grads), 1e-11, 1e-12)
        assert torch.equal(result.value, ranks[0].value)
        assert torch.equal(result.grads["student_hidden"], ranks[0].grads["student_hidden"])


@pytest.mark.parametrize("size", BOUNDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_exchanges_no_more_than_it_says(results, size, name):
    """Chunks of 4 tokens; the backward adds one sum of dH and no statistics."""
    problem = PROBLEMS[name]
    kept = problem.N if not problem.labels and not problem.weights else None
    for reduction in ("sum", "none"):
        for result, calls in map(_unwrapped, results[size][name, reduction]):
            tokens = int((result.value != 0).sum()) if kept is None else kept
            assert calls == _expected(problem, tokens)


def _expected(problem, tokens):
    calls, left = [("gather", HANDSHAKE)], tokens
    while left > 0:
        C = 8 * min(4, left)
        left -= 4
        calls += [("gather", C)] * problem.K
        if problem.top_k:
            calls += [("gather", 3 * problem.top_k * C), ("gather", 10 * C)]
        elif problem.alpha in (0, 1):
            calls += [("gather", 11 * C)]
        else:
            calls += [("gather", 10 * C), ("reduce", 2 * C)]
    return [*calls, ("reduce", 8 * problem.N * problem.Hs)]


def test_logprobs_equal_one_process(tmp_path):
    problems = [Problem(labels=True, softcap=2.0), Problem(labels=True, K=3)]
    ranks = start(3, rank_worker.logprobs, [Split(problem, BOUNDS[3]) for problem in problems], tmp_path)
    for problem, results in zip(problems, zip(*ranks, strict=True), strict=True):
        whole = rank_worker.logprobs(0, Split(problem, ()))
        for result in map(_unwrapped, results):
            for mine, expected in zip(result[:4], whole[:4], strict=True):
                torch.testing.assert_close(mine, expected)
        torch.testing.assert_close(torch.cat([result[4] for result in results]), whole[4])


def _unwrapped(outcome):
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def test_a_rank_with_another_problem_is_an_error_on_every_rank(tmp_path):
    ways = [*rank_worker.CHANGES, *rank_worker.OPTIONS, "gap", "refused", "logprobs"]
    for way, errors in zip(ways, zip(*start(2, rank_worker.disagree, ways, tmp_path), strict=True), strict=True):
        for error in errors:
            assert isinstance(error, (ValueError, TypeError, ImportError)), (way, error)
        if way in rank_worker.OPTIONS:
            assert "every rank" in str(errors[0]) or "ranks [1]" in str(errors[0]), (way, errors)
        else:
            words = ("every rank", "tile", "refused", "size(-1)")
            assert all(any(word in str(error) for word in words) for error in errors), (way, errors)


@pytest.mark.parametrize("how", ["dead", "asleep"])
def test_a_rank_that_does_not_come_is_an_error_not_a_hang(tmp_path, how):
    assert isinstance(start(2, rank_worker.disagree, [how], tmp_path, timeout=2)[0][0], RuntimeError)


def test_merged_statistics_of_parts_are_those_of_the_whole():
    from mopd_kernels.backends import eager

    z = torch.randn(5, 40, dtype=torch.float64) * 30
    z[1, :] = 2.0
    z[2, 10:] = float("-inf")
    labels = torch.tensor([0, 9, 9, 25, 39])
    parts = [eager.side_stats(z[:, a:b], labels, a) for a, b in ((0, 10), (10, 11), (11, 40))]
    merged, factors = merge_sides(SideStats(*(torch.stack(column) for column in zip(*parts, strict=True))))
    for mine, expected in zip(merged, eager.side_stats(z, labels, 0), strict=True):
        torch.testing.assert_close(mine, expected)
    assert factors[1:, 2].eq(0).all()


def test_a_default_group_that_does_not_exist_is_named():
    problem = Problem(V=12, execution=Execution())
    inputs = tensors(problem)
    leaves = rank_worker.shard(problem, inputs, (0, 12), 0)
    with pytest.raises(ValueError, match="init_process_group"):
        rank_worker.problems.call(problem, leaves, "sum", heads=rank_worker.heads(problem, leaves, 0))
