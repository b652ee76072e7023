"""Function calls: reading them, the leaderboard's data and its own checker, attacks, layouts."""

from __future__ import annotations

import copy
import json
import random
import sys
import types
import warnings

import pytest

from mopd_train.tasks import tool_sets, tools
from mopd_train.tasks.tool_calls import UnreadableCall, parse_calls
from mopd_train.tasks.tool_match import compare
from tests.train.verdicts import accepted, needs, refused, scores

PYTHON_CATEGORIES = [c for c in tools.CATEGORIES if "relevance" not in c]


def written(calls, style):
    if style == "tags":
        return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
    if style == "json":
        return "```json\n" + json.dumps(calls) + "\n```"
    named = [f"{c['name']}({', '.join(f'{k}={v!r}' for k, v in c['arguments'].items())})" for c in calls]
    return "[" + ", ".join(named) + "]"


@needs("bfcl_eval")
def test_gold_answers_of_the_leaderboard():
    sizes = {}
    for category in tools.CATEGORIES:
        rows = tools.bfcl(category)
        sizes[category] = len(rows)
        for style in ("tags", "json", "python"):
            replies = []
            for row in rows:
                calls = tools.gold_calls(row["answer"], row["tools"]) if row["answer"] else []
                if row["answer"] is None:
                    calls = [{"name": row["tools"][0]["name"], "arguments": {}}]
                replies.append(written(calls, style) if calls else "There is no function for that.")
            assert refused(tools.reward, rows, replies) == [], (category, style)
    assert sizes == {"simple_python": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 200,
                     "irrelevance": 240, "live_simple": 256, "live_multiple": 1051, "live_parallel": 16,
                     "live_parallel_multiple": 24, "live_irrelevance": 884, "live_relevance": 16}  # fmt: skip


@needs("bfcl_eval")
def test_wrong_calls_to_the_leaderboards_functions():
    for category in ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple"):
        rows = tools.bfcl(category)
        rows = [row for row in rows if all(c["arguments"] for c in tools.gold_calls(row["answer"], row["tools"]))]
        golds = [tools.gold_calls(row["answer"], row["tools"]) for row in rows]
        attacks = {
            "extra call": [[*g, g[0]] for g in golds],
            "one missing": [g[1:] for g in golds],
            "unknown function": [[{**c, "name": c["name"] + "_2"} for c in g] for g in golds],
            "unknown argument": [[{**c, "arguments": {**c["arguments"], "zz": 1}} for c in g] for g in golds],
            "swapped values": [[{**c, "arguments": dict.fromkeys(c["arguments"], "?")} for c in g] for g in golds],
        }
        for name, calls in attacks.items():
            assert accepted(tools.reward, rows, [written(c, "tags") for c in calls]) == [], (category, name)
        for form in ("# {}", '"""\n{}\n"""', "<!-- {} -->", "I would call {} here", "<think>{}</think>", "x = {}"):
            assert accepted(tools.reward, rows, [form.format(written(g, "python")) for g in golds]) == [], form
        assert accepted(tools.reward, rows, ["" for _ in rows]) == []
    irrelevant = tools.bfcl("irrelevance")
    called = [written([{"name": row["tools"][0]["name"], "arguments": {}}], "tags") for row in irrelevant]
    assert accepted(tools.reward, irrelevant, called) == []
    broken = [f'<tool_call>{{"name": "{row["tools"][0]["name"]}"' for row in irrelevant]
    assert accepted(tools.reward, irrelevant, broken) == []
    assert accepted(tools.reward, irrelevant, [f"{row['tools'][0]['name']}(" for row in irrelevant]) == []


