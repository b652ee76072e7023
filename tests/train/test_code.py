"""The code task: layouts, extraction, comparison, and verdicts that a candidate cannot fake."""

from __future__ import annotations

import ast
import base64
import json
import os
import pickle
import zlib
from pathlib import Path

import pytest

from mopd_train.config import Config, DataConfig, SandboxConfig
from mopd_train.data import build_prompts, split_rows
from mopd_train.files import write_jsonl
from mopd_train.rewards import task_of
from mopd_train.sandbox import Sandbox, SandboxUnavailable
from mopd_train.tasks import TASKS, code, find_task, functions
from mopd_train.tasks.code import extract_code
from mopd_train.tasks.code_compare import same_output, same_value
from mopd_train.tasks.code_layouts import adapt, load_human_eval
from tests.train.cheats import CHEATS

LIMITS = SandboxConfig(seconds=20.0, memory_mb=512, workers=2)


@pytest.fixture(scope="module")
def box():
    try:
        sandbox = Sandbox(LIMITS)
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def benchmark():
    try:
        return [adapt(row) for row in load_human_eval()]
    except FileNotFoundError as error:
        pytest.skip(str(error))


def verdicts(box, row, *codes):
    """Of programs, each alone in a fenced block."""
    completions = [f"Here:\n```python\n{text}\n```" for text in codes]
    columns = {key: [row.get(key)] * len(codes) for key in ("tests", "test", "entry_point", "prelude")}
    return code.reward([None] * len(codes), completions, [[]] * len(codes), sandbox=box, **columns)


def scores(box, row, *codes):
    return [verdict["score"] for verdict in verdicts(box, row, *codes)]


ECHO = {"tests": [{"input": "3\n4\n", "output": "7\n"}, {"input": "10\n-1\n", "output": "9\n"}]}
SUM = {"tests": [{"input": [3, 4], "output": 7}, {"input": [10, -1], "output": 9}], "entry_point": "f"}
CHECK = {
    "test": "def check(f):\n    assert f(3, 4) == 7\n    assert f([1], (2,)) == 'SECRET-EXPECTED'\n",
    "entry_point": "f",
}  # fmt: skip


def test_right_and_wrong_programs(box):
    right = "print(int(input()) + int(input()))"
    first_only, silent = "print(7)", "pass"
    assert scores(box, ECHO, right, first_only, silent, "print(7", "") == [1, 0, 0, 0, 0]
    assert scores(box, SUM, "def f(a, b): return a + b", "def f(a, b): return 7", "def g(a, b): return a + b") == [
        1,
        0,
        0,
    ]
    solution = "class Solution:\n    def f(self, a, b):\n        return a + b"
    assert scores(box, SUM, solution) == [1]


def test_feedback_names_the_failure(box):
    said = [verdict["feedback"] for verdict in verdicts(
        box, SUM,
        "def f(a, b): return a + b",
        "def f(a, b): return 7",
        "def f(a, b):\n    return a / 0",
        "def g(): pass",
        "def f(a, b): return 'x' * 5000",
        "def f(a, b): return bytearray(1 << 30)",
    )]  # fmt: skip
    assert said[0] == "All tests passed."
    assert said[1] == "Test 2 failed.\nInput: [10, -1]\nExpected: 9\nGot: 7"
    assert said[2].endswith("ZeroDivisionError: division by zero")
    assert "return a / 0" in said[2]
    assert "the code defines no function 'f'" in said[3]
    assert said[4].endswith("x... (5000 characters)")
    assert said[5].endswith("The memory limit was exceeded.")
    assert "No such" not in "".join(said)
    (slow,) = verdicts(Sandbox(SandboxConfig(seconds=1.0, workers=1)), ECHO, "while True: pass")
    assert slow["feedback"].endswith("The time limit was exceeded.")
    (crash,) = verdicts(box, ECHO, "print(int(input()))\nraise KeyError('k')")
    assert crash["feedback"].startswith("Test 1 failed.\nInput: 3\n4\nExpected: 7\nIt ended with crash: Traceback")


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_do_not_pass(box, cheat):
    """As a program reading stdin, as a called function, and under an assert program."""
    stdin_secret = {"tests": [{"input": "q", "output": "SECRET-EXPECTED"}]}
    call_secret = {"tests": [{"input": [3, 4], "output": "SECRET-EXPECTED"}], "entry_point": "f"}
    for row in (ECHO, SUM, CHECK, stdin_secret, call_secret):
        assert scores(box, row, CHEATS[cheat]) == [0.0], row


