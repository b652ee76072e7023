"""Datasets, prompts and verdicts: what is refused, and which prompts a step takes."""

from __future__ import annotations

import json

import pytest

from mopd_train.config import DataConfig
from mopd_train.data import build_prompts, load_rows, split_rows, step_prompts
from mopd_train.rollout import Group, Rollout
from mopd_train.tasks import TASKS, find_task
from mopd_train.verify import judge
from tests.train import rewards


def test_jsonl_and_json_rows(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert load_rows(str(tmp_path / "a.jsonl")) == load_rows(str(tmp_path / "a.json")) == rows


def test_bad_files_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2 is not valid JSON"):
        load_rows(str(tmp_path / "bad.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"none.jsonl does not exist"):
        load_rows(str(tmp_path / "none.jsonl"))


def test_a_users_dataset_is_not_evaluated_on_the_tasks_prompts(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n')
    train, held_out = split_rows(DataConfig(train_dataset=str(path)), TASKS["arithmetic"])
    assert (len(train), held_out) == (1, [])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"prompt": "a", "answer": "1"}, {"prompt": "b"}], "row 1 lacks column 'answer'"),
        ([{"answer": "1"}], "row 0 lacks column 'prompt'"),
        (
            [{"prompt": "word " * 300, "answer": "1"}],
            r"row 0: its prompt is \d+ tokens, over data.max_prompt_length=64",
        ),
        ([{"prompt": [{"role": "system", "content": "x"}], "answer": "1"}], "row 0 has no user message"),
    ],
)
def test_bad_rows(tokenizer, rows, message):
    config = DataConfig(task="math", max_prompt_length=64)
    with pytest.raises(ValueError, match=message):
        build_prompts(rows, TASKS["math"], config, tokenizer, "mine.jsonl")


def test_steps_walk_through_whole_epochs(tokenizer):
    rows = [{"prompt": str(i), "answer": "0"} for i in range(7)]
    prompts = build_prompts(rows, TASKS["math"], DataConfig(), tokenizer, "rows")
    walked = [p.row["prompt"] for step in range(7) for p in step_prompts(prompts, step, 3, seed=5)]
    for epoch in range(3):
        assert sorted(walked[epoch * 7 : epoch * 7 + 7]) == [str(i) for i in range(7)]
    assert walked[:7] != walked[7:14]
    assert walked[3:6] == [p.row["prompt"] for p in step_prompts(prompts, 1, 3, seed=5)]
    assert walked != [p.row["prompt"] for step in range(7) for p in step_prompts(prompts, step, 3, seed=6)]


def test_arithmetic_splits_are_disjoint_and_gold_answers_pass():
    train, held_out = TASKS["arithmetic"].rows()

    def fact(row):
        words = row["prompt"].split()
        return words[3], frozenset((words[2], words[4].rstrip("?")))

    assert not {fact(r) for r in train} & {fact(r) for r in held_out}
    every = train + held_out
    answers = [row["answer"] for row in every]

    def scores(completions):
        verdicts = TASKS["arithmetic"].reward([None] * len(every), completions, [[]] * len(every), answer=answers)
        return {verdict["score"] for verdict in verdicts}

    assert scores(answers) == {1.0}
    assert scores([f"The answer is {a}." for a in answers]) == {1.0}
    assert scores([str(int(a) + 1) for a in answers]) == {0.0}
    assert scores([a + "0" for a in answers]) == {0.0}
    assert scores([f"-{a}" for a in answers]) == {0.0}
    assert scores([f"{a}.5" for a in answers]) == {0.0}
    restated = [row["prompt"].removeprefix("What is ").split("?")[0] for row in every]
    assert scores(restated) == {0.0}
    assert scores([f"{question} = {a}." for question, a in zip(restated, answers, strict=True)]) == {1.0}
    assert scores(["I do not know"] * len(answers)) == {0.0}


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        (r"\frac{1}{2}", r"so the answer is \boxed{0.5}", True),
        (r"\frac{1}{2}", r"\boxed{\frac{2}{3}}", False),
        ("7", "first 3, then 4, so 7", True),
        ("7", "first 7, then 4", False),
        ("x+1", r"\boxed{1+x}", True),
    ],
)
def test_math_answers(gold, completion, right):
    verdict = TASKS["math"].reward([None], [completion], [[]], answer=[gold])[0]
    assert verdict["score"] == float(right), verdict


def judged(tokenizer, reward):
    prompts = build_prompts([{"prompt": "q", "answer": "1"}], TASKS["math"], DataConfig(), tokenizer, "rows")
    some = [Group(prompts[0], [Rollout([4], "a", True), Rollout([5], "b", True)])]
    judge(some, reward, "mine")
    return [(r.reward, r.feedback) for r in some[0].rollouts]


def test_verdicts_land_on_rollouts(tokenizer):
    assert judged(tokenizer, rewards.parity) == [(1.0, None), (0.0, None)]
    mixed = [None, {"score": 1, "feedback": "well done"}]
    assert judged(tokenizer, lambda *_, **__: mixed) == [(None, None), (1.0, "well done")]


def test_broken_verifiers_stop_the_run(tokenizer):
    with pytest.raises(RuntimeError, match=r"'mine' raised KeyError: 'no such unit test'.*'q'"):
        judged(tokenizer, rewards.raises)
    with pytest.raises(ValueError, match=r"gave nan for prompt 'q' and completion 'a'"):
        judged(tokenizer, rewards.not_a_number)
    with pytest.raises(ValueError, match="expected 2 verdicts, got 1"):
        judged(tokenizer, lambda *_, **__: [1.0])


def test_tasks_by_name_and_by_dotted_path():
    assert find_task("tests.train.rewards.parity").reward is rewards.parity
    with pytest.raises(ValueError, match=r"expected data.task in .*'arithmetic'.* got 'nope'"):
        find_task("nope")
    with pytest.raises(ValueError, match="cannot be imported"):
        find_task("tests.train.rewards.nope")