@needs("bfcl_eval")
def test_the_same_verdicts_as_the_leaderboards_own_checker(monkeypatch):
    """On 16,000 gold and mutated answers to its Python categories."""
    config = types.ModuleType("bfcl_eval.constants.model_config")  # the real one imports every vendor's client
    config.MODEL_CONFIG_MAPPING = types.SimpleNamespace()
    config.MODEL_CONFIG_MAPPING = {"m": types.SimpleNamespace(underscore_to_dot=False)}
    monkeypatch.setitem(sys.modules, "bfcl_eval.constants.model_config", config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tree-sitter and the like, where installed
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    rng = random.Random(0)
    compared = right = 0
    for category in PYTHON_CATEGORIES:
        path = tools.package_file("bfcl_eval", f"data/BFCL_v4_{category}.json", "")
        golds = tools.package_file("bfcl_eval", f"data/possible_answer/BFCL_v4_{category}.json", "")
        answers = {row["id"]: row["ground_truth"] for row in tools.read_lines(golds)}
        for row in tools.read_lines(path):
            expected = answers[row["id"]]
            gold = tools.gold_calls(expected, row["function"])
            for calls in [gold, *(mutated(gold, rng) for _ in range(6))]:
                theirs = [{c["name"]: copy.deepcopy(c["arguments"])} for c in calls]
                reference = ast_checker(row["function"], theirs, expected, Language.PYTHON, category, "m")["valid"]
                fault = compare(calls, expected, row["function"])
                assert (fault is None) == reference, (row["id"], calls, expected, fault)
                compared, right = compared + 1, right + reference
    assert compared > 16_000
    assert 0.2 < right / compared < 0.8


def mutated(gold, rng):
    calls = copy.deepcopy(gold)
    call = rng.choice(calls)
    arguments = call["arguments"]
    key = rng.choice(list(arguments)) if arguments else None
    kind = rng.randrange(9)
    if kind == 0:
        call["name"] += "x"
    elif kind == 1:
        arguments["zzz"] = 1
    elif kind == 2:
        calls.append(copy.deepcopy(calls[0]))
    elif kind == 3:
        rng.shuffle(calls)
    elif key is None:
        pass
    elif kind == 4:
        del arguments[key]
    elif kind == 5:
        arguments[key] = "wrong"
    elif kind == 6:
        arguments[key] = str(arguments[key])
    else:
        arguments[key] = perturbed(arguments[key], kind)
    return calls


def perturbed(value, kind):
    if isinstance(value, str):
        return value.upper() + "." if kind == 7 else value + "s"
    if type(value) is int:
        return float(value) if kind == 7 else value + 1
    if type(value) is float:
        return int(value) if kind == 7 else value + 0.5
    if isinstance(value, list) and value:
        return [*value, value[0]] if kind == 7 else value[::-1]
    if isinstance(value, dict) and value:
        return {**value, "more": 1} if kind == 7 else dict(list(value.items())[1:])
    return [value]


@pytest.mark.parametrize(
    ("reply", "calls"),
    [
        ("f(a=1)", [("f", {"a": 1})]),
        ("Sure!\nf(a=-1.5)\nDone.", [("f", {"a": -1.5})]),
        ("[f(a=1), g.h(b='x', c=true, d=[null, {'k': false}])]",
         [("f", {"a": 1}), ("g.h", {"b": "x", "c": True, "d": [None, {"k": False}]})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
        ('{"type": "function", "function": {"name": "f", "parameters": {}}}', [("f", {})]),
        ('Thought: hm\nAction: f\nAction Input: {"a": 1}', [("f", {"a": 1})]),
        ("# f(a=1)", []), ('"""\nf(a=1)\n"""', []), ("'f(a=1)'", []), ("I would call f(a=1) maybe", []),
        ("def g():\n    f(a=1)", []), ("if False:\n    f(a=1)", []), ("", []), ("[]", []), ("f(" * 3000, []),
    ],
)  # fmt: skip
def test_reading_calls(reply, calls):
    assert [(call["name"], call["arguments"]) for call in parse_calls(reply)] == calls


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("f(1)", "must be named"), ("f(**x)", "must be named"), ("f(a=10**10**10)", "not a literal"),
        ("f(a=__import__('os').system('true'))", "not a literal"), ("f(a=x)", "not a literal"),
        ('{"name": "f", "arguments": {"a": NaN}}', "NaN"), ('{"name": "f", "arguments": [1]}', "no object"),
        ('{"arguments": {}}', "no name"), ("<tool_call>{}", "not closed"),
        ("<tool_call>{</tool_call>", "not valid JSON"),
        ('{"name": "f", "arguments": {"a": ' + "9" * 9000 + "}}", "cannot be read"), ("9" * 100_000, "longer than"),
        ('{"name": "f", "arguments": ' + "[" * 9000 + "}", "not valid JSON"), ("f()()", "no function name"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_read(reply, fault):
    with pytest.raises(UnreadableCall, match=fault):
        parse_calls(reply)
    assert scores(tools.reward, [{"tools": tool_sets.TOOLS, "answer": []}], [reply]) == [0.0]


def test_feedback_names_what_is_wrong():
    def said(reply, answer):
        rows = dict(prompts=[""], completions=[reply], completion_ids=[[]], tools=[tool_sets.TOOLS], answer=[answer])
        return tools.reward(**rows)[0]["feedback"]

    gold = [{"name": "timer", "arguments": {"minutes": 5}}]
    assert said("timer(minutes=6)", gold) == "The argument minutes of timer has the wrong value 6."
    assert said('timer(minutes="5")', gold) == "The argument minutes of timer must be of type integer, got 5."
    assert said("timer()", gold) == "timer lacks the argument minutes."
    assert said('weather(city="Rome")', gold) == "weather is the wrong function."
    assert said("clock(minutes=5)", gold) == "There is no function clock."
    assert said("timer(minutes=5)\ntimer(minutes=5)", gold) == "Expected 1 calls, got 2."
    assert said("timer(minutes=5)", []) == "No function can do this: no call was to be made."
    with pytest.raises(ValueError, match="calls 'clock', which is none of"):
        said("x", [{"name": "clock", "arguments": {}}])


def test_the_generated_requests():
    train, held_out = tool_sets.rows()
    assert (len(train), len(held_out)) == (320, 32)
    asked = [{row["prompt"][-1]["content"] for row in rows} for rows in (train, held_out)]
    assert not asked[0] & asked[1]
    assert refused(tools.reward, train, [written(row["answer"], "python") for row in train]) == []
    shots = [message["content"] for message in train[0]["prompt"] if message["role"] == "assistant"]
    assert all(len(parse_calls(shot)) == 1 for shot in shots)


def test_layouts_of_tool_use():
    alpaca = {
        "Name": "Dates",
        "Function_Description": {
            "getDay": 'Day of a date.\nParameters: {"date": "Required. string. The date.", "n": "integer. Days."}',
            "components": "",
        },
        "Instructions": ["Which day is it?", "No gold."],
        "Golden_Answers": [[{"Action": "getDay", "Action_Input": '{"date": "2024-01-01"}'}], []],
    }
    rows = tools.adapt(alpaca)
    assert len(rows) == 1
    assert rows[0]["tools"][0]["parameters"]["required"] == ["date"]
    assert "getDay" in rows[0]["prompt"][0]["content"]
    replies = ['Action: getDay\nAction Input: {"date": "2024-01-01"}', 'getDay(date="2024-01-02")']
    assert scores(tools.reward, rows * 2, replies) == [1.0, 0.0]
    asked = {"question": "Start a timer of 5 minutes", "function": tool_sets.TOOLS}
    for row in ({"prompt": "q", "tools": tool_sets.TOOLS}, asked):
        with pytest.raises(ValueError, match="needs the right calls in column 'answer' or 'ground_truth'"):
            tools.adapt(row)
    for row in ({"prompt": "q", "tools": tool_sets.TOOLS}, asked):
        calls = ["timer(minutes=5)", "clock()", "There is none."]
        assert scores(tools.reward, [tools.adapt({**row, "answer": None})] * 3, calls) == [1.0, 0.0, 0.0]
        assert scores(tools.reward, [tools.adapt({**row, "ground_truth": []})] * 3, calls) == [0.0, 0.0, 1.0]
    openai = [{"type": "function", "function": tool_sets.TOOLS[1]}]
    row = {"tools": json.dumps(openai), "answer": '[{"name": "timer", "arguments": {"minutes": 5}}]'}
    assert scores(tools.reward, [row], ["timer(minutes=5)"]) == [1.0]