def test_the_search_for_answers_would_find_what_is_there(box):
    """The control: given the answer as an argument, the same search finds it, and a right answer passes."""
    row = {"tests": [{"input": ["SECRET-EXPECTED", 1], "output": "SECRET-EXPECTED"}], "entry_point": "f"}
    assert scores(box, row, CHEATS["looks for the answers"]) == [1.0]
    honest = "def f(a, b): return 7 if a == 3 else 'SECRET-EXPECTED' if (a, b) == ([1], (2,)) else None"
    assert scores(box, CHECK, honest) == [1.0]


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        ("1 2\n3", "1  2 \n3\n\n", True),
        ("1\n2\n3", "1 2\n3", False),
        ("0.3333333", "0.33333333333", True),
        ("0.3334", "0.33333333333", False),
        ("3.0", "3", True),
        ("3.0000001", "3", False),
        ("100000000000000000000001", "100000000000000000000000", False),
        ("nan", "1.0", False),
        ("1e999", "1e5", False),
        ("1_0", "10", False),
        ("yes", "YES", False),
        ("", "0", False),
        ("", "", True),
    ],
)
def test_outputs(got, expected, same):
    assert same_output(got, expected) is same


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        ((1, (2,)), [1, [2]], True),
        ([1, 2], [2, 1], False),
        ({"a": 0.1 + 0.2}, {"a": 0.3}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ("1", 1, False),
        (10**400, 1.0, False),
        (None, [], False),
        (float("nan"), 1.0, False),
        ([[]], [], False),
    ],
)
def test_values(got, expected, same):
    assert same_value(got, expected) is same


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("q", "```python\na\n```\nor\n```py\nb\n```\nend", "b\n"),
        ("q", "```\nopen to the end", "open to the end"),
        ("q", "print(1)", "print(1)"),
        ("q", "<think>```python\nno\n```</think>\n```python\nyes\n```", "yes\n"),
        ("q", "was opened by the template</think>```python\nyes\n```", "yes\n"),
        ("q", "<think>never ends ```python\nno\n```", ""),
        ([{"role": "assistant", "content": "```python\ndef f(x):"}], "\n  return x\n```\n```\nf(1)\n```",
         "def f(x):\n  return x\n"),
    ],
)  # fmt: skip
def test_the_code_of_a_completion(prompt, completion, expected):
    assert extract_code(prompt, completion) == expected


