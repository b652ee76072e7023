"""Peak memory: two chunk buffers, the gradients and a little, and nothing that grows with tokens times vocabulary."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mopd_kernels import Execution, LMHead, autograd, linear_divergence, linear_logprobs
from tests.kernels.counters import LiveBytes
from tests.kernels.problems import backends_under_test

V, H, CHUNK = 12_000, 8, 256
BUFFER = CHUNK * V * 4
SCRATCH = 10 << 20  # blocks of a row kernel, which fit a cache: less than a third buffer
PER_TOKEN = 400  # statistics, indices, dH


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Filling torch.empty costs no memory but time at these sizes."""


def peak(tokens, backend, **options):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    teacher = torch.randn(V, H)
    execution = Execution(backend=backend, chunk_tokens=CHUNK)
    with LiveBytes() as live:
        if options.pop("logprobs", False):
            loss = linear_logprobs(hidden, weight, torch.zeros(tokens, dtype=torch.int64), execution=execution)
            loss = loss.logprobs.sum()
        else:
            loss = linear_divergence(hidden, weight, hidden.detach(), teacher, execution=execution, **options).loss
        loss.sum().backward()
    return live


@pytest.mark.parametrize("backend", backends_under_test())
@pytest.mark.parametrize(
    ("options", "buffers"),
    [
        ({"alpha": 1.0}, 2),
        ({"alpha": 0.5}, 2),
        ({"alpha": 0.5, "top_k": 8}, 2),
        ({"alpha": 1.0, "reduction": "none"}, 2),
        ({"logprobs": True}, 1),
    ],
    ids=str,
)
def test_peak_is_two_buffers_and_the_gradients(backend, options, buffers):
    if backend == "triton":
        pytest.skip("the interpreter is too slow at this size")
    tokens = 4 * CHUNK
    one, two = peak(tokens, backend, **options), peak(2 * tokens, backend, **options)
    gradients = V * H * 4
    allowed = buffers * BUFFER + 2 * gradients + SCRATCH + PER_TOKEN * tokens
    assert one.peak <= allowed, (one.peak, allowed)
    assert two.peak - one.peak <= PER_TOKEN * tokens
    assert two.largest <= BUFFER + 4 * V < tokens * V * 4


SCRIPT = """
import resource, sys, torch
from mopd_kernels import Execution, linear_divergence
def run(tokens):
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(30_000, 4, requires_grad=True)
    execution = Execution(backend=sys.argv[1], chunk_tokens=16)
    linear_divergence(hidden, weight, hidden.detach(), weight.detach(), execution=execution).loss.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
run(16)
small = run(64)
print(run(1024) - small)
"""


@pytest.mark.parametrize("backend", backends_under_test())
def test_resident_memory_does_not_grow_with_tokens(backend):
    """One [1024, 30000] tensor would be 123 MB."""
    if backend == "triton":
        pytest.skip("the interpreter is too slow at this size")
    done = subprocess.run([sys.executable, "-c", SCRIPT, backend], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 << 20


NOTHING_KEPT = """
import resource, torch
from mopd_kernels import Execution, linear_divergence
hidden, weight = torch.randn(64, 64, requires_grad=True), torch.randn(30_000, 64, requires_grad=True)
def run(grad_filter):
    execution = Execution(backend="cpu", grad_filter=grad_filter)
    linear_divergence(hidden, weight, hidden.detach(), weight.detach(), alpha=1.0, execution=execution).loss.backward()
    assert hidden.grad.abs().max() < 1e-4
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
run(0.0)
exact = run(0.0)
print(run(1e-3) - exact)
"""


@pytest.mark.parametrize("backend", [b for b in backends_under_test() if b.values == ("cpu",)])
def test_a_filter_that_keeps_nothing_takes_no_memory(backend):
    """As where teacher and student are equal; a partial dH for each vocabulary row would be 490 MB."""
    done = subprocess.run([sys.executable, "-c", NOTHING_KEPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 << 20


def test_the_counter_counts():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        del first
        second = torch.ones(500)
        view = second[:10].add_(1)
    assert live.peak == 4000
    assert live.live == 2000
    assert view.sum() == 20


def test_padding_rows_cost_no_second_gradient():
    hidden, weight = torch.randn(4, 64, requires_grad=True), torch.randn(V, 64, requires_grad=True)
    head = LMHead(weight, vocab_size=V - 100)
    with LiveBytes() as live:
        loss = linear_divergence(hidden, head, hidden.detach(), head, execution=Execution(chunk_tokens=1)).loss
    assert live.peak < 1.5 * weight.nbytes
    loss.backward()
    assert weight.grad[V - 100 :].eq(0).all()


def test_gradients_are_handed_over_not_copied(monkeypatch):
    made, scaled = [], autograd._scaled

    def watched(saved, factor):
        made.append(saved.data_ptr())
        return scaled(saved, factor)

    monkeypatch.setattr(autograd, "_scaled", watched)
    hidden, weight = torch.randn(4, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    (3 * linear_divergence(hidden, weight, hidden.detach(), torch.randn(V, H)).loss).backward()
    assert made == [hidden.grad.data_ptr(), weight.grad.data_ptr()]
