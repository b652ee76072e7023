"""Nothing to do, everything left out, arguments that do not fit, and results around the loss itself."""

from __future__ import annotations

import pytest
import torch

from mopd_kernels import Execution, LMHead, VocabShard, grouped_logprobs, linear_divergence, linear_logprobs
from tests.kernels.problems import Problem, backends_under_test, call, leaves_of, tensors


@pytest.mark.parametrize("backend", backends_under_test())
@pytest.mark.parametrize("save", ["gradients", "statistics"])
@pytest.mark.parametrize("why", ["no tokens", "weights", "labels"])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"K": 2}], ids=str)
def test_nothing_to_learn_from_is_a_connected_zero(backend, save, why, options):
    problem = Problem(N=0 if why == "no tokens" else 4, bias=True, **options)
    leaves = leaves_of(problem, tensors(problem))
    left_out = {
        "no tokens": {},
        "weights": {"token_weights": torch.zeros(problem.N)},
        "labels": {"labels": torch.full((problem.N,), -100)},
    }[why]
    out = call(problem, leaves, "mean", execution=Execution(backend=backend, save=save), **left_out)
    assert out.loss == 0
    assert out.per_token.eq(0).all()
    assert out.per_token.shape == (problem.N,)
    names = ["student_hidden", "student_weight", "student_bias"]
    for grad in torch.autograd.grad(out.loss, [leaves[name] for name in names]):
        assert grad.eq(0).all()


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_mean_divides_by_the_normalizer(kind):
    problem = Problem(weights=True)
    leaves = leaves_of(problem, tensors(problem))
    total = call(problem, leaves, "sum").loss
    mean = call(problem, leaves, "mean", normalizer=kind(7.0)).loss
    torch.testing.assert_close(mean, total / 7)
    grads = [torch.autograd.grad(loss, leaves["student_weight"])[0] for loss in (mean, total)]
    torch.testing.assert_close(grads[0], grads[1] / 7)


def test_mean_divides_by_the_tokens_that_count():
    problem = Problem(N=10, weights=True, labels=True)
    inputs = tensors(problem)
    count = int(((inputs["labels"] != -100) & (inputs["token_weights"] != 0)).sum())
    leaves = leaves_of(problem, inputs)
    torch.testing.assert_close(call(problem, leaves, "mean").loss, call(problem, leaves, "sum").loss / count)


def test_leading_dimensions_are_kept():
    problem = Problem(N=6, K=2, labels=True, weights=True, context_weights="token")
    flat = tensors(problem)
    shaped = {
        "student_hidden": flat["student_hidden"].view(2, 3, -1),
        "teacher_hidden": flat["teacher_hidden"].view(2, 2, 3, -1),
        "context_weights": flat["context_weights"].view(2, 2, 3),
        **{name: flat[name].view(2, 3) for name in ("labels", "token_weights")},
    }
    one = call(problem, leaves_of(problem, flat), "none")
    two = call(problem, leaves_of(problem, flat | shaped), "none")
    for name in ("loss", "per_token", "student_logprobs", "teacher_entropy", "top1_agreement"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name).view(2, 3))


def test_half_precision_gradients_keep_the_normalizer_exact():
    """A factor 1/N rounded to bfloat16 would scale every gradient by up to 0.4%."""
    problem = Problem(dtype=torch.bfloat16, N=8, Hs=16, V=33)
    leaves = leaves_of(problem, tensors(problem))
    (whole,) = torch.autograd.grad(call(problem, leaves, "sum").loss, leaves["student_weight"])
    (scaled,) = torch.autograd.grad(call(problem, leaves, "mean", normalizer=1.005).loss, leaves["student_weight"])
    ratio = float((scaled.double() * whole.double()).sum() / whole.double().square().sum())
    assert abs(ratio * 1.005 - 1) < 1e-3


