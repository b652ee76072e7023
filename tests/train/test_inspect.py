"""The inspector's numbers against a dense float64 computation, and what the page's data holds."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from mopd_kernels import LMHead
from mopd_train import cli, train
from mopd_train.analysis import inspect_scores
from mopd_train.analysis.groups import RolloutFiles
from mopd_train.analysis.inspect import InspectOptions, chosen_groups, load_sides
from mopd_train.analysis.inspect_page import GroupData, embedded_json, render
from mopd_train.analysis.inspect_scores import RolloutScores, TeacherScores, TokenScores, score_group
from mopd_train.analysis.sides import load_teacher, teacher_name
from mopd_train.config import Config
from mopd_train.contexts import Peers, TeacherPrompt, teacher_prompts
from mopd_train.data import step_seed
from mopd_train.evaluate import completion_records
from mopd_train.files import write_json, write_jsonl
from mopd_train.models import load_model
from mopd_train.rollout import Group, Prompt, Rollout
from tests.train.test_contexts import group

CONTEXTS = ["none", "2s", "2s1f"]


@pytest.fixture(scope="module")
def sides(tiny_model):
    """A student and another teacher in float64: the same model would agree with itself."""
    student, teacher = load_model(str(tiny_model), "float64"), load_model(str(tiny_model), "float64")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return student, teacher


@pytest.fixture
def config():
    settings = Config()
    settings.rollout.temperature = 0.7
    settings.distillation.teacher_temperature = 0.4
    settings.distillation.alpha = 0.3
    return settings


@torch.no_grad()
def log_softmax(model, prompt_ids, rollout_ids, temperature):
    """(T, V) through the whole model, one sequence at a time."""
    logits = model(torch.tensor([prompt_ids + rollout_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def jensen_shannon(q, p, alpha, top_k):
    if top_k is not None:  # the student's k likeliest tokens, and all others as one
        kept = q.topk(top_k).indices
        q, p = (side.gather(-1, kept) for side in (q, p))
        q, p = (torch.cat([side, torch.log1p(-side.exp().sum(-1, keepdim=True))], dim=-1) for side in (q, p))
    m = ((1 - alpha) * q.exp() + alpha * p.exp()).log()
    return (1 - alpha) * (q.exp() * (q - m)).sum(-1) + alpha * (p.exp() * (p - m)).sum(-1)


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("rows", [64, 5])  # tokens of a rollout in one chunk, or in several
def test_scores_equal_a_dense_computation(sides, tokenizer, config, rows, top_k, monkeypatch):
    config.distillation.distillation_topk = top_k
    monkeypatch.setattr(inspect_scores, "LOGIT_ROWS", rows)
    student, teacher = sides
    mixed = group(tokenizer, [1, 0, 1, 0.5, None], [f"{'so ' * i}peer number {i}" for i in range(5)])
    scored = score_group(student, teacher, tokenizer, mixed, CONTEXTS, config, seed=3, top=4)
    close = dict(rtol=1e-9, atol=1e-9)
    for name in CONTEXTS:
        settings = dataclasses.replace(config.context, context=name)
        prompts = teacher_prompts(mixed, tokenizer, settings, {}, 3)
        for rollout, prompt, scores in zip(mixed.rollouts, prompts, scored, strict=True):
            labels = torch.tensor(rollout.token_ids)[:, None]
            q = log_softmax(student, mixed.prompt.token_ids, rollout.token_ids, 0.7)
            p = log_softmax(teacher, prompt.token_ids, rollout.token_ids, 0.4)
            ours = scores.teacher[scores.contexts[name]]
            assert ours.prompt.token_ids == prompt.token_ids
            expected = [
                (scores.student.logprobs, q.gather(1, labels)[:, 0]),
                (scores.student.entropy, -(q.exp() * q).sum(-1)),
                (ours.logprobs, p.gather(1, labels)[:, 0]),
                (ours.entropy, -(p.exp() * p).sum(-1)),
                (ours.divergence, jensen_shannon(q, p, 0.3, top_k)),
            ]
            for actual, dense in expected:
                torch.testing.assert_close(torch.tensor(actual, dtype=torch.float64), dense, **close)
            for t, ids in enumerate(scores.alternatives):
                assert len(set(ids)) == len(ids)
                assert {*q[t].topk(4).indices.tolist(), *p[t].topk(4).indices.tolist()} <= set(ids)
                for likely, dense in ((scores.student, q), (ours, p)):
                    torch.testing.assert_close(
                        torch.tensor(likely.alternatives[t], dtype=torch.float64), dense[t, ids], **close
                    )


def test_contexts_that_coincide_are_scored_once_and_undefined_ones_not_at_all(sides, tokenizer, config):
    student, teacher = sides
    right = score_group(student, teacher, tokenizer, group(tokenizer, [1, 1, 1]), CONTEXTS, config, seed=0)
    assert [scores.contexts for scores in right] == [{"none": 0, "2s": 1, "2s1f": 1}] * 3
    assert [len(scores.teacher) for scores in right] == [2] * 3
    lone = score_group(student, teacher, tokenizer, group(tokenizer, [1]), ["2s"], config, seed=0)
    assert (lone[0].contexts, lone[0].teacher) == ({"2s": None}, [])
    assert all(value < 0 for value in lone[0].student.logprobs)


def test_logits_follow_the_head():
    """Bias, scale, softcap and padding rows: against the formula of LMHead, written out."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 4).double(), torch.randn(9, 4).double(), torch.randn(9).double()
    head = LMHead(weight, bias, softcap=2.0, scale=0.5, vocab_size=7)
    ids, likely = inspect_scores._alternatives([(hidden, head, 0.8)], top=7)
    capped = 2.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 2.0)
    dense = (capped[:, :7] / 0.8).log_softmax(-1)
    for t in range(3):
        assert sorted(ids[t]) == list(range(7))
        torch.testing.assert_close(
            torch.tensor(likely[0][t], dtype=torch.float64), dense[t, ids[t]], rtol=1e-9, atol=1e-9
        )


