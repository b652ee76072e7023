"""Tool use: a request, the functions there are, and the calls that are right; none may be.

Columns: `tools`, a list of schemas ({"name", "description", "parameters"}, or OpenAI's with "function" around it), and
`answer`, the calls: [{"name", "arguments"}], or the leaderboard's [{name: {argument: [accepted values]}}]; [] where
no function fits. Both may be JSON text. `answer` may be null where any call of a listed function is right.
"""

from __future__ import annotations

import json
from typing import Any

from .answers import without_thinking
from .named import package_file, read_lines
from .tool_calls import UnreadableCall, parse_calls
from .tool_match import Expected, Schema, compare

Row = dict[str, Any]
INSTALL = "pip install --no-deps bfcl-eval"
CATEGORIES = (
    "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance", "live_simple", "live_multiple",
    "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance",
)  # fmt: skip
SYSTEM = """You can call functions. They are, one JSON schema a line:
{tools}

Reply with one call a line, each as
<tool_call>{{"name": "function", "arguments": {{"argument": value}}}}</tool_call>
If no function fits the request, or an argument is missing, say so and call nothing."""


def reward(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    *,
    tools: list[Any],
    answer: list[Any],
    **_: Any,
) -> list[dict[str, Any]]:
    """1.0 where the reply makes the expected calls, in any order and no others, else 0.0."""
    return [_judge(*row) for row in zip(completions, tools, answer, strict=True)]


def _judge(completion: str, tools: Any, answer: Any) -> dict[str, Any]:
    schemas = schemas_of(tools)
    expected = None if answer is None or answer == "null" else expected_of(answer, schemas)
    try:
        calls = parse_calls(completion)
    except UnreadableCall as error:
        return {"score": 0.0, "feedback": f"The call cannot be read: {error}."}
    if expected is None:
        known = {schema["name"] for schema in schemas}
        right = bool(calls) and all(call["name"] in known for call in calls)
        return {"score": float(right), "feedback": "A call is right." if right else "A listed function must be called."}
    if not calls:
        text = without_thinking(completion)
        if not expected and any(f"{s['name']}(" in text or f'"{s["name"]}"' in text for s in schemas):
            return {"score": 0.0, "feedback": "No function can do this: no call was to be made."}
        right = not expected and bool(text.strip())
        return {"score": float(right), "feedback": "No call is right." if right else "The reply makes no call."}
    fault = compare(calls, expected, schemas)
    return {"score": float(fault is None), "feedback": fault or "The calls are right."}


def schemas_of(tools: Any) -> list[Schema]:
    """The list of {"name", "parameters", ...}. ValueError for anything else."""
    tools = json.loads(tools) if isinstance(tools, str) else tools
    schemas = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools]
    for schema in schemas:
        if not isinstance(schema, dict) or not isinstance(schema.get("name"), str):
            raise ValueError(f"expected function schemas with a name in column 'tools', got {schema!r:.200}")
    return schemas


def expected_of(answer: Any, schemas: list[Schema]) -> list[Expected]:
    """Calls as {name: {argument: accepted values}}; exact calls accept their value, and leaving out a default."""
    answer = json.loads(answer) if isinstance(answer, str) else answer
    expected: list[Expected] = []
    for call in answer:
        if "name" not in call or "arguments" not in call:
            expected.append(call)
            continue
        arguments = call["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        schema = next((s for s in schemas if s["name"] == call["name"]), {})
        properties = (schema.get("parameters") or {}).get("properties") or {}
        accepted = {key: [_accepted(value)] for key, value in arguments.items()}
        for key, value in properties.items():
            if "default" in value and accepted.get(key, [value["default"]]) == [_accepted(value["default"])]:
                accepted[key] = [_accepted(value["default"]), ""]
        expected.append({call["name"]: accepted})
    unknown = [next(iter(e)) for e in expected if next(iter(e)) not in {s["name"] for s in schemas}]
    if unknown:
        raise ValueError(f"gold answer calls {unknown[0]!r}, which is none of {[s['name'] for s in schemas]}")
    return expected


def _accepted(value: Any) -> Any:
    """An exact value in the accepted-values form: the keys of objects hold lists of their own."""
    if isinstance(value, dict):
        return {key: [item] for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [_accepted(item) for item in value]
    return value


def gold_calls(expected: list[Expected], schemas: list[Schema]) -> list[dict[str, Any]]:
    """The first accepted calls, each argument given that may be."""
    by_name = {schema["name"]: schema for schema in schemas}
    calls = []
    for call in expected:
        ((name, arguments),) = call.items()
        parameters = by_name[name]["parameters"]
        given = {}
        for key, accepted in arguments.items():
            values = [value for value in accepted if value != ""] or [""]
            if key not in parameters["properties"] or (values[0] == "" and key not in parameters.get("required", [])):
                continue
            empty_list = values[0] == "" and parameters["properties"][key]["type"] == "array"
            given[key] = [] if empty_list else _first(values[0])
        calls.append({"name": name, "arguments": given})
    return calls


def _first(value: Any) -> Any:
    if isinstance(value, dict):
        firsts = {key: [a for a in accepted if a != ""] for key, accepted in value.items()}
        return {key: accepted[0] for key, accepted in firsts.items() if accepted}
    if isinstance(value, list):
        return [_first(item) if isinstance(item, dict) else item for item in value]
    return value


def with_tools(messages: list[dict[str, str]], tools: list[Schema]) -> list[dict[str, str]]:
    """Messages with a system message that shows the functions and how to call them."""
    shown = SYSTEM.format(tools="\n".join(json.dumps(tool) for tool in tools))
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join([*system, shown])}, *rest]


