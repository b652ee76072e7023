"""Finding the one final answer of a reply. A reply that lists several answers has none."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 1000  # characters of a final answer; a longer one is no answer
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BOXES = 50  # of a reply that are looked at, from the end
CUE = re.compile(
    r"(?P<denied>(?:\b(?:not|never|wrong|incorrect|false|doubt)|n['’]t)\s{1,3}"
    r"(?:(?!(?:so|thus|hence|therefore)\b)\w{1,20}\s{1,3}){0,3})?"
    r"(?:\b(?:final\s+)?(?:answer|result|solution)\b(?:\s+(?:is|are|be|must be|should be)\b\s*:?|\s*[:=])"
    r"|\b(?:correct|right)\s+(?:option|choice)\s+is\b\s*:?)",
    re.I,
)
LINK = re.compile(r"[=≈≃]|\b(?:is|are|equals|gives|get|be|so|thus|hence|therefore)\b|:(?=\s)", re.I)
REASON = re.compile(r"\.\s|,?\s(?:because|since|as|where)\s")
# What denies: "not 7", "B is wrong", "everything except B".
NEGATED = re.compile(
    r"\b(?:not|never|cannot|neither|nor|wrong|incorrect|false|untrue|except|excluding|unlikely|doubt|instead of|"
    r"rather than|other than|any(?:thing)? but|all but|rul(?:ed|ing) out|least likely|opposite of)\b|n['’]t\b",
    re.I,
)
DENIED_BEFORE = re.compile(r"(?:\b(?:not|never|neither|nor|except)|n['’]t)(?:\s+(?:be|the|equal to)\b)?\W{0,9}$", re.I)
DENIED_AFTER = re.compile(r"\W{0,5}(?:is|are|was)(?:n['’]t|\s+(?:not|wrong|incorrect|false|never))\b", re.I)
# What makes another statement, or another number, of the number beside it.
COMPARED = re.compile(
    r"\b(?:more|less|greater|larger|smaller|fewer|higher|lower|bigger)\b|\bat\s+(?:least|most)\b|\bminimum of\b|"
    r"\b(?:over|under|above|below|beyond|exceed\w*|between|up to|within|minus|plus|negative|negation|or|half|twice|"
    r"double|triple|root|log|ln|reciprocal|inverse)\b",
    re.I,
)
RELATION = re.compile(r"[<>≤≥≠]|\\(?:[lg]t|[lg]eq?|[lg]eqslant|neq?)(?![a-z])")
SCALED = re.compile(
    r"\b(?:dozens?|hundreds?|thousands?|[mbtr]+illions?|squared|cubed|factorial|pi)\b|[!^π√]|\\(?:pi|sqrt)", re.I
)
MARKUP = re.compile(r"(?<![\w)\]}])(?:\*\*|__)|(?:\*\*|__)(?![\w(-])|`")
FORMULA_MARKS = re.compile(r"(?<!\\)\\[()]")
DISPLAY_MARKS = re.compile(r"(?<!\\)\\[\[\]]")
STYLED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathit|mathsf|mbox|operatorname|boldsymbol|bm|ce)\s*"
    r"\{((?:[^{}]|\{[^{}]*\})*)\}"
)
STYLES = re.compile(r"\\(?:displaystyle|textstyle|bfseries|bf|rm|left|right|[bB]igg?[lr]?)(?![A-Za-z])|\\[,;:! ]|~")
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3}){1,20}(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
POWER = re.compile(r"\s*(?:×|x|\*|·|\\times|\\cdot)\s*10\s*(?:\^|\*\*)?\s*\{?\s*([-+]?\d+|[⁻⁺]?[⁰¹²³⁴-⁹]+)\s*\}?")
SUPERSCRIPTS = str.maketrans("⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "-+0123456789")
MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " "})


def without_thinking(text: str) -> str:
    """What follows the last reasoning block, also where the template opened it; nothing if one is left open."""
    rest = text.rsplit("</think>", 1)[-1]
    return "" if "<think>" in rest else rest


def unwrapped(text: str) -> str:
    """LaTeX without what only sets its type: `\\text{Fe}` and `\\mathbf{Fe}` are Fe, `\\displaystyle x` is x."""
    for _ in range(4):  # levels of nesting
        text, found = STYLED.subn(r"\1", text)
        if not found:
            break
    return STYLES.sub(" ", text)


def in_dollars(text: str) -> str:
    """`\\(x\\)`, `\\[x\\]` and `$$x$$` as `$x$`, on one line each."""
    parts = DISPLAY_MARKS.sub("$$", FORMULA_MARKS.sub("$", text)).split("$$")
    return "$".join(part.strip() if i % 2 else part for i, part in enumerate(parts))


def marked_answer(text: str) -> str | None:
    """What the reply marks as its answer: <answer> tags or \\boxed{}, the last line that has any.

    Different boxes on one line are a list of answers and come out as such, joined by commas: they match a gold
    answer that is a list and nothing else. A box that its own sentence denies ("not \\boxed{7}") is empty.
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return in_dollars(text[start + len("<answer>") : end]).strip()
    boxes = [(match.start(), match.end(), _braced(text, match.end())) for match in list(BOX.finditer(text))[-BOXES:]]
    closed = [(start, after, inner) for start, after, inner in boxes if inner is not None]
    if not closed:
        return None
    line = text.rfind("\n", 0, closed[-1][0]) + 1
    same_line, covered = [], -1
    for start, after, inner in closed:
        if start >= line and start > covered:  # a box inside another box is part of it
            same_line.append(inner.strip())
            covered = after + len(inner)
            if DENIED_BEFORE.search(text[max(line, start - 40) : start]) or DENIED_AFTER.match(text, covered + 1):
                return ""
    return ", ".join(dict.fromkeys(in_dollars(_unboxed(inner)) for inner in same_line))


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
        text = in_dollars(text)
        lines = [line.strip() for line in text.translate(MINUS).splitlines() if line.strip()]
        if not lines:
            return None
        cues = list(CUE.finditer(text))
        if cues and cues[-1]["denied"]:  # "the wrong answer is 7", "I do not think the answer is 7"
            return None
        rest = text[cues[-1].end() :].strip().splitlines() if cues else []
        answer = MARKUP.sub("", REASON.split(rest[0])[0] if rest else lines[-1])  # formulas keep their dollars
    answer = answer.strip().rstrip(".;,").strip()
    return answer if 0 < len(answer) <= LONGEST else None


def after_link(text: str) -> str:
    """The part of a statement that tells a number: what follows the last "=", "is" or the like, where one does."""
    links = list(LINK.finditer(text))
    return text[links[-1].end() :] if links and re.search(r"\d", text[links[-1].end() :]) else text


def only_number(text: str) -> tuple[Fraction, str] | None:
    """The number that a phrase states and what follows it (a unit); None if it has none, several, or a bound.

    After "=", "is" and the like only the last part counts: in "carbon-12 has 6" nothing is told apart, in
    "the number of carbon-12 is 6" it is. "Not 6", "more than 6" and "6 million" do not state 6.
    """
    said = after_link(text)
    found = numbers(said)
    if len(found) != 1 or NEGATED.search(text) or COMPARED.search(said) or RELATION.search(said):
        return None
    return None if SCALED.match(found[0][1]) else found[0]


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
