"""Methods in the loop: one step however it is cut, what is skipped, refused and resumed."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from mopd_train import learn as learning
from mopd_train import setup, train
from mopd_train.config import Config
from mopd_train.metrics import Clock
from mopd_train.objectives import METHODS, Example, settle
from mopd_train.rollout import Rollout, generate
from mopd_train.sampler import Sampling
from tests.train.test_distributed import SHARDED, SPLIT, arguments, metrics_of
from tests.train.test_evaluate import write_rows

MIXED = [[1.0, 0.0, 0.5, 1.0], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]


def run_of(model: Path, folder: Path, rows: Path, method: str = "mopd", **changes: object) -> setup.Run:
    config = Config(method=method)  # type: ignore[arg-type]
    config.model.model_name_or_path = str(model)
    config.data.task, config.data.train_dataset = "tests.train.rewards.parity", str(rows)
    config.rollout.num_prompts, config.rollout.num_generations, config.rollout.max_completion_length = 3, 4, 5
    config.training.output_dir, config.training.report_to, config.training.learning_rate = str(folder), [], 0.01
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    return setup.set_up(config)


def judged_groups(run: setup.Run, rewards: list[list[float]]) -> list:
    sampling = Sampling(4, 5, 1.0, 1.0, 64)
    groups = generate(run.student, run.tokenizer, run.train_prompts[: len(rewards)], sampling, [2], seed=5)
    for group, values in zip(groups, rewards, strict=True):
        for i, (rollout, value) in enumerate(zip(group.rollouts, values, strict=True)):
            rollout.reward = value
            rollout.token_ids = rollout.token_ids[: 2 + i]  # of different lengths
            rollout.logprobs = [-8.0] * len(rollout.token_ids)
    return groups


def contexts_of(run: setup.Run, groups: list) -> list:
    if METHODS[run.config.method].teacher == "context":
        return train.read_contexts(run, groups, 7, Clock())[0]
    return [[None] * len(group.rollouts) for group in groups]


def gradients(run: setup.Run, groups: list, size: int, tree: bool) -> dict[str, torch.Tensor]:
    """Of one step cut into micro-batches of `size`; the loss under its own name."""
    run.config.training.tree = tree
    examples, units = learning.select(run, groups, contexts_of(run, groups))
    whole = METHODS[run.config.method].whole_groups
    batches = list(learning.micro_batches(examples, size, tree, whole))
    totals = learning.Totals()
    learning.accumulate(run, 1, batches, units, totals, Clock(), keep_logprobs=False)
    found = {name: p.grad.clone() for name, p in run.student.named_parameters()}
    run.student.zero_grad()
    metrics = totals.metrics(run.ranks, 1)
    return found | {name: torch.tensor(metrics[name]) for name in ("loss", "entropy")} | {"count": len(batches)}


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_do_not_change_a_step(tiny_model, tmp_path, method):
    """Loss, metrics and every gradient, for groups of unlike length, cut anywhere the method allows."""
    run = run_of(tiny_model, tmp_path / "run", write_rows(tmp_path), method)
    if run.teacher is not None and run.teacher is not run.student:
        with torch.no_grad():  # else opd would compare rounding errors
            run.teacher.model.norm.weight.mul_(1.5)
    groups = judged_groups(run, MIXED)
    whole = gradients(run, groups, size=100, tree=True)
    for size, tree in ((1, True), (3, True), (5, False)):
        cut = gradients(run, groups, size, tree)
        assert cut.pop("count") > 1 == whole["count"]
        for name, value in cut.items():
            scale = float(whole[name].abs().max())
            torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-4 * max(scale, 1e-6))
    assert max(float(whole[name].abs().max()) for name in whole if name not in ("loss", "entropy", "count")) > 1e-4


def test_pairs_are_never_cut():
    examples = [
        Example(group, [1], [1], Rollout([5], "", True, 0.0)) for group, n in enumerate((3, 2, 4)) for _ in range(n)
    ]
    sizes = {size: [len(b) for b in learning.micro_batches(examples, size, True, True)] for size in (1, 4, 5, 100)}
    assert sizes == {1: [3, 2, 4], 4: [3, 2, 4], 5: [5, 4], 100: [9]}


@pytest.mark.parametrize(
    ("method", "rewards"),
    [
        ("grpo", [[1.0] * 4, [0.0] * 4]),
        ("dpo", [[0.3] * 4]),
        ("simpo", [[0.0] * 4]),
        ("sft", [[0.0, 0.5, 0.0, 0.0]]),
        ("sdpo", [[0.0] * 4]),
    ],
)
def test_a_step_without_anything_to_learn_from_moves_nothing(tiny_model, tmp_path, method, rewards):
    """Adam's moments of a step before would move the weights without any gradient."""
    run = run_of(tiny_model, tmp_path / "run", write_rows(tmp_path), method)
    groups = judged_groups(run, MIXED)
    first = learning.learn(run, 1, groups, contexts_of(run, groups), Clock())
    assert first["skipped_steps"] == 0
    assert first["grad_norm"] > 0
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    rate = run.scheduler.get_last_lr()
    groups = judged_groups(run, rewards)
    metrics = learning.learn(run, 2, groups, contexts_of(run, groups), Clock())
    assert metrics["skipped_steps"] == 1
    assert "loss" not in metrics
    assert "skipped: no rollout to learn from" in train.report.step_line(metrics | {"step": 2, "reward": 0.0}, 4)
    assert run.scheduler.get_last_lr() == rate
    assert all(torch.equal(value, before[name]) for name, value in run.student.state_dict().items())