def adapt(row: Row) -> Row | list[Row]:
    """A row of the leaderboard; a ToolAlpaca API, which is one row an instruction; other rows as they are.

    ValueError for a row without gold calls: they may be null, where any call is right, or [], where none is, but not
    left out.
    """
    if "Instructions" in row and "Function_Description" in row:
        return _toolalpaca_rows(row)
    if "answer" not in row and "ground_truth" not in row:
        raise ValueError(
            "a tools row needs the right calls in column 'answer' or 'ground_truth': [] where no function fits, null "
            f"where any call of a listed function is right; it has {sorted(row)}"
        )
    answer = row["answer"] if "answer" in row else row["ground_truth"]
    if "prompt" not in row and "function" in row and "question" in row:
        return _bfcl_row(row, row.get("ground_truth", answer))
    return {**row, "answer": answer}


def toolalpaca_schemas(described: dict[str, str]) -> list[Schema]:
    """ToolAlpaca describes parameters in prose with a JSON object "Parameters: {name: "type. text"}"."""
    schemas = []
    for name, text in described.items():
        if name == "components":
            continue
        head, _, rest = text.partition("Parameters: ")
        listed = json.JSONDecoder().raw_decode(rest)[0] if rest.startswith("{") else {}
        properties, required = {}, []
        for key, said in listed.items():
            kind = str(said).replace("Required.", "").strip().split(".")[0].split(" ")[0].lower()
            properties[key] = {"type": kind if kind in ("string", "integer", "number", "boolean", "array", "object")
                               else "string", "description": str(said)}  # fmt: skip
            if "Required" in str(said):
                required.append(key)
        parameters = {"type": "object", "properties": properties, "required": required}
        schemas.append({"name": name, "description": head.strip(), "parameters": parameters})
    return schemas


def _toolalpaca_rows(row: Row) -> list[Row]:
    """One row an instruction that has gold calls."""
    tools, rows = toolalpaca_schemas(row["Function_Description"]), []
    for instruction, golden in zip(row["Instructions"], row.get("Golden_Answers", []), strict=False):
        if golden:
            prompt = with_tools([{"role": "user", "content": instruction}], tools)
            calls = [{"name": step["Action"], "arguments": step["Action_Input"]} for step in golden]
            rows.append({"prompt": prompt, "tools": tools, "answer": calls})
    return rows


def bfcl(variant: str) -> list[Row]:
    """A category of the Berkeley Function Calling Leaderboard v4 (Apache-2.0), from the bfcl-eval package.

    A benchmark. Rows whose own gold answer breaks their schema are left out (two of live_simple and two of
    live_multiple, which the leaderboard's own check refuses as well).
    """
    if variant not in CATEGORIES:
        raise ValueError(f"expected bfcl:CATEGORY with CATEGORY in {list(CATEGORIES)}, got {variant!r}")
    questions = read_lines(package_file("bfcl_eval", f"data/BFCL_v4_{variant}.json", INSTALL))
    answers: dict[str, Any] = {}
    if "relevance" not in variant:
        path = package_file("bfcl_eval", f"data/possible_answer/BFCL_v4_{variant}.json", INSTALL)
        answers = {row["id"]: row["ground_truth"] for row in read_lines(path)}
    none: Any = [] if "irrelevance" in variant else None
    rows = [_bfcl_row(question, answers.get(question["id"], none)) for question in questions]
    return [row for row in rows if not row["answer"] or _consistent(row)]


def _consistent(row: Row) -> bool:
    calls = gold_calls(row["answer"], row["tools"])
    return compare(calls, row["answer"], row["tools"]) is None


def _bfcl_row(row: Row, answer: Any) -> Row:
    messages = (
        row["question"][0] if isinstance(row["question"], list) else [{"role": "user", "content": row["question"]}]
    )
    tools = row["function"] if isinstance(row["function"], list) else [row["function"]]
    return {"id": row.get("id"), "prompt": with_tools(messages, tools), "tools": tools, "answer": answer}