def test_a_full_page_stays_below_five_megabytes(tokenizer):
    """8 groups x 8 rollouts x 128 tokens x 4 contexts, all of them different, 10 alternatives at every token."""
    rng = random.Random(0)
    data = GroupData(tokenizer, threshold=1.0)

    surprise = [rng.expovariate(1.0) for _ in range(128)]  # numbers are stored as often as they occur
    likely = [[-rng.uniform(0, 9) for _ in range(10)] for _ in range(128)]
    side = dict(logprobs=[-x for x in surprise], entropy=surprise, alternatives=likely)
    for number in range(8):
        some = Group(Prompt([{"role": "user", "content": "word " * 60}], [1] * 60, {}))
        scored = []
        for _ in range(8):
            ids = [rng.randrange(100, 20000) for _ in range(128)]
            some.rollouts.append(Rollout(ids, tokenizer.decode(ids), True, 1.0, "right"))
            teacher = [
                TeacherScores(
                    **side,
                    prompt=TeacherPrompt([rng.randrange(100, 20000) for _ in range(400)], Peers((0,), ()), False),
                    divergence=surprise,
                )
                for _ in range(4)
            ]
            alternatives = [[rng.randrange(100, 20000) for _ in range(10)] for _ in range(128)]
            contexts = {str(i): i for i in range(4)}
            scored.append(RolloutScores(alternatives, TokenScores(**side), teacher, contexts))
        data.add(number + 1, "words", some, scored)
    page = render("inspect", "full", {"about": "", "contexts": list("abcd"), **data.as_dict()})
    assert 2e6 < len(page.encode()) < 5e6


