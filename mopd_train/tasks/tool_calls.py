"""Function calls in the text of a reply: found and read, never evaluated.

Three ways of writing them are read, the first that is there: JSON objects in <tool_call> tags; a reply or code block
that is one JSON object or list of objects; Python calls that fill whole lines, `f(a=1)` or `[f(a=1), g(b="x")]`;
and `Action: f` / `Action Input: {...}` pairs. A call in a comment, a string or the reasoning block is none.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from .answers import without_thinking

LONGEST = 20_000  # characters of a reply that are read; a longer one holds no call that could be run
HIDDEN = re.compile(r"<!--.*?-->|/\*.*?\*/", re.DOTALL)
QUOTED = re.compile(r'"""(?:.*?)"""|' + r"'''(?:.*?)'''", re.DOTALL)
TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
FENCED = re.compile(r"```(?:json|python|py|tool_code|tool_call)?[ \t]*\n(.*?)```", re.DOTALL)
ACTION = re.compile(r"^\s*Action:[ \t]*([^\n]+)\n\s*Action[ _]?Input:[ \t]*(\{.*?\})[ \t]*$", re.DOTALL | re.MULTILINE)
CONSTANTS = {"true": True, "false": False, "null": None}
Call = dict[str, Any]  # {"name": str, "arguments": dict}


class UnreadableCall(ValueError):
    """The reply tries to call something, and what it says cannot be read."""


def parse_calls(reply: str) -> list[Call]:
    """The calls of a reply in order, [] if it makes none. UnreadableCall says what is wrong with one."""
    text = HIDDEN.sub("", without_thinking(reply)[: LONGEST + 1])
    if len(text) > LONGEST:
        raise UnreadableCall(f"the reply is longer than {LONGEST} characters")
    if "<tool_call>" in text:
        blocks = TAGGED.findall(text)
        if len(blocks) != text.count("<tool_call>"):
            raise UnreadableCall("a <tool_call> is not closed")
        return [call for block in blocks for call in _json_calls(block)]
    actions = ACTION.findall(text)
    if actions:
        return [_checked(name.strip(), _json(arguments)) for name, arguments in actions]
    fenced = FENCED.findall(text)
    calls: list[Call] = []
    for block in fenced or [text]:
        stripped = block.strip()
        if stripped.startswith(("{", "[{")):
            calls += _json_calls(stripped)
        else:
            calls += _python_calls(stripped)
    return calls


def _json(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise UnreadableCall(f"{name} is no JSON value")

    try:
        return json.loads(text, parse_constant=refuse)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UnreadableCall(f"the call is not valid JSON: {error}"[:120]) from error
    except ValueError as error:  # an integer of thousands of digits
        raise UnreadableCall(f"the call holds a value that cannot be read: {error}"[:120]) from error


def _json_calls(text: str) -> list[Call]:
    value = _json(text)
    calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            raise UnreadableCall(f"expected an object with name and arguments, got {json.dumps(item)[:60]}")
        item = item.get("function", item) if isinstance(item.get("function"), dict) else item
        arguments = item.get("arguments", item.get("parameters", {}))
        calls.append(_checked(item.get("name"), _json(arguments) if isinstance(arguments, str) else arguments))
    return calls


def _checked(name: Any, arguments: Any) -> Call:
    if not isinstance(name, str) or not name:
        raise UnreadableCall("the call has no name")
    if not isinstance(arguments, dict):
        raise UnreadableCall(f"the arguments of {name[:60]} are no object")
    return {"name": name, "arguments": arguments}


def _python_calls(text: str) -> list[Call]:
    """Top-level calls of a text that is Python, else of its lines that are."""
    whole = _parsed(text)
    if whole is not None:
        return [call for statement in whole.body for call in _calls_of(statement)]
    calls = []
    for line in QUOTED.sub("", text).splitlines():
        tree = _parsed(line.strip().strip("`"))
        for statement in tree.body if tree is not None else []:
            calls += _calls_of(statement)
    return calls


def _parsed(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd literals in the reply
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return None


def _calls_of(statement: ast.stmt) -> list[Call]:
    if not isinstance(statement, ast.Expr):
        return []
    value = statement.value
    nodes = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
    if not nodes or not all(isinstance(node, ast.Call) for node in nodes):
        return []
    return [_call(node) for node in nodes if isinstance(node, ast.Call)]


def _call(node: ast.Call) -> Call:
    name = ast.unparse(node.func)
    if not re.fullmatch(r"[\w.]+", name):
        raise UnreadableCall(f"{name[:60]} is no function name")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise UnreadableCall(f"the arguments of {name} must be named, as in {name}(argument=value)")
    named = [keyword.arg for keyword in node.keywords]
    if len(set(named)) != len(named):
        raise UnreadableCall(f"{name} gets an argument twice")
    return {"name": name, "arguments": {str(k.arg): _literal(k.value, name) for k in node.keywords}}


def _literal(node: ast.expr, name: str) -> Any:
    for inner in ast.walk(node):
        for field, child in ast.iter_fields(inner):
            if isinstance(child, ast.Name) and child.id in CONSTANTS:
                setattr(inner, field, ast.Constant(CONSTANTS[child.id]))
            elif isinstance(child, list):
                child[:] = [
                    ast.Constant(CONSTANTS[c.id]) if isinstance(c, ast.Name) and c.id in CONSTANTS else c for c in child
                ]
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UnreadableCall(f"an argument of {name} is not a literal value: {ast.unparse(node)[:60]}") from error
    return value
