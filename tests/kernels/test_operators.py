"""The torch operators: registration, compilation, and how many products each case costs."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace

import pytest
import torch

from mopd_kernels import Execution, LMHead, linear_divergence, linear_logprobs, operators
from mopd_kernels.operators import DivergenceArguments, LogprobArguments
from tests.kernels.counters import Products
from tests.kernels.problems import Problem, call, leaves_of, tensors


def divergence_arguments(needs=(True, True, True), transposed=False, **changes):
    torch.manual_seed(0)
    arguments = DivergenceArguments(
        torch.randn(5, 4), torch.randn(11, 4), torch.randn(11), torch.randn(1, 5, 3), torch.randn(12, 3),
        None, torch.tensor([0, 3, -100, 7, 2]), torch.tensor([1.0, 0, 1, 0.5, 1]), None,
        [0.0, 1.0, 1.0], [2.0, 1.0, 1.5], 10, 0, "", 0.5, 0, True, "", 2, 0, 0.0, list(needs),
    )._replace(**changes)  # fmt: skip
    if transposed:
        arguments = arguments._replace(student_hidden=_transposed(arguments.student_hidden))
    return _with_grads(arguments, needs)


def _transposed(hidden):
    """The same values, neighbours along the tokens."""
    return hidden.T.contiguous().T


def logprob_arguments(needs=(True, True, True), transposed=False):
    arguments = LogprobArguments(
        torch.randn(5, 4), torch.randn(11, 4), torch.randn(11), torch.tensor([0, 3, -100, 7, 2]),
        [0.0, 1.0, 1.0], 10, 0, "", "", 2, 0, list(needs),
    )  # fmt: skip
    if transposed:
        arguments = arguments._replace(hidden=_transposed(arguments.hidden))
    return _with_grads(arguments, needs)


def _with_grads(arguments, needs):
    return (*(tensor.requires_grad_(need) for tensor, need in zip(arguments, needs, strict=False)), *arguments[3:])


VARIANTS = {
    "all": {},
    "frozen head": {"needs": (True, False, False)},
    "frozen trunk": {"needs": (False, True, False)},
    "contexts": {"teacher_hidden": torch.ones(2, 5, 3), "context_weights": torch.full((2, 5), 0.5)},
    "top-k": {"top_k": 3},
    "transposed hidden": {"transposed": True},
    "transposed hidden, filter": {"transposed": True, "grad_filter": 0.05},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_divergence(variant):
    arguments = divergence_arguments(**VARIANTS[variant])
    torch.library.opcheck(operators.divergence_with_grads, arguments)
    torch.library.opcheck(operators.divergence, arguments)
    constants = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    saved = operators.divergence(*constants)
    torch.library.opcheck(operators.divergence_backward, (torch.randn(5), *saved, *constants))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_logprobs(needs, transposed):
    arguments = logprob_arguments(needs, transposed)
    torch.library.opcheck(operators.logprobs, arguments)
    constants = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    result = operators.logprobs(*constants)
    torch.library.opcheck(operators.logprobs_backward, (torch.randn(3, 5), result, *constants))


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Sequential(torch.nn.Embedding(31, 8), torch.nn.Linear(8, 8), torch.nn.Tanh())
        self.lm_head = torch.nn.Linear(8, 31)

    def forward(self, ids, labels, teacher_hidden, teacher_weight, options):
        hidden = self.trunk(ids)
        head = LMHead(self.lm_head.weight, self.lm_head.bias, softcap=5.0)
        out = linear_divergence(hidden, head, teacher_hidden, teacher_weight, labels=labels, **options)
        return out.loss.sum() + 0.1 * linear_logprobs(hidden, head, labels).entropy.mean()


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("aot_eager", {}),
        ("aot_eager", {"reduction": "none", "top_k": 4}),
        pytest.param("inductor", {"alpha": 1.0}, marks=pytest.mark.skipif(not shutil.which("g++"), reason="no g++")),
    ],
)
def test_compiles_whole_with_a_model(backend, options):
    torch.manual_seed(0)
    model = Student()
    inputs = torch.randint(0, 31, (2, 5)), torch.randint(0, 31, (2, 5)), torch.randn(2, 5, 6), torch.randn(31, 6)
    eager = _loss_and_grads(model, model, (*inputs, options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = _loss_and_grads(torch.compile(model, fullgraph=True, backend=backend), model, (*inputs, options))
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected)


def _loss_and_grads(function, model, arguments):
    loss = function(*arguments)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


N, V, Hs, Ht = 12, 50, 8, 6
STUDENT, TEACHER = 2 * N * V * Hs, 2 * N * V * Ht


@pytest.mark.parametrize(
    ("case", "frozen", "flops"),
    [
        (Problem(), (), 3 * STUDENT + TEACHER),
        (Problem(), ("student_weight",), 2 * STUDENT + TEACHER),
        (Problem(), ("student_hidden",), 2 * STUDENT + TEACHER),
        (Problem(), ("student_weight", "student_hidden"), STUDENT + TEACHER),
        (Problem(K=1), (), 3 * STUDENT + TEACHER),
        (Problem(K=4), (), 3 * STUDENT + 4 * TEACHER),
        (Problem(top_k=3), (), 3 * STUDENT + TEACHER),
    ],
)
def test_products_in_one_pass(case, frozen, flops):
    assert _flops(case, frozen, "sum") == flops


@pytest.mark.parametrize(
    ("case", "frozen", "flops"),
    [
        (Problem(), (), 4 * STUDENT + 2 * TEACHER),
        (Problem(), ("student_weight",), 3 * STUDENT + 2 * TEACHER),
        (Problem(top_k=3), (), 4 * STUDENT + TEACHER),
        (Problem(top_k=3, add_tail=False), (), 3 * STUDENT + TEACHER),
    ],
)
def test_products_with_recomputation(case, frozen, flops):
    assert _flops(case, frozen, "none") == flops


def _flops(case, frozen, reduction):
    case = replace(case, N=N, V=V, Hs=Hs, Ht=Ht, execution=Execution(chunk_tokens=5))
    leaves = leaves_of(case, tensors(case))
    for name in frozen:
        leaves[name] = leaves[name].detach()
    with Products() as products:
        loss = call(case, leaves, reduction).loss.sum()
        if loss.requires_grad:
            loss.backward()
    assert loss.requires_grad == (len(frozen) < 2)
    return products.flops()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_tokens_left_out_reach_no_product(reduction):
    case = Problem(N=12, labels=True, weights=True)
    inputs = tensors(case)
    kept = int(((inputs["labels"] != -100) & (inputs["token_weights"] != 0)).sum())
    assert 0 < kept < 12
    leaves = leaves_of(case, inputs)
    with Products() as products:
        call(case, leaves, reduction).loss.sum().backward()
    rows = sum(shape[0] for shape in products.shapes if shape[1:] == (case.Ht, case.V))
    assert rows == kept * (1 if reduction == "sum" else 2)


def test_upstream_zeros_reach_no_product_in_the_backward():
    case = Problem(N=12)
    leaves = leaves_of(case, tensors(case))
    upstream = torch.zeros(12, dtype=torch.float64)
    upstream[3] = 1
    loss = call(case, leaves, "none").loss
    with Products() as products:
        (loss * upstream).sum().backward()
    assert sum(shape[0] for shape in products.shapes if shape[1:] == (case.Ht, case.V)) == 1


def test_no_grad_leaves_the_gradients_out():
    case = Problem(N=12, V=50, Hs=8, Ht=6)
    leaves = leaves_of(case, tensors(case))
    with torch.no_grad(), Products() as products:
        assert not call(case, leaves, "mean").loss.requires_grad
    assert products.flops() == STUDENT + TEACHER


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_second_derivative_is_refused(reduction):
    case = Problem()
    leaves = leaves_of(case, tensors(case))
    loss = call(case, leaves, reduction).loss.sum()
    (grad,) = torch.autograd.grad(loss, leaves["student_hidden"], create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_divergence is differentiable once"):
        grad.square().sum().backward()


def test_a_second_backward_says_what_to_do():
    case = Problem()
    leaves = leaves_of(case, tensors(case))
    loss = call(case, leaves, "sum").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="statistics"):
        loss.backward()
    saving = call(case, leaves, "sum", execution=Execution(save="statistics")).loss
    first, second = (torch.autograd.grad(saving, leaves["student_hidden"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("vocabulary", [200, 2048])  # one product, and products in parts
@pytest.mark.parametrize("save", ["gradients", "statistics"])
def test_autocast_changes_nothing(backend, vocabulary, save):
    """As in HF Trainer, whose compute_loss runs under autocast."""
    if backend == "cpu":
        pytest.importorskip("mopd_kernels.backends.cpu", reason="C++ kernels are not built", exc_type=OSError)
    execution = Execution(backend=backend, chunk_tokens=8, save=save)
    case = Problem(V=vocabulary, Hs=16, alpha=1.0, labels=True, dtype=torch.float32, execution=execution)

    def results(enabled):
        leaves = leaves_of(case, tensors(case))
        head = LMHead(leaves["student_weight"])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = call(case, leaves, "mean").loss
            scored = linear_logprobs(leaves["student_hidden"], head, leaves["labels"], execution=execution)
            (loss + scored.entropy.mean()).backward()
        return [loss, scored.logprobs, leaves["student_hidden"].grad, leaves["student_weight"].grad]

    for inside, outside in zip(results(True), results(False), strict=True):
        assert torch.equal(inside, outside)