def test_data_cannot_leave_its_element():
    hostile = {"a": "</script><script>alert(1)</script><!--", "b": "\ud800 lone", "c": "中"}
    text = embedded_json(hostile)
    assert "<" not in text
    assert json.loads(text.encode()) == hostile
    assert "&lt;b&gt;</title>" in render("report", "<b>", {})


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Three groups: mixed, all right, mixed."""
    groups = [group(tokenizer, rewards) for rewards in ([1, 0], [1, 1], [0, 1, 1])]
    path = tmp_path / "step-000007.jsonl"
    write_jsonl(path, completion_records(groups, step=7))
    return path


def options(saved, **changes):
    chosen = dict(rollouts=[str(saved)], output="", contexts=CONTEXTS, groups=[], max_groups=8, only_mixed=False, top=5)
    return InspectOptions(**{**chosen, "skip_bad_lines": False, "other_model": False, **changes})


def embedded(page):
    return json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])


def test_inspect_command(saved, tiny_model, tmp_path, tokenizer):
    """The page holds the teacher of the checkpoint, behind the peers that training drew at that step."""
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "deep" / "page.html"
    model = load_model(str(tiny_model))
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    model.save_pretrained(checkpoint / "teacher")
    arguments = ["--model.model_name_or_path", str(checkpoint), "--rollouts", str(saved), "--output", str(output)]
    cli.main(["inspect", *arguments, "--contexts", "none", "2s", "--only-mixed", "--training.seed", "5"])
    page = embedded(output.read_text(encoding="utf-8"))
    assert page["contexts"] == ["none", "2s", "2s1f"]  # the configured one is always there
    assert [found["number"] for found in page["groups"]] == [1, 3]
    assert str(checkpoint / "teacher") in page["about"]
    third = page["groups"][1]
    assert [rollout["verdict"] for rollout in third["rollouts"]] == ["failure", "success", "success"]
    config = Config()
    config.context.context = "2s1f"
    expected = teacher_prompts(group(tokenizer, [0, 1, 1]), tokenizer, config.context, {}, step_seed(5, 7) + 2)
    for rollout, prompt in zip(third["rollouts"], expected, strict=True):
        teacher = rollout["teacher"][rollout["contexts"][2]]
        assert page["prompts"][teacher["prompt"]] == tokenizer.decode(prompt.token_ids)
        assert [i - 1 for i in teacher["successes"]] == list(prompt.peers.successes)
        assert [page["tokenIds"][i] for i in rollout["tokens"]] == tokenizer.encode(rollout["text"])
        assert teacher["logprobs"] != rollout["logprobs"]


def test_training_and_inspector_share_the_seed():
    config = Config()
    config.training.seed = 3
    assert train.seed_of(type("Run", (), {"config": config})(), 11) == step_seed(3, 11)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--contexts", "3s"], r"expected --contexts in \['none', .*got \['3s'\]"),
        (["--max-groups", "0"], "expected --max-groups >= 1, got 0"),
        (["--groups", "0"], "expected --groups, numbered from 1, >= 1, got 0"),
        (["--groups", "2", "9"], r"no groups \[9\], only 3"),
        (["--groups", "2", "--only-mixed"], "was chosen: nothing to show"),
    ],
)
def test_what_inspect_refuses(saved, tiny_model, tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("MOPD_DEBUG", "1")
    output = tmp_path / "page.html"
    arguments = ["--model.model_name_or_path", str(tiny_model), "--rollouts", str(saved), "--output", str(output)]
    with pytest.raises(ValueError, match=message):
        cli.main(["inspect", *arguments, *changes])
    assert not output.exists()


def test_groups_by_number(saved, tmp_path, tokenizer):
    other = Path(shutil.copy(saved, tmp_path / "other.jsonl"))
    files = RolloutFiles([saved, other], tokenizer)
    chosen = [(number, found.number) for number, found in chosen_groups(files, options(saved, groups=[2, 4, 6]), 1.0)]
    assert chosen == [(2, 1), (4, 0), (6, 2)]


def test_a_model_that_is_broken_is_named(saved, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("MOPD_DEBUG", "1")
    model = load_model(str(tiny_model))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    monkeypatch.setattr("mopd_train.analysis.inspect.load_sides", lambda config, tokenizer: (model, model, "itself"))
    arguments = ["--model.model_name_or_path", str(tiny_model), "--rollouts", str(saved)]
    with pytest.raises(FloatingPointError, match=r"rollout 1 of the group at .*step-000007.jsonl:1: the model's"):
        cli.main(["inspect", *arguments, "--output", str(tmp_path / "page.html")])


def test_the_teacher_of_a_checkpoint_is_that_of_its_training(tiny_model, tokenizer, tmp_path):
    """With a teacher/ of another run's moving average in the folder, which the other kinds must not take."""
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(tiny_model, folder)
    (folder / "teacher").mkdir()
    write_json(folder / "trainer_state.json", {"step": 4})
    config = Config()
    config.model.model_name_or_path = str(folder)
    names = {}
    for kind in ("ema", "self"):
        config.distillation.teacher_regularization = kind
        names[kind] = teacher_name(config)
    assert names == {"ema": str(folder / "teacher"), "self": str(folder)}
    config.distillation.teacher_regularization = "trust-region"
    with pytest.raises(ValueError, match=r"trust-region teacher of .*checkpoint-4 mixes .* frozen takes the run's"):
        load_teacher(config, tokenizer)
    config.distillation.teacher_regularization = "frozen"
    with pytest.raises(ValueError, match=r"frozen teacher.*name it with --distillation.teacher_model_name_or_path"):
        load_sides(config, tokenizer)
    first = Config()
    first.model.model_name_or_path = str(tiny_model)
    write_json(tmp_path / "run.json", first.as_dict())
    assert load_sides(config, tokenizer)[2] == str(tiny_model)


@pytest.mark.parametrize("kind", ["ema", "self", "frozen", "trust-region"])
def test_a_model_that_no_run_made_is_what_every_teacher_begins_as(tiny_model, kind):
    config = Config()
    config.model.model_name_or_path = str(tiny_model)
    config.distillation.teacher_regularization = kind
    assert teacher_name(config) == str(tiny_model)


def test_the_named_teacher_comes_first(tiny_model, tokenizer, tmp_path):
    config = Config()
    config.model.model_name_or_path = str(tiny_model)
    student, teacher, name = load_sides(config, tokenizer)
    assert (student is teacher, name) == (True, "the student itself")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config.distillation.teacher_model_name_or_path = str(other)
    student, teacher, name = load_sides(config, tokenizer)
    assert (student is teacher, name) == (False, str(other))