def private(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def test_live_code_bench_rows(box):
    hidden = [{"input": '[1, 2]\n"x"', "output": "[3, 4]", "testtype": "functional"}]
    functional = adapt({
        "question_content": "Q", "starter_code": "class Solution:\n    def g(self, xs: List[int], s: str):\n        ",
        "public_test_cases": json.dumps([{"input": "[5]\n\"y\"", "output": "[7]", "testtype": "functional"}]),
        "private_test_cases": private(hidden), "metadata": '{"func_name": "g"}',
    })  # fmt: skip
    assert functional["tests"] == [{"input": [[5], "y"], "output": [7]}, {"input": [[1, 2], "x"], "output": [3, 4]}]
    assert "class Solution" in functional["prompt"]
    answer = "class Solution:\n    def g(self, xs: List[int], s: str):\n        return tuple(x + 2 for x in xs)"
    assert scores(box, functional, answer, answer.replace("+ 2", "+ 3")) == [1, 0]
    program = adapt({"question_content": "Q", "public_test_cases": '[{"input": "2", "output": "4"}]',
                     "private_test_cases": private([{"input": "3", "output": "9"}]), "metadata": "{}"})  # fmt: skip
    assert scores(box, program, "print(int(input()) ** 2)", "print(2 * int(input()))") == [1, 0]


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    pickle.loads(pickle.dumps(Evil()))  # the control
    (tmp_path / "made").rmdir()
    stored = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(pickle.UnpicklingError, match="expected a string"):
        adapt({"question_content": "Q", "public_test_cases": "[]", "private_test_cases": stored})
    assert not (tmp_path / "made").exists()


def test_apps_rows(box):
    called = adapt({"question": "Q", "input_output": '{"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "f"}'})
    assert scores(box, called, "def f(a, b): return a + b", "def f(a, b): return a") == [1, 0]
    read = adapt({"prompt": "Q", "input_output": {"inputs": [["1", "2"]], "outputs": ["3"]}})
    assert scores(box, read, "print(int(input()) + int(input()))", "print(1)") == [1, 0]


def test_rows_that_cannot_be_judged_are_refused(tmp_path):
    for row, message in (
        ({"prompt": "q"}, r"mine.jsonl:1 .*: a code row needs tests"),
        ({"prompt": "q", "tests": [{"input": "1"}]}, r"expected tests of the form .* got \{'input': '1'\}"),
    ):
        write_jsonl(tmp_path / "mine.jsonl", [row])
        with pytest.raises(ValueError, match=message):
            split_rows(DataConfig(task="code", train_dataset=str(tmp_path / "mine.jsonl")), TASKS["code"])


def test_equal_code_runs_once(box, monkeypatch):
    ran = []
    run_tests = code.run_tests
    monkeypatch.setattr(code, "run_tests", lambda *args: ran.append(args[2]) or run_tests(*args))
    assert scores(box, SUM, *["def f(a, b): return a + b"] * 3, "def f(a, b): return 0") == [1, 1, 1, 0]
    assert len(ran) == 2


def test_late_completions_have_no_verdict(monkeypatch, caplog):
    late = Sandbox(SandboxConfig(workers=1, batch_seconds=1e-6))
    assert code.reward(["q"], ["def f(a, b): return 1"], [[]], sandbox=late, **{k: [v] for k, v in SUM.items()}) == [
        None
    ]
    assert "1 of 1 completions have no verdict" in caplog.text


def test_own_functions(box):
    """References pass; constants do not; the prompts open the turn without a newline; splits share no function."""
    train, held_out = code.rows()
    names = [row["entry_point"] for row in train + held_out]
    assert len(set(names)) == len(names) >= 76
    assert (train, held_out) == code.rows()
    for row in train + held_out:
        assert row["prompt"][-1]["content"].endswith("):")
        outputs = [test["output"] for test in row["tests"]]
        assert len(outputs) == 8
        assert any(value != outputs[0] for value in outputs), row["entry_point"]
        constant = [same_value(outputs[0], value) for value in outputs]
        assert not all(constant)


def references():
    """The source of every reference solution, by the function's name, as the body of that function."""
    tree = ast.parse(Path(functions.__file__).read_text())
    (table,) = [node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "PROBLEMS"]
    bodies = {}
    for name, arguments, _, reference in (entry.elts for entry in table.elts):
        source = ast.unparse(reference)
        call = ast.unparse(reference.body) if isinstance(reference, ast.Lambda) else f"{source}({arguments.value})"
        bodies[name.value] = f"import math\n    return {call}"
    return bodies


def test_completions_of_own_prompts(box):
    """Every reference passes in the sandbox; for some problems, returning nothing or a test's value does not."""
    rows, bodies = [row for part in code.rows() for row in part], references()
    assert len(bodies) == len(rows)

    def judged(chosen, texts):
        columns = {key: [row.get(key) for row in chosen] for key in ("tests", "entry_point")}
        completions = [f"\n    {text}\n```\nDone." for text in texts]
        prompts, ids = [row["prompt"] for row in chosen], [[]] * len(chosen)
        return [v["score"] for v in code.reward(prompts, completions, ids, sandbox=box, **columns)]

    assert judged(rows, [bodies[row["entry_point"]] for row in rows]) == [1.0] * len(rows)
    some = rows[::8]
    assert judged(some, ["return None"] * len(some)) == [0.0] * len(some)
    assert judged(some, [f"return {row['tests'][0]['output']!r}" for row in some]) == [0.0] * len(some)


def test_human_eval(box, benchmark):
    """A fixed quarter by default; all of it with MOPD_ALL_TESTS=1. Canonical solutions pass, others do not."""
    chosen = benchmark if os.environ.get("MOPD_ALL_TESTS") else benchmark[::4]
    assert len(benchmark) == 164
    columns = {key: [row[key] for row in chosen] for key in ("test", "entry_point", "prelude")}
    prompts = [row["prompt"] for row in chosen]

    def judged(completions):
        return [v["score"] for v in code.reward(prompts, completions, [[]] * len(chosen), sandbox=box, **columns)]

    assert judged([f"\n{row['canonical_solution']}\n```" for row in chosen]) == [1.0] * len(chosen)
    some = slice(0, None, 4)
    prompts, columns = prompts[some], {key: values[some] for key, values in columns.items()}
    chosen = chosen[some]
    assert judged(["\n    return None\n```"] * len(chosen)) == [0.0] * len(chosen)


def test_human_eval_is_a_named_set(benchmark, tokenizer):
    config = DataConfig(task="code", eval_dataset="human-eval")
    _, rows = split_rows(config, find_task("code"))
    prompts = build_prompts(rows[:3], find_task("code"), config, tokenizer, "human-eval")
    assert not tokenizer.decode(prompts[0].token_ids).endswith("\n")
    assert prompts[0].row["entry_point"] == "has_close_elements"


def test_a_run_binds_its_limits(box):
    config = Config(sandbox=SandboxConfig(seconds=3.5, workers=1))
    assert find_task("code", config).reward.args[0].config.seconds == 3.5


def test_a_run_judges_in_its_own_sandbox_whatever_the_columns(box):
    config = Config(data=DataConfig(task="code"), sandbox=SandboxConfig(workers=1))
    columns = {key: [value] for key, value in SUM.items()} | {"sandbox": ["a column of the dataset"]}
    reply = "```python\ndef f(a, b): return a + b\n```"
    given = task_of(config).reward(prompts=["q"], completions=[reply], completion_ids=[[]], **columns)
    assert [verdict["score"] for verdict in given] == [1.0]


def test_a_batch_must_end_before_the_time_limit_that_ends_the_run(monkeypatch):
    """Of the verifier's own: with reward functions in its place nothing is run, and no sandbox is made."""
    monkeypatch.setattr(code, "Sandbox", lambda config: pytest.fail("a sandbox was made"))
    config = Config(data=DataConfig(task="code", reward_timeout=600.0), sandbox=SandboxConfig(batch_seconds=500.0))
    with pytest.raises(ValueError, match=r"may take 600 s .*batch_seconds=500.*got data.reward_timeout=600.*lower"):
        task_of(config)
    assert task_of(config, [lambda completions: [1.0]]).reward(prompts=["q"], completions=["c"], completion_ids=[[]])
    limits = Config()
    assert limits.data.reward_timeout > limits.sandbox.batch_seconds + limits.sandbox.completion_seconds + 40