H = torch.randn(4, 8)
W = torch.randn(10, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((H, W, H[:3], W), {}, ValueError, r"tokens \(4,\).*\(3,\)"),
        ((H, W, torch.randn(2, 3, 8), W), {}, ValueError, r"\(4,\).*\(2, 3\)"),
        ((H[:, :7], W, H, W), {}, ValueError, r"== 8 of its head, got 7"),
        ((H.double(), W, H, W), {}, TypeError, r"float32, got torch.float64"),
        ((H, "head", H, W), {}, TypeError, r"LMHead.*str"),
        ((H, W, H, torch.randn(5000, 8)), {}, ValueError, r"10 rows.*5000"),
        ((H, W, H, W), {"alpha": 1.5}, ValueError, r"alpha in \[0, 1\].*1.5"),
        ((H, W, H, W), {"temperature": 0.0}, ValueError, r"temperature > 0.*0.0"),
        ((H, W, H, W), {"temperature": float("inf")}, ValueError, r"temperature > 0 and finite, got inf"),
        ((H, W, H, W), {"teacher_temperature": -1.0}, ValueError, r"teacher_temperature > 0.*-1.0"),
        ((H, W, H, W), {"top_k": 0}, ValueError, r"top_k >= 1.*0"),
        ((H, W, H, W), {"top_k": 2.5}, TypeError, r"top_k to be an integer.*2.5"),
        ((H, W, H, W), {"normalizer": 0}, ValueError, r"normalizer > 0.*got 0"),
        ((H, W, H, W), {"normalizer": torch.tensor(-1.0)}, ValueError, r"normalizer > 0.*got -1.0"),
        ((H, W, H, W), {"normalizer": torch.ones(4)}, ValueError, r"a number as normalizer.*\(4,\)"),
        ((H, W, H.bfloat16(), W.bfloat16()), {}, TypeError, r"student's dtype torch.float32, got torch.bfloat16"),
        ((H, W, H.to("meta"), W.to("meta")), {}, ValueError, r"teacher_hidden .* device cpu, got meta"),
        ((H, LMHead(W, vocab_size=9), H, torch.randn(5, 8)), {"labels": torch.full((4,), 7)}, ValueError, r"\[0, 5\)"),
        ((H, torch.randn(5000, 8), H, LMHead(W[:9])), {}, ValueError, r"5000 rows.* 9: too far"),
        ((H, LMHead(torch.randn(5000, 8), vocab_size=4000), H, W), {}, ValueError, r"4000 rows.* 10: too far"),
        ((H, W, H, W), {"reduction": "avg"}, ValueError, r"reduction in .*'avg'"),
        ((H, W, H, W), {"labels": torch.tensor([0, 1, 2, 10])}, ValueError, r"\[0, 10\).*\[0, 10\]"),
        ((H, W, H, W), {"labels": torch.tensor([0, 1, 2, -1])}, ValueError, r"or -100"),
        ((H, W, H, W), {"labels": torch.zeros(4)}, TypeError, r"integer labels"),
        ((H, W, H, W), {"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"\(4,\).*\(3,\)"),
        (
            (H, W, H, W),
            {"labels": torch.zeros(4, device="meta", dtype=torch.int64)},
            ValueError,
            r"device cpu, got meta",
        ),
        ((H, W, H, W), {"token_weights": torch.ones(4, device="meta")}, ValueError, r"token_weights .*got meta"),
        ((H, W, H, W), {"token_weights": torch.ones(4, requires_grad=True)}, ValueError, r"detach"),
        ((H, W, H, W), {"context_weights": torch.ones(4)}, ValueError, r"need teacher_hidden \(K, 4, Ht\)"),
        ((H, W, H.expand(2, 4, 8), W), {"context_weights": torch.ones(3)}, ValueError, r"\(2,\) or \(2, 4\).*\(3,\)"),
        ((H, W, H.expand(2, 4, 8), W), {"context_weights": torch.tensor([1.0, -1])}, ValueError, r">= 0.*-1.0"),
        ((H, W, H.expand(2, 4, 8), W), {"context_weights": torch.zeros(2)}, ValueError, r"sum > 0.* got 0 for 4 of 4"),
        ((H, W, H[None], W), {"context_weights": torch.eye(4)[:1]}, ValueError, r"sum > 0.* got 0 for 3 of 4"),
        ((H, W, H, W), {"execution": Execution(backend="fast")}, ValueError, r"backend in .*'fast'"),
        (
            (H, W, H, W),
            {"reduction": "none", "execution": Execution(save="gradients")},
            ValueError,
            r"scalar loss.*statistics",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named_with_both_values(arguments, options, error, message):
    with pytest.raises(error, match=message):
        linear_divergence(*arguments, **options)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"needs LMHead\.vocab_size"):
        LMHead(W, shard=VocabShard(0))
    with pytest.raises(ValueError, match="scale != 0 and finite, got nan"):
        LMHead(W, scale=float("nan"))
    with pytest.raises(ValueError, match="softcap > 0 and finite, or None, got inf"):
        LMHead(W, softcap=float("inf"))
    with pytest.raises(TypeError, match=r"weight's dtype torch.float32, got torch.int64"):
        LMHead(W, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight's device cpu, got meta"):
        LMHead(W, torch.zeros(10, device="meta"))
    with pytest.raises(ValueError, match="split over one process group"):
        linear_divergence(H, LMHead(W, vocab_size=20, shard=VocabShard(0)), H, W)
    with pytest.raises(ValueError, match=r"\(K, \.\.\., H\) and labels.*\(4, 8\) and \(4,\)"):
        grouped_logprobs(H, W, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\)"):
        linear_logprobs(H, W, torch.zeros(3, dtype=torch.int64))


def test_context_weights_are_brought_to_sum_one_and_may_be_zero():
    problem = Problem(K=2)
    inputs = tensors(problem)
    leaves = leaves_of(problem, inputs)
    plain = leaves | {"teacher_hidden": leaves["teacher_hidden"][1]}
    first = call(problem, leaves, "sum", context_weights=torch.tensor([0.0, 5.0])).loss
    torch.testing.assert_close(first, call(Problem(), plain, "sum").loss)


def test_a_token_that_is_left_out_needs_no_context():
    problem = Problem(K=2)
    leaves = leaves_of(problem, tensors(problem))
    weights, kept = torch.ones(2, problem.N), torch.ones(problem.N)
    whole = call(problem, leaves, "none", context_weights=weights).loss
    weights[:, 3] = kept[3] = 0
    part = call(problem, leaves, "none", context_weights=weights, token_weights=kept).loss
    torch.testing.assert_close(part, whole * kept)


def test_a_far_smaller_vocabulary_is_taken_where_it_is_stated():
    large = torch.randn(5000, 8)
    stated = linear_divergence(H, large, H, LMHead(W, vocab_size=10)).loss
    torch.testing.assert_close(stated, linear_divergence(H, large[:10], H, W).loss)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 3}], ids=str)
def test_labels_may_be_of_any_integer_type(dtype, options):
    labels = torch.tensor([0, 9, 3, 7])
    for given in (labels, labels.to(dtype)):
        out = linear_divergence(H, W, H + 1, W, labels=given, **options)
        q = (H @ W.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(out.student_logprobs, q)
        torch.testing.assert_close(linear_logprobs(H, W, given).logprobs, q)


def test_heads_are_equal_only_to_themselves():
    assert LMHead(W) != LMHead(W)
    head = LMHead(W)
    assert head in (head,)


def test_only_the_parameters_that_ask_get_gradients():
    problem = Problem(bias=True)
    leaves = leaves_of(problem, tensors(problem))
    leaves["student_weight"] = leaves["student_weight"].detach()
    call(problem, leaves, "mean").loss.backward()
    assert leaves["student_weight"].grad is None
    assert leaves["student_hidden"].grad.abs().sum() > 0
    assert leaves["student_bias"].grad.abs().sum() > 0
