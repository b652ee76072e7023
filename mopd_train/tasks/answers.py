"""Finding the one final answer of a reply. A reply that lists several answers has none."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 1000  # characters of a final answer; a longer one is no answer
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BOXES = 50  # of a reply that are looked at, from the end
CUE = re.compile(
    r"\b(?:final\s+)?(?:answer|result|solution)\b(?:\s+(?:is|are|be|must be|should be)\b\s*:?|\s*[:=])", re.I
)
LINK = re.compile(r"[=≈≃]|\b(?:is|are|equals|gives|get|be|so|thus|hence|therefore)\b|:(?=\s)", re.I)
REASON = re.compile(r"\.\s|\s(?:because|since|as|where)\s")
NEGATED = re.compile(r"\bnot\b|n't\b", re.I)
MARKUP = re.compile(r"(?<!\w)(?:\*\*|__)|(?:\*\*|__)(?!\w)|`|\$\$?|\\[()\[\]]")
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3}){1,20}(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
POWER = re.compile(r"\s*(?:×|x|\*|·|\\times|\\cdot)\s*10\s*(?:\^|\*\*)?\s*\{?\s*([-+]?\d+|[⁻⁺]?[⁰¹²³⁴-⁹]+)\s*\}?")
SUPERSCRIPTS = str.maketrans("⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "-+0123456789")
MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " "})


def without_thinking(text: str) -> str:
    """What follows the last reasoning block, also where the template opened it; nothing if one is left open."""
    rest = text.rsplit("</think>", 1)[-1]
    return "" if "<think>" in rest else rest


def marked_answer(text: str) -> str | None:
    """What the reply marks as its answer: <answer> tags or \\boxed{}, the last line that has any.

    Different boxes on one line are a list of answers and come out as such, joined by commas: they match a gold
    answer that is a list and nothing else.
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    boxes = [(match.start(), _braced(text, match.end())) for match in list(BOX.finditer(text))[-BOXES:]]
    closed = [(start, inner) for start, inner in boxes if inner is not None]
    if not closed:
        return None
    last_end = closed[-1][0]
    line = text.rfind("\n", 0, last_end) + 1
    same_line, covered = [], -1
    for start, inner in closed:
        if start >= line and start > covered:  # a box inside another box is part of it
            same_line.append(inner.strip())
            covered = start + len(inner)
    distinct = list(dict.fromkeys(_unboxed(inner) for inner in same_line))
    return ", ".join(distinct)


def _unboxed(inner: str) -> str:
    match = BOX.match(inner)
    if match and _braced(inner, match.end()) == inner[match.end() : -1]:
        return _unboxed(inner[match.end() : -1].strip())
    return inner


def _braced(text: str, start: int) -> str | None:
    """Text up to the brace that closes the one opened before `start`; None if it is never closed or too far."""
    depth = 1
    for position in range(start, min(len(text), start + LONGEST)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def final_answer(reply: str) -> str | None:
    """The stated answer: marked, else what follows the last "the answer is", else the last line. None: no answer."""
    text = without_thinking(reply)
    answer = marked_answer(text)
    if answer is None:
        lines = [line.strip() for line in text.translate(MINUS).splitlines() if line.strip()]
        if not lines:
            return None
        cues = list(CUE.finditer(text))
        rest = text[cues[-1].end() :].strip().splitlines() if cues else []
        answer = REASON.split(rest[0])[0] if rest else lines[-1]
        answer = MARKUP.sub("", answer) if "\\" not in answer else answer
    answer = answer.strip().rstrip(".;,").strip()
    return answer if 0 < len(answer) <= LONGEST else None


def only_number(text: str) -> tuple[Fraction, str] | None:
    """The number of a phrase and what follows it (a unit); None if it has none or several.

    After "=", "is" and the like only the last part counts: in "carbon-12 has 6" nothing is told apart, in
    "the number of carbon-12 is 6" it is.
    """
    links = list(LINK.finditer(text))
    if links and NUMBER.search(text, links[-1].end()):
        text = text[links[-1].end() :]
    found = numbers(text)
    return found[0] if len(found) == 1 and not NEGATED.search(text) else None


def numbers(text: str) -> list[tuple[Fraction, str]]:
    """Every number of the text, powers of ten read, with the text that follows it up to the next number."""
    text = text.translate(MINUS)
    found: list[tuple[Fraction, int, int]] = []
    position = 0
    while match := NUMBER.search(text, position):
        power = POWER.match(text, match.end())
        exponent = power.group(1).translate(SUPERSCRIPTS) if power else "0"
        position = power.end() if power else match.end()
        value = fraction(match.group().replace(",", ""), exponent)
        if value is None:
            return []
        found.append((value, match.start(), position))
    if not found:
        return []
    ends = [start for _, start, _ in found[1:]] + [len(text)]
    return [(value, text[end:after].strip()) for (value, _, end), after in zip(found, ends, strict=True)]


def fraction(literal: str, exponent: str = "0") -> Fraction | None:
    """Exact value of a decimal literal; None beyond 400 digits or powers, which would only cost time."""
    mantissa, _, power = literal.lower().partition("e")
    if len(mantissa) > 400 or len(power) > 4 or len(exponent) > 4:
        return None
    total = int(power or 0) + int(exponent)
    return Fraction(mantissa) * Fraction(10) ** total if abs(total) <= 400 else None
