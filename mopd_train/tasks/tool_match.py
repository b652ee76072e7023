"""Whether calls are the expected ones: the semantics of the Berkeley Function Calling Leaderboard's AST check.

Expected calls are {function: {argument: [accepted values]}}; "" among the values means that the argument may be left
out. Types follow the schema (an integer passes for a float, nothing else is converted), strings are compared without
case, blanks and ",./-_*^", and calls may come in any order. The rules were written down from the leaderboard's
description and checked against bfcl_eval on its data; where one of its loops depends on order, ours tries them all.
"""

from __future__ import annotations

import json
import re
from typing import Any

Schema = dict[str, Any]
Expected = dict[str, dict[str, list[Any]]]
TYPES: dict[str, type] = {
    "string": str, "integer": int, "float": float, "number": float, "boolean": bool, "array": list, "tuple": list,
    "dict": dict, "object": dict, "any": str,
}  # fmt: skip


def compare(calls: list[dict[str, Any]], expected: list[Expected], schemas: list[Schema]) -> str | None:
    """None if the calls match, else what is wrong with them."""
    if len(calls) != len(expected):
        known = {schema["name"] for schema in schemas}
        unknown = [call["name"] for call in calls if call["name"] not in known]
        if unknown:
            return f"There is no function {_short(unknown[0])}."
        if not expected:
            return "No function can do this: no call was to be made."
        return f"Expected {len(expected)} calls, got {len(calls)}."
    by_name = {schema["name"]: schema for schema in schemas}
    faults = [[call_fault(call, want, by_name) for call in calls] for want in expected]
    if _assignable([[fault is None for fault in row] for row in faults]):
        return None
    for row, want in zip(faults, expected, strict=True):
        if None in row:
            continue
        same_name = [f for f, call in zip(row, calls, strict=True) if call["name"] in want]
        return str((same_name or row)[0])
    return "Two calls do the same, and one that is needed is missing."


def _assignable(fits: list[list[bool]], taken: frozenset[int] = frozenset()) -> bool:
    """Whether each row can have a column of its own."""
    if not fits:
        return True
    return any(_assignable(fits[1:], taken | {i}) for i, fit in enumerate(fits[0]) if fit and i not in taken)


def call_fault(call: dict[str, Any], expected: Expected, schemas: dict[str, Schema]) -> str | None:
    """What is wrong with one call, None if nothing is."""
    (name, wanted), arguments = next(iter(expected.items())), call["arguments"]
    if call["name"] != name:
        exists = call["name"] in schemas
        said = _short(call["name"])
        return f"{said} is the wrong function." if exists else f"There is no function {said}."
    parameters = schemas[name].get("parameters") or {}
    properties, required = parameters.get("properties") or {}, parameters.get("required") or []
    missing = [key for key in required if key not in arguments]
    if missing:
        return f"{name} lacks the argument {missing[0]}."
    for key, value in arguments.items():
        if key not in properties or key not in wanted:
            return f"{name} was given the argument {_short(key)}, which it should not be."
        fault = _value_fault(value, wanted[key], properties[key])
        if fault:
            return f"The argument {key} of {name} {fault}."
    left_out = [key for key in wanted if key not in arguments and "" not in wanted[key]]
    return f"{name} lacks the argument {left_out[0]}." if left_out else None


def _value_fault(value: Any, accepted: list[Any], schema: Schema) -> str | None:
    kind = str(schema.get("type", "any"))
    expected_type = TYPES.get(kind, str)
    if isinstance(value, tuple) and kind in ("tuple", "array"):
        value = list(value)
    if expected_type is float and type(value) is int:
        value = _as_float(value)
    given = [answer for answer in accepted if answer != ""]
    answer_type = type(given[0]) if given else None
    if type(value) is not expected_type:
        if answer_type is None or type(value) is not answer_type:
            return f"must be of type {kind}, got {_short(value)}"
        return None if value in accepted else f"has the wrong value {_short(value)}"
    if expected_type is list and not _items_fit(value, accepted, schema):
        return f"must hold items of type {(schema.get('items') or {}).get('type')}, got {_short(value)}"
    if answer_type is not None and answer_type is not expected_type:  # a variable's name stands for the value
        return None if value in accepted else f"has the wrong value {_short(value)}"
    return None if _value_matches(value, accepted, schema) else f"has the wrong value {_short(value)}"


def _as_float(value: int) -> float | int:
    try:
        return float(value)
    except OverflowError:
        return value


def _value_matches(value: Any, accepted: list[Any], schema: Schema) -> bool:
    if isinstance(value, dict):
        return any(isinstance(answer, dict) and _dict_matches(value, answer) for answer in accepted)
    if isinstance(value, list):
        lists = [list(answer) for answer in accepted if isinstance(answer, list) or answer == ""]  # "" is also []
        if TYPES.get(str((schema.get("items") or {}).get("type")), str) is dict:
            return any(
                len(value) == len(answer)
                and all(isinstance(v, dict) and _dict_matches(v, a) for v, a in zip(value, answer, strict=True))
                for answer in lists
            )
        return [_plain(v) for v in value] in [[_plain(a) for a in answer] for answer in lists]
    if isinstance(value, str):
        return _plain(value) in [_plain(answer) for answer in accepted if isinstance(answer, str)]
    return value in accepted


def _dict_matches(value: dict[str, Any], answer: dict[str, Any]) -> bool:
    """Keys with accepted values, "" among them meaning that the key may be absent."""
    if any(key not in answer for key in value):
        return False
    if any(key not in value and "" not in accepted for key, accepted in answer.items()):
        return False
    return all(_plain(item) in [_plain(a) for a in answer[key]] for key, item in value.items())


def _items_fit(value: Any, accepted: list[Any], schema: Schema) -> bool:
    """Whether the items have the schema's type or that of the first accepted item."""
    inner = TYPES.get(str((schema.get("items") or {}).get("type")), str)
    for answer in accepted:
        if not isinstance(answer, list):
            return True  # left out, or a variable's name
        given = [a for a in answer if a != ""]
        own = type(given[0]) if given else None
        if all(type(item) is inner or type(item) is own for item in value):
            return True
    return False


def _plain(value: Any) -> Any:
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
