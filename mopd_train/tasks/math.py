"""Mathematics: the final answer of a completion against the gold answer.

What counts as an answer is decided here, equality of expressions by math-verify. math-verify alone compares values,
and so accepts `15 + 19` for 34, the question for its answer and the last of several answers:

- gold a number: the answer must be written as one: an integer, a decimal, a fraction in lowest terms, a percentage,
  with or without a unit. `15 + 19`, `68/2`, `2^{10}` and `\\binom{10}{5}` are not worked out.
- gold yes or no: the answer begins with it, and denies or takes back nothing; other words: the same words.
- gold an expression, a set or a list: equal by math-verify, unless the answer only restates a part of the question.
- several different answers are a list, and match a list only.
- what denies or bounds ("not 5", "at most 5") is not the answer that it names.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .answers import (
    COMPARED,
    LINK,
    MINUS,
    NEGATED,
    RELATION,
    SCALED,
    after_link,
    final_answer,
    fraction,
    marked_answer,
    numbers,
    only_number,
    unwrapped,
    without_thinking,
)
from .workers import workers

SECONDS = 5.0  # of processor time for one symbolic comparison; sympy may take for ever
INSTRUCTION = "\n\nPut your final answer within \\boxed{}."
MATH = re.compile(r"\$([^$]+)\$")
UNIT_TEXT = re.compile(r"\\(?:text|textrm|mathrm|textbf|mbox)\s*\{([^{}\d]*)\}\s*(?:\^\s*\{?[23]\}?)?[\s/·.]*")
VARIABLES = frozenset("abdeijknpqrtuvwxyz")  # a single one of these in \mathrm is no unit: 5\mathrm{i}, 2\mathrm{e}
UNIT = re.compile(r"\^\s*\{?\\circ\}?|°|\\[,!;: ]|\\\$|\$")
ASSIGNED = re.compile(r"^\s*\\?[A-Za-z]\w{0,5}\s*=\s*")
FRACTION = re.compile(r"([-+]?)\s*(?:\\[dt]?frac\s*\{?\s*([-+]?\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?|(\d+)\s*/\s*(\d+))")
MIXED = re.compile(r"([-+]?)\s*(\d+)\s*(\\[dt]?frac\s*\{\d+\}\s*\{\d+\}|\s\d+\s*/\s*\d+)")
DECIMAL = re.compile(r"[-+]?(?:\d{1,3}(?:(?:,|\{,\})\d{3})+|\d+)?(?:\.\d+)?")
WORDS = re.compile(r"[A-Za-z]{2}[A-Za-z' -]*")
YES_OR_NO = re.compile(
    r"(?:(?:so|thus|hence|therefore|then)\b[\s,:]*)?(yes|no)\b(?=\s*(?:[^\w\s]|$)|\s+(?:it|they|this|that)\b)"
)
OPERATOR = re.compile(
    r"[\\^*/+√π!_]|[A-Za-z0-9)]\s*-\s*[A-Za-z0-9(]|\d[a-zA-Z(]|[a-zA-Z)]\d|(?<![A-Za-z])(?:pi|sqrt)\b"
)
VERDICTS = {
    "right": (1.0, "The answer is right."),
    "wrong": (0.0, "The answer {} is wrong."),
    "none": (0.0, "The reply has no single final answer."),
    "unevaluated": (0.0, "The answer {} is not worked out to a number in lowest terms."),
    "restated": (0.0, "The answer {} only repeats the question."),
    "unreadable": (0.0, "The answer {} cannot be read as mathematics."),
}


def reward(
    prompts: list[Any], completions: list[str], completion_ids: list[list[int]], *, answer: list[Any], **_: Any
) -> list[dict[str, Any]]:
    """1.0 where the final answer equals `answer` (or one of them, where it is a list of equivalent forms), else 0.0.

    ValueError for a gold answer that cannot be read.
    """
    verdicts: list[dict[str, Any] | None] = []
    symbolic: list[tuple[int, list[str]]] = []
    for index, (prompt, completion, gold) in enumerate(zip(prompts, completions, answer, strict=True)):
        forms = [str(form) for form in gold] if isinstance(gold, list) else [str(gold)]
        kind, said = _judge_plain(completion, forms)
        if kind == "symbolic" and _restates(said, forms, prompt):
            kind = "restated"
        if kind == "symbolic":
            symbolic.append((index, [*forms, said]))
        verdicts.append(None if kind == "symbolic" else _verdict(kind, said))
    results = workers(f"{__name__}:judge_symbolic", SECONDS).map([item for _, item in symbolic])
    for (index, item), result in zip(symbolic, results, strict=True):
        if "error" in result:
            raise ValueError(f"math verifier on gold answer {item[:-1]} and answer {item[-1]!r}: {result['error']}")
        verdicts[index] = _verdict(result.get("value", "unreadable"), item[-1])
    return [verdict for verdict in verdicts if verdict is not None]


def _verdict(kind: str, said: str) -> dict[str, Any]:
    score, feedback = VERDICTS[kind]
    return {"score": score, "feedback": feedback.format(said if len(said) <= 80 else said[:77] + "...")}


def _judge_plain(completion: str, forms: list[str]) -> tuple[str, str]:
    """Verdict and stated answer by exact comparison; "symbolic" where math-verify has to decide."""
    golds = [literal(form) for form in forms]
    marked = marked_answer(without_thinking(completion))
    said = final_answer(completion)
    if said is None:
        return "none", ""
    words = all(WORDS.fullmatch(unwrapped(form).strip(" .")) for form in forms)
    if not words and _denies(said, forms):
        return "none", said
    if any(gold is not None for gold in golds):
        found = literal(said)
        if found is None and marked is None:
            found = _number_in_prose(said)
        if found is None:
            return ("unevaluated" if OPERATOR.search(said) else "none" if numbers(said) else "wrong"), said
        return ("right" if any(gold is not None and _equal(gold, found) for gold in golds) else "wrong"), said
    if words:
        return ("right" if any(_same_words(said, form) for form in forms) else "wrong"), said
    if marked is None:
        spans = MATH.findall(said)
        said = spans[-1] if spans else said
    return "symbolic", said


def _denies(said: str, forms: list[str]) -> bool:
    """Whether an answer negates what it names, or says in words that it is a bound, as no gold form does."""
    plain, golds = unwrapped(said), unwrapped(" ".join(forms))
    denied = NEGATED.search(plain) and not NEGATED.search(golds)
    stated = set(COMPARED.findall(LINK.split(plain)[-1].lower())) - {"or"}  # "x = 1 or x = 2" is a list
    return bool(denied or (stated and not COMPARED.search(golds)))


class Literal(tuple[Fraction, bool, int]):
    """Value, whether a percent sign follows, decimals written."""


@lru_cache(maxsize=4096)
def literal(text: str) -> Literal | None:
    """A number written as one: `1{,}234`, `-0.5`, `\\frac{3}{4}`, `2\\frac{1}{2}`, `50\\%`, `x = 7`, `7\\text{ cm}`;
    else None. A fraction that is not in lowest terms is an unfinished division."""
    text = unwrapped(UNIT.sub("", _without_unit(text.translate(MINUS))))
    text = text.replace("dfrac", "frac").strip().rstrip(".")
    text = ASSIGNED.sub("", text).strip()
    percent = text.endswith("%")
    text = text.rstrip("\\%").strip()
    mixed = MIXED.fullmatch(text)
    match = FRACTION.fullmatch(mixed.group(3).strip() if mixed else text)
    if match:
        sign, top, bottom = match.group(1), match.group(2) or match.group(4), match.group(3) or match.group(5)
        if len(top) + len(bottom) > 400 or int(bottom) == 0:
            return None
        value = Fraction(int(top), int(bottom))
        reduced = (abs(value.numerator), value.denominator) == (abs(int(top)), int(bottom)) and value.denominator > 1
        if mixed:
            sign, reduced = mixed.group(1), reduced and value < 1 and len(mixed.group(2)) <= 400
            value += int(mixed.group(2)) if reduced else 0
        return Literal((-value if sign == "-" else value, percent, 0)) if reduced else None
    if not DECIMAL.fullmatch(text) or not any(c.isdigit() for c in text):
        found = numbers(text) if re.search(r"10\s*\^|[eE][-+]?\d", text) else []
        powers = len(found) == 1 and not found[0][1]  # scientific notation
        return Literal((found[0][0], percent, 0)) if powers and text[:1] in "+-.0123456789" else None
    plain = fraction(text.replace("{,}", "").replace(",", ""))
    return None if plain is None else Literal((plain, percent, len(text.partition(".")[2])))


def _without_unit(text: str) -> str:
    """Without the `\\text{ cm}` that ends it, unless that is no unit: `\\text{ or more}`, `\\text{ million}`."""
    units = list(UNIT_TEXT.finditer(text))
    start = end = len(text.rstrip(" .$"))
    while units and units[-1].end() >= start:
        said = units.pop()
        start = said.start()
        word = said.group(1).strip(" .,")
        if word in VARIABLES or any(found.search(word) for found in (NEGATED, COMPARED, SCALED)):
            return text
    return text[:start] + text[end:] if start else text


def _number_in_prose(said: str) -> Literal | None:
    """The only number of a phrase, unless it is part of an expression or a bound."""
    stated = after_link(said)
    match = FRACTION.search(stated)
    if match and len(numbers(stated)) == 2:
        apart = stated[: match.start()] + stated[match.end() :]
        return None if any(found.search(apart) for found in (COMPARED, RELATION, SCALED)) else literal(match.group())
    found = only_number(said)
    if found is None or OPERATOR.search(stated):
        return literal(stated)
    return Literal((found[0], found[1].startswith(("%", "\\%", "percent")), 0))


def _equal(gold: Literal, found: Literal) -> bool:
    """Exactly, or rounded right to six or more decimals; 50% is 0.5, and 50 where a percentage is asked for."""
    (expected, gold_percent, _), (value, percent, decimals) = gold, found
    if gold_percent == percent:
        pairs = [(expected, value)]
    else:
        pairs = [(expected, value), (expected / 100 if gold_percent else expected, value / 100 if percent else value)]
    return any(a == b or (decimals >= 6 and abs(a - b) <= Fraction(1, 2 * 10**decimals)) for a, b in pairs)


def _same_words(said: str, gold: str) -> bool:
    said, gold = (unwrapped(text).replace("$", "").lower().strip(" .") for text in (said, gold))
    if gold in ("yes", "no"):
        begins, words = YES_OR_NO.match(said), re.findall(r"[a-z]+", said)
        once = begins is not None and begins.group(1) == gold and words.count("yes") + words.count("no") == 1
        return once and not (gold == "yes" and NEGATED.search(said))
    return re.findall(r"[^\W_]+|[^\w\s.,;'\"]", said) == re.findall(r"[^\W_]+|[^\w\s.,;'\"]", gold)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+|\\left|\\right|[${}]|\\[,;!]", "", text).replace("\\cdot", "*").replace("\\times", "*")


def _restates(said: str, forms: list[str], prompt: Any) -> bool:
    """Whether an expression stands in the question and is not how the gold answer is written."""
    answer = _squeezed(said)
    if not OPERATOR.search(said) or answer in [_squeezed(form) for form in forms]:
        return False
    question = prompt if isinstance(prompt, str) else " ".join(str(m.get("content", "")) for m in prompt or [])
    return answer in _squeezed(question)


def judge_symbolic(item: list[str]) -> str:
    """In a worker: the last string against the forms before it. No timeouts of math-verify's own: the worker is
    ended from outside, and theirs do not stop compiled code."""
    import logging

    logging.disable(logging.WARNING)
    from math_verify import parse, verify

    *forms, said = item
    found = parse(f"\\boxed{{{said}}}", parsing_timeout=None)
    for form in forms:
        expected = parse(f"\\boxed{{{form}}}", parsing_timeout=None)
        if not expected:
            raise ValueError("the gold answer cannot be parsed as mathematics")
        if _squeezed(form) == _squeezed(said) or (found and verify(expected, found, timeout_seconds=None)):
            return "right"
    return "wrong" if found else "unreadable"