def test_several_updates_on_one_batch_compare_with_the_first(tiny_model, tmp_path):
    run = run_of(tiny_model, tmp_path / "run", write_rows(tmp_path), "grpo", training__num_iterations=3)
    groups = judged_groups(run, MIXED[:2])
    start = run.scheduler.last_epoch
    metrics = learning.learn(run, 1, groups, contexts_of(run, groups), Clock())
    assert run.scheduler.last_epoch == start + 3
    assert metrics["is_ratio/update"] != 1  # the mean over three updates, of which the first has ratio 1
    assert metrics["clip_ratio"] > 0  # steps of 0.01 leave 1 +- 0.2
    examples, _ = learning.select(run, groups, contexts_of(run, groups))
    assert all(example.old_logprobs is None for example in examples)  # the next batch begins anew


@pytest.mark.parametrize(
    ("processes", "held", "method"),
    [
        (2, SPLIT, ("--method", "dpo")),
        (2, SHARDED, ("--method", "grpo", "--training.num_iterations", "2")),
        (2, SHARDED, ("--distillation.teacher_regularization", "trust-region")),
        (4, SPLIT, ("--context.peer_control_mode", "unrelated_prompt", "--distillation.teacher_offload", "true")),
    ],
    ids=["dpo split", "grpo sharded", "trust region sharded", "unrelated, offloaded, split"],
)
def test_processes_do_not_change_a_step(warm, halting_model, tmp_path, processes, held, method):
    """Pairs, advantages, mixtures and strangers of three prompts over several processes, as in one."""
    rows, short = write_rows(tmp_path), (*method, "--training.max_steps", "2")
    warm.run(*arguments(halting_model, tmp_path / "one", rows, *short))
    warm.run_ranks(processes, *arguments(halting_model, tmp_path / "several", rows, *short, *held))
    one, several = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "several")
    assert [row["skipped_steps"] for row in one] == [0, 0]
    for mine, expected in zip(several, one, strict=True):
        assert mine.keys() == expected.keys()
        for key in {key for key in expected if not key.endswith("_computed")}:
            assert mine[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), (expected["step"], key)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("mopd", {"distillation__teacher_regularization": "trust-region"}),
        ("mopd", {"context__peer_control_mode": "success_only_matched", "context__summary_k": 1}),
        ("dpo", {"distillation__teacher_offload": True}),
    ],
)
def test_a_resumed_run_is_bitwise_the_same(tiny_model, tmp_path, method, changes):
    """The reference is the initial model also where the student is a checkpoint."""
    rows = write_rows(tmp_path)
    run = run_of(tiny_model, tmp_path / "run", rows, method, **changes)
    train.train_step(run, 1)
    train.save(run, 1)
    straight = train.train_step(run, 2)
    resumed = run_of(tiny_model, tmp_path / "run", rows, method, training__resume_from_checkpoint="latest", **changes)
    again = train.train_step(resumed, 2)
    timeless = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in (straight, again)]
    assert timeless[0] == timeless[1]
    ours, theirs = run.student.state_dict(), resumed.student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def config_with(**changes: object) -> Config:
    config = Config()
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        setattr(getattr(config, section) if section else config, key, value)
    return config


