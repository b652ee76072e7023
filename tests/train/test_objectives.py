"""Every objective against its formula, written out here in float64 over dense logits, and its gradient by autograd."""

from __future__ import annotations

import itertools

import pytest
import torch

from mopd_kernels import LMHead
from mopd_train.config import Config
from mopd_train.objectives import METHODS, Example, Loss, TokenBatch
from mopd_train.objectives.distillation import steps_of
from mopd_train.objectives.policy import group_advantages
from mopd_train.objectives.preference import pairs_of
from mopd_train.rollout import Rollout

V, HS, HT = 23, 6, 9
LENGTHS = [3, 1, 4, 2, 2]
GROUPS = [0, 0, 0, 1, 1]
REWARDS = [1.0, 0.0, 0.5, 1.0, 0.0]
N = sum(LENGTHS)
TEMPERATURE = 0.7
NORMALIZER = 17.0  # a step has more micro-batches than this one


class Problem:
    """Five rollouts in two groups, float64 hidden states and heads of student and teacher."""

    def __init__(self, old: bool = False, engine: bool = False, steps: list[list[int]] | None = None) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.head = normal(N, HS).requires_grad_(), normal(V, HS).requires_grad_()
        self.teacher_hidden, self.teacher_head = normal(N, HT), normal(V, HT)
        self.labels = torch.randint(0, V, (N,), generator=generator)
        ids = [part.tolist() for part in self.labels.split(LENGTHS)]
        q = self.logprobs().detach()
        self.old = (q - normal(N)) if old else None
        self.engine = (q - normal(N)) if engine else None
        self.examples = [
            Example(
                group=GROUPS[i],
                prompt_ids=[1],
                teacher_prompt_ids=[1],
                rollout=Rollout(ids[i], "", True, REWARDS[i]),
                advantage=[0.5, -0.5, 0.0, 0.5, -0.5][i],
                steps=steps[i] if steps else None,
                old_logprobs=self.old.split(LENGTHS)[i] if old else None,
            )
            for i in range(5)
        ]
        if engine:
            for example, part in zip(self.examples, self.engine.split(LENGTHS), strict=True):
                example.rollout.logprobs = part.tolist()
            self.engine = self.engine.float().double()  # as the batch holds them

    def logits(self) -> torch.Tensor:
        return self.hidden @ self.head.T / TEMPERATURE

    def teacher_logits(self, temperature: float = TEMPERATURE) -> torch.Tensor:
        return self.teacher_hidden @ self.teacher_head.T / temperature

    def logprobs(self) -> torch.Tensor:
        return self.logits().log_softmax(-1)[torch.arange(N), self.labels]

    def teacher_logprobs(self, temperature: float = TEMPERATURE) -> torch.Tensor:
        return self.teacher_logits(temperature).log_softmax(-1)[torch.arange(N), self.labels]

    def run(self, method: str, config: Config) -> Loss:
        return METHODS[method].objective(
            TokenBatch(
                examples=self.examples,
                student_hidden=self.hidden,
                student_head=LMHead(self.head),
                normalizer=NORMALIZER,
                teacher_hidden=self.teacher_hidden,
                teacher_head=LMHead(self.teacher_head),
            ),
            config,
        )


def config_of(**changes: object) -> Config:
    config = Config()
    config.rollout.temperature = TEMPERATURE
    for key, value in changes.items():
        section = config.baseline if hasattr(config.baseline, key) else config.distillation
        assert hasattr(section, key)
        setattr(section, key, value)
    return config


def check(problem: Problem, loss: torch.Tensor, dense: torch.Tensor) -> None:
    """Value and gradients of both, in float64."""
    torch.testing.assert_close(loss.double(), dense, rtol=1e-6, atol=1e-9)
    ours = torch.autograd.grad(loss, [problem.hidden, problem.head])
    theirs = torch.autograd.grad(dense, [problem.hidden, problem.head])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
        assert other.abs().max() > 1e-3


def mean_of(result: Loss, name: str) -> float:
    total, count = result.means[name]
    return float(total) / count


def number(value: torch.Tensor) -> float:
    return float(value.detach())


