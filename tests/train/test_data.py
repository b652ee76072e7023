"""Datasets, prompts and verdicts: what is refused, and which prompts a step takes."""

from __future__ import annotations

import copy
import json
import sys

import pytest

from mopd_train.config import DataConfig
from mopd_train.data import build_prompts, load_rows, messages_of, split_rows, step_prompts
from mopd_train.rollout import Group, Rollout
from mopd_train.tasks import TASKS, find_task
from mopd_train.verify import judge
from tests.train import rewards
from tests.train.verdicts import needs


def test_jsonl_and_json_rows(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert load_rows(str(tmp_path / "a.jsonl")) == load_rows(str(tmp_path / "a.json")) == rows


def test_bad_files_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2 is not valid JSON"):
        load_rows(str(tmp_path / "bad.jsonl"))
    (tmp_path / "rows.csv").write_text("prompt,answer\na,1\n")
    with pytest.raises(ValueError, match=r"rows.csv is a file of kind '.csv', expected .jsonl, .json or .parquet"):
        load_rows(str(tmp_path / "rows.csv"))
    with pytest.raises(FileNotFoundError, match=r"none.jsonl does not exist"):
        load_rows(str(tmp_path / "none.jsonl"))


def test_malformed_rows_are_named_by_file_and_line(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    for content, message in (
        (b'{"prompt": "a"}\n\n[1]\n', "rows.jsonl:3 is a list, expected an object"),
        (b'{"prompt": "a"}\n\xff\n', "rows.jsonl:2 is not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_rows(str(path))
    path.write_text('{"prompt": "a", "answer": "1"}\n\n{"prompt": "b"}\n')
    config = DataConfig(task="math", train_dataset=str(path))
    with pytest.raises(ValueError, match=r"rows.jsonl:3 lacks column 'answer'"):
        build_prompts(split_rows(config, TASKS["math"])[0], TASKS["math"], config, tokenizer, str(path))


def test_verl_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "data_source": "mine",
            "prompt": [{"role": "user", "content": f"{i} + 1?"}],
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "extra_info": {"index": i, "split": "train", "unused": None},
        }
        for i in range(2500)
    ]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    loaded, held_out = split_rows(DataConfig(task="math", train_dataset=str(path)), TASKS["math"])
    assert len(loaded) == 2500
    assert held_out == []
    assert loaded[2400] == {
        "data_source": "mine",
        "prompt": [{"role": "user", "content": "2400 + 1?"}],
        "answer": "2401",
        "index": 2400,
        "split": "train",
    }
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"bad.parquet is not a readable parquet file"):
        load_rows(str(tmp_path / "bad.parquet"))


def test_verl_rows_of_code_and_of_tools(tmp_path):
    """The tests of code are its ground truth; a row that lacks one is not a row whose answer is null."""
    path = tmp_path / "verl.jsonl"
    held = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}
    call = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[2], [4]]}
    for truth, name in ((held, None), (json.dumps(held), None), (json.dumps(call), "f")):
        row = {"prompt": "Double it.", "reward_model": {"ground_truth": truth, "style": "rule"}}
        path.write_text(json.dumps(row))
        rows, _ = split_rows(DataConfig(task="code", train_dataset=str(path)), TASKS["code"])
        outputs = [2, 4] if name else ["2\n", "4\n"]
        assert [test["output"] for test in rows[0]["tests"]] == outputs
        assert (rows[0]["prompt"], rows[0]["entry_point"]) == ("Double it.", name)
    for truth in ({"style": "rule"}, {"ground_truth": "42"}):
        path.write_text(json.dumps({"prompt": "Double it.", "reward_model": truth}))
        with pytest.raises(ValueError, match=r"verl.jsonl:1 .* a code row needs tests"):
            split_rows(DataConfig(task="code", train_dataset=str(path)), TASKS["code"])
    path.write_text(json.dumps({"prompt": "Call.", "tools": [], "reward_model": {"style": "rule"}}))
    with pytest.raises(ValueError, match=r"verl.jsonl:1 .* needs the right calls in column 'answer'"):
        split_rows(DataConfig(task="tools", train_dataset=str(path)), TASKS["tools"])


def test_layouts_are_mapped_when_a_task_reads_them(tmp_path):
    path = tmp_path / "aime.jsonl"
    path.write_text('{"id": 1, "problem": "How many?", "answer": 204, "year": 2024}\n')
    rows, _ = split_rows(DataConfig(task="math", train_dataset=str(path)), TASKS["math"])
    assert rows[0]["prompt"].startswith("How many?")
    assert rows[0]["answer"] == 204
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "Which?", "choices": 3, "answer": 1}\n')
    with pytest.raises(ValueError, match=r"broken.jsonl:1 looks like a known layout and is not"):
        split_rows(DataConfig(task="science", train_dataset=str(broken)), TASKS["science"])


@needs("bfcl_eval", "reasoning_gym", "champ_dataset")
def test_named_sets_and_their_errors(caplog):
    rows = load_rows("reasoning-gym:gcd?size=5&seed=3")
    assert len(rows) == 5
    assert rows == load_rows("reasoning-gym:gcd?size=5&seed=3") != load_rows("reasoning-gym:gcd?size=5&seed=4")
    assert len(load_rows("champ")) == 212
    with pytest.raises(ValueError, match=r"'champ\?size=3'.*unexpected keyword argument 'size'"):
        load_rows("champ?size=3")
    with pytest.raises(ValueError, match="expected bfcl:CATEGORY"):
        load_rows("bfcl:java")
    split_rows(DataConfig(task="tools", train_dataset="bfcl:multiple"), TASKS["tools"])
    assert "training on bfcl:multiple, a benchmark" in caplog.text


def test_absent_packages_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps champ-dataset"):
        load_rows("champ")
    with pytest.raises(ImportError, match="pip install --no-deps evals"):
        load_rows("evals:medmcqa")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"none of the named sets \['aime', 'bfcl'.*pip install 'mopd\[data\]'"):
        load_rows("someone/some-set")


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
        ([{"prompt": 5, "answer": "1"}], "row 0: expected a string or a list of messages as prompt, got 5"),
        ([{"prompt": ["hi"], "answer": "1"}], r"row 0: expected messages of the form \{role, content\}.*got 'hi'"),
        ([{"prompt": [{"role": "user"}], "answer": "1"}], "row 0: expected text, or parts of text, .* got None"),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "answer": "1"}],
            r"row 0: expected text, or parts of text, as content of a message, got \[\{'type': 'image'",
        ),
    ],
)
def test_bad_rows(tokenizer, rows, message):
    config = DataConfig(task="math", max_prompt_length=64)
    with pytest.raises(ValueError, match=message):
        build_prompts(rows, TASKS["math"], config, tokenizer, "mine.jsonl")


def test_content_in_parts_of_text_is_joined(tokenizer):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 2?"}]
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [{"role": "user", "content": parts}, called, {"role": "user", "content": "And?"}]
    assert messages_of(messages) == [{"role": "user", "content": "What is 1 + 2?"}, called, messages[2]]
    rows = [{"prompt": prompt, "answer": "3"} for prompt in (messages[:1], "What is 1 + 2?")]
    ours, plain = build_prompts(rows, TASKS["math"], DataConfig(), tokenizer, "rows")
    assert ours.token_ids == plain.token_ids


def test_a_prompt_that_the_template_refuses_is_named(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="rows row 0: the chat template refuses its prompt: roles must alternate"):
        build_prompts([{"prompt": "q", "answer": "1"}], TASKS["math"], DataConfig(), strict, "rows")


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