SAMPLED = {"distillation__full_logit_distillation": False, "distillation__alpha": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation__alpha": 1.5}, r"expected distillation.alpha in \[0, 1\], got 1.5"),
        ({"distillation__step_level_kl": True}, "step_level_kl needs full_logit_distillation=false"),
        ({"distillation__full_logit_distillation": False}, "estimates reverse KL: set distillation.alpha 1, got 0.5"),
        (SAMPLED | {"distillation__distillation_topk": 5}, "distillation_topk=5 is not read with"),
        (SAMPLED | {"distillation__step_level_kl": True, "distillation__step_separator": ""}, "step_separator that is"),
        ({"distillation__distillation_topk": 0}, "expected distillation.distillation_topk >= 1 or null, got 0"),
        ({"distillation__is_clip": 0.0}, "expected distillation.is_clip > 0 or null, got 0.0"),
        ({"distillation__teacher_temperature": -1.0}, "expected distillation.teacher_temperature > 0 or null"),
        ({"distillation__teacher_update_rate": 0.0}, r"teacher_update_rate in \(0, 1\], got 0.0"),
        ({"distillation__teacher_model_name_or_path": "x"}, "'x' is only read with"),
        ({"distillation__teacher_dtype": "bfloat16"}, "rounds the small steps of a moving average away"),
        (
            {"distillation__teacher_regularization": "self", "distillation__teacher_offload": True},
            "has no weights of its own",
        ),
        ({"context__success_template": "x"}, r"expected \{text\} in context.success_template, got 'x'"),
        ({"context__summary_request": "x"}, r"expected \{text\} in context.summary_request"),
        ({"context__summary_k": -1}, "expected context.summary_k >= 0, got -1"),
        ({"context__peer_control_mode": "random_peer", "context__context": "none"}, "choose e.g. 2s1f"),
        ({"method": "opd", "context__summary_k": 1}, "method opd reads no peers, got context.summary_k=1"),
        ({"rollout__num_generations": 1}, "num_generations >= 2 for context '2s1f'"),
        ({"method": "grpo", "rollout__num_generations": 1}, "num_generations >= 2 for grpo, got 1"),
        ({"method": "dpo", "baseline__dpo_beta": 0.0}, "expected baseline.dpo_beta > 0, got 0.0"),
        ({"method": "simpo", "baseline__simpo_gamma": -1.0}, "expected baseline.simpo_gamma >= 0, got -1.0"),
    ],
)
def test_settings_that_a_method_cannot_use_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settle(config_with(**changes))


def test_a_method_has_its_own_context(caplog):
    config = config_with(method="sdpo", context__context="2s")
    with caplog.at_level(logging.INFO):
        assert settle(config).context.context == "1s"
    assert "method sdpo: context 1s" in caplog.text
    assert config.context.context == "2s"
    assert settle(config_with(context__context="2s")).context.context == "2s"
    settle(config_with(method="opd", rollout__num_generations=1))
    assert "the loss is 0 and only rounding is learnt" in caplog.text
    settle(config_with(method="grpo", distillation__alpha=7.0))  # not read


def test_every_method_says_what_it_needs():
    needs = defaultdict(set)
    for name, method in METHODS.items():
        needs[method.teacher].add(name)
        assert not method.whole_groups or method.compares
    assert needs == {"context": {"mopd", "opd", "sdpo"}, "reference": {"dpo"}, None: {"grpo", "simpo", "sft"}}