def jensen_shannon(q: torch.Tensor, p: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:  # probabilities -> (N,)
    m = (1 - alpha) * q + alpha * p
    return ((1 - alpha) * q * (q / m).log() + alpha * p * (p / m).log()).sum(-1)


def reverse_kl(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return (q * (q / p).log()).sum(-1)


@pytest.mark.parametrize("method", ["mopd", "opd", "sdpo"])
def test_distillation_is_the_divergence_over_the_normalizer(method):
    problem = Problem()
    result = problem.run(method, config_of())
    q, p = problem.logits().softmax(-1), problem.teacher_logits().softmax(-1)
    check(problem, result.loss, jensen_shannon(q, p).sum() / NORMALIZER)
    torch.testing.assert_close(result.logprobs.double(), problem.logprobs().detach())
    assert mean_of(result, "entropy") == pytest.approx(number(-(q * q.log()).sum(-1).mean()))
    assert mean_of(result, "teacher_entropy") == pytest.approx(number(-(p * p.log()).sum(-1).mean()))


def test_the_teacher_has_a_temperature_of_its_own():
    problem = Problem()
    result = problem.run("mopd", config_of(teacher_temperature=0.3, alpha=1.0))
    q, p = problem.logits().softmax(-1), problem.teacher_logits(0.3).softmax(-1)
    check(problem, result.loss, reverse_kl(q, p).sum() / NORMALIZER)


@pytest.mark.parametrize("tail", [True, False])
def test_topk_with_the_tail_as_one_outcome_or_without_it(tail):
    problem = Problem()
    result = problem.run("mopd", config_of(distillation_topk=4, distillation_add_tail=tail))
    q, p = problem.logits().softmax(-1), problem.teacher_logits().softmax(-1)
    support = q.topk(4).indices
    q_k, p_k = q.gather(1, support), p.gather(1, support)
    if tail:
        q_k, p_k = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (q_k, p_k))
    else:
        q_k, p_k = (x / x.sum(1, keepdim=True) for x in (q_k, p_k))
    check(problem, result.loss, jensen_shannon(q_k, p_k).sum() / NORMALIZER)
    mass = number(q.gather(1, support).sum(1).mean())
    assert mean_of(result, "student_topk_mass") == pytest.approx(mass)


def test_update_ratio_is_capped_by_is_clip():
    problem = Problem(old=True)
    result = problem.run("mopd", config_of(is_clip=1.5))
    ratio = (problem.logprobs().detach() - problem.old).exp().clamp(max=1.5)
    assert 0 < (ratio == 1.5).sum() < N  # both sides of the cap
    q, p = problem.logits().softmax(-1), problem.teacher_logits().softmax(-1)
    check(problem, result.loss, (ratio * jensen_shannon(q, p)).sum() / NORMALIZER)
    assert mean_of(result, "is_ratio/update") == pytest.approx(number(ratio.mean()))
    unclipped = problem.run("mopd", config_of(is_clip=None))
    check(problem, unclipped.loss, jensen_shannon(problem.logits().softmax(-1), p).sum() / NORMALIZER)


def test_the_log_of_the_ratio_is_clamped():
    problem = Problem(old=True)
    for example in problem.examples:
        example.old_logprobs = example.old_logprobs - 1000.0
    result = problem.run("mopd", config_of(is_clip=1e12))
    assert mean_of(result, "is_ratio/update") == pytest.approx(4.851651954e8, rel=1e-5)  # exp(20)


def test_engine_ratio_is_capped_and_taken_before_the_first_update():
    first = Problem(engine=True)
    config = config_of()
    config.rollout.rollout_is_threshold = 2.0
    q, p = first.logits().softmax(-1), first.teacher_logits().softmax(-1)
    ratio = (first.logprobs().detach() - first.engine).exp().clamp(max=2.0)
    assert 0 < (ratio == 2.0).sum() < N
    check(first, first.run("mopd", config).loss, (ratio * jensen_shannon(q, p)).sum() / NORMALIZER)
    later = Problem(old=True, engine=True)
    q = later.logits().softmax(-1)
    ratio = (later.old - later.engine).exp().clamp(max=2.0) * (later.logprobs().detach() - later.old).exp().clamp(max=2)
    check(later, later.run("mopd", config).loss, (ratio * jensen_shannon(q, p)).sum() / NORMALIZER)
    config.rollout.rollout_is = False
    plain = Problem(engine=True)
    check(plain, plain.run("mopd", config).loss, jensen_shannon(plain.logits().softmax(-1), p).sum() / NORMALIZER)


def test_engine_logprobs_of_another_length_are_refused():
    problem = Problem(engine=True)
    problem.examples[2].rollout.logprobs.append(-1.0)
    with pytest.raises(ValueError, match="expected 4 engine log-probs, one a token of the rollout, got 5"):
        problem.run("mopd", config_of())


SAMPLED = {"full_logit_distillation": False, "alpha": 1.0}


def test_sampled_token_is_a_policy_gradient_with_a_constant_advantage():
    problem = Problem()
    result = problem.run("mopd", config_of(**SAMPLED))
    log_q, log_p = problem.logprobs(), problem.teacher_logprobs()
    check(problem, result.loss, -((log_p - log_q).detach() * log_q).sum() / NORMALIZER)
    assert mean_of(result, "sampled_kl") == pytest.approx(number((log_q - log_p).mean()))


def test_sampled_token_estimates_the_gradient_of_reverse_kl():
    """Exactly: the expectation over all tokens of the vocabulary, each weighted by its probability."""
    problem = Problem()
    q, p = problem.logits().softmax(-1), problem.teacher_logits().softmax(-1)
    expected = torch.zeros_like(problem.hidden)
    for token in range(V):
        some = Problem()
        for example in some.examples:
            example.rollout.token_ids = [token] * len(example.rollout.token_ids)
        some.labels = torch.full((N,), token)
        loss = some.run("mopd", config_of(**SAMPLED)).loss
        (gradient,) = torch.autograd.grad(loss, some.hidden)
        expected += q[:, token, None].detach() * gradient
    (exact,) = torch.autograd.grad(reverse_kl(q, p).sum() / NORMALIZER, problem.hidden)
    torch.testing.assert_close(expected, exact, rtol=1e-5, atol=1e-8)


STEPS = [[0, 0, 1], [0], [0, 1, 1, 1], [0, 0], [0, 1]]
FIRST_TOKENS = [[0, 1], [2], [3], [4], [5, 6, 7], [8, 9], [10], [11]]  # the steps' tokens, flat


def test_step_level_advantages_are_means_over_steps():
    problem = Problem(steps=STEPS, old=True)
    result = problem.run("mopd", config_of(**SAMPLED, step_level_kl=True))
    log_q, log_p = problem.logprobs(), problem.teacher_logprobs()
    advantage = (log_p - log_q).detach().clone()
    for tokens in FIRST_TOKENS:
        advantage[tokens] = advantage[tokens].mean()
    ratio = (log_q.detach() - problem.old).exp().clamp(max=2.0)
    check(problem, result.loss, -(ratio * advantage * log_q).sum() / NORMALIZER)


def test_step_means_of_the_full_divergence_would_change_nothing():
    """Why step_level_kl is refused there: handed back to the tokens, a step's mean adds up to its tokens' own."""
    problem = Problem()
    q, p = problem.logits().softmax(-1), problem.teacher_logits().softmax(-1)
    by_token = jensen_shannon(q, p)
    by_step = torch.cat([by_token[tokens].mean().expand(len(tokens)) for tokens in FIRST_TOKENS])
    check(problem, problem.run("mopd", config_of()).loss, by_step.sum() / NORMALIZER)


def test_steps_end_where_the_separator_is_complete(tokenizer):
    ids = tokenizer.encode("First.\n\nSecond line\nstill second\n\nThird")
    steps = steps_of(ids, tokenizer, "\n\n")
    texts = ["".join(tokenizer.decode([t]) for t, s in zip(ids, steps, strict=True) if s == k) for k in range(3)]
    assert texts == ["First.\n\n", "Second line\nstill second\n\n", "Third"]


@pytest.mark.parametrize("changes", [{}, SAMPLED])
def test_a_teacher_equal_to_the_student_gives_zero(changes):
    problem = Problem()
    problem.teacher_hidden, problem.teacher_head = problem.hidden.detach(), problem.head.detach()
    result = problem.run("opd", config_of(**changes))
    (gradient,) = torch.autograd.grad(result.loss, problem.hidden)
    assert abs(number(result.loss)) < 1e-12
    assert gradient.abs().max() < 1e-12


def test_grpo_first_update_is_reinforce_with_the_groups_advantage():
    problem = Problem()
    result = problem.run("grpo", config_of())
    advantage = torch.tensor([0.5] * 3 + [-0.5] + [0.0] * 4 + [0.5] * 2 + [-0.5] * 2, dtype=torch.float64)
    log_q = problem.logprobs()
    check(problem, result.loss, -(advantage * (log_q - log_q.detach()).exp()).sum() / NORMALIZER)
    (ours,) = torch.autograd.grad(problem.run("grpo", config_of()).loss, problem.head)
    (reinforce,) = torch.autograd.grad(-(advantage * problem.logprobs()).sum() / NORMALIZER, problem.head)
    torch.testing.assert_close(ours, reinforce, rtol=1e-5, atol=1e-8)
    assert mean_of(result, "clip_ratio") == 0
    assert mean_of(result, "is_ratio/update") == 1


def test_grpo_later_updates_clip_and_correct_the_engine():
    problem = Problem(old=True, engine=True)
    result = problem.run("grpo", config_of(epsilon=0.3))
    advantage = torch.tensor([0.5] * 3 + [-0.5] + [0.0] * 4 + [0.5] * 2 + [-0.5] * 2, dtype=torch.float64)
    ratio = (problem.logprobs() - problem.old).exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.7, 1.3) * advantage)
    engine = (problem.old - problem.engine).exp().clamp(max=2.0)
    check(problem, result.loss, -(engine * objective).sum() / NORMALIZER)
    clipped = [r > 1.3 if a > 0 else r < 0.7 for r, a in zip(ratio.tolist(), advantage.tolist(), strict=True) if a]
    assert 0 < sum(clipped) < len(clipped)
    assert mean_of(result, "clip_ratio") == pytest.approx(sum(clipped) / N)


def test_advantages_of_a_group():
    assert group_advantages([1.0, 0.0, 0.0, 1.0], scale=False) == [0.5, -0.5, -0.5, 0.5]
    deviation = (4 * 0.25 / 3) ** 0.5 + 1e-4
    scaled = [0.5 / deviation, -0.5 / deviation, -0.5 / deviation, 0.5 / deviation]
    assert group_advantages([1.0, 0.0, 0.0, 1.0], scale=True) == pytest.approx(scaled)
    assert group_advantages([0.1] * 3, scale=True) == [0.0] * 3  # their mean is not 0.1 in floating point
    assert group_advantages([], scale=False) == []


PAIRS = [(0, 1), (0, 2), (2, 1), (3, 4)]


def test_pairs_are_strict_and_stay_in_their_group():
    problem = Problem()
    assert set(pairs_of(problem.examples)) == set(PAIRS)
    problem.examples[2].rollout.reward = 1.0
    assert set(pairs_of(problem.examples)) == {(0, 1), (2, 1), (3, 4)}


def sequence_sums(values: torch.Tensor) -> list[torch.Tensor]:
    edges = [0, *itertools.accumulate(LENGTHS)]
    return [values[a:b].sum() for a, b in itertools.pairwise(edges)]


def test_dpo_is_the_closed_form():
    problem = Problem()
    result = problem.run("dpo", config_of(dpo_beta=0.3))
    h = sequence_sums(problem.logprobs() - problem.teacher_logprobs())
    margins = [0.3 * (h[c] - h[r]) for c, r in PAIRS]
    check(problem, result.loss, sum(-torch.sigmoid(m).log() for m in margins) / NORMALIZER)
    assert mean_of(result, "rewards/margins") == pytest.approx(number(sum(margins)) / 4)
    assert mean_of(result, "rewards/chosen") == pytest.approx(number(sum(0.3 * h[c] for c, _ in PAIRS)) / 4)
    assert mean_of(result, "rewards/accuracies") == sum(number(m) > 0 for m in margins) / 4


def test_simpo_is_the_closed_form():
    problem = Problem()
    result = problem.run("simpo", config_of(simpo_beta=2.5, simpo_gamma=0.4))
    h = [total / length for total, length in zip(sequence_sums(problem.logprobs()), LENGTHS, strict=True)]
    dense = sum(-torch.sigmoid(2.5 * (h[c] - h[r]) - 0.4).log() for c, r in PAIRS) / NORMALIZER
    check(problem, result.loss, dense)


@pytest.mark.parametrize("by_length", [True, False])
def test_sft_is_the_likelihood(by_length):
    problem = Problem()
    result = problem.run("sft", config_of(sft_length_normalize=by_length))
    sums = sequence_sums(problem.logprobs())
    dense = -sum(total / (length if by_length else 1) for total, length in zip(sums, LENGTHS, strict=True))
    check(problem, result.loss, dense / NORMALIZER)
    assert mean_of(result, "nll") == pytest.approx(number(-problem.logprobs().mean()))
