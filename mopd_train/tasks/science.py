"""Science questions: multiple choice, numbers with units, and short texts such as symbols, formulas and equations."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .answers import (
    LONGEST,
    MINUS,
    NEGATED,
    final_answer,
    marked_answer,
    numbers,
    only_number,
    unwrapped,
    without_thinking,
)
from .units import converted, unit, with_raised_exponents
from .wording import SUBSCRIPTS, plain, same_text

TOLERANCE = 0.01  # relative, where a row has no column `tolerance`
LABELS = "ABCDEFGHIJ"
LABEL = re.compile(r"(?<![\w'])\(?(?!I\s+[a-z])([A-J])\)?(?![\w'+-])")  # "I think C" names C
LEAD = re.compile(r"\(?([A-Ja-j])([).:]+|\s+|$)(?:\s*[-:]\s)?\s*(.*)", re.DOTALL)
NO_ANSWER = {"score": 0.0, "feedback": "The reply has no single final answer."}
BRACKET = re.compile(r"\[[A-Z][^\[\]\s]{0,80}\]")
ENGLISH = re.compile(r"(?<!\S)[A-Z][a-z]?(?=\s+[a-z])")  # "In this case": not indium
STATED = re.compile(r"(.*)\b(?:is|are)\b(.*)", re.DOTALL)
UNSURE = re.compile(r"\b(?:is|are)\b|\b(?:and|or|but)\s*$", re.I)
ARROW = re.compile(
    r"\\(?:x?(?:long)?(?:left)?rightarrow|to|rightleftharpoons)(?![a-z])(?:\{\})?|[<⇌]?[-=]+>|[→⟶➔⇌]|=+", re.I
)
PLUS = re.compile(r"\s+\+\s*|(?<=\S)\+(?=\s*\d{0,4}[A-Z(\[])")  # between species: not the sign of Fe3+
Verdict = dict[str, Any]


def reward(
    prompts: list[Any], completions: list[str], completion_ids: list[list[int]], *, answer: list[Any], **columns: Any
) -> list[Verdict]:
    """1.0 or 0.0 by the row's `kind`: choice, number, text, formula or equation. Without the column, rows with
    `choices` are multiple choice, numeric answers numbers, and others text.

    Other columns read where a row has them: `choices` (texts, or {"text": [...], "label": [...]}), `tolerance`
    (relative), `unit` (of the answer; the reply may leave it out or convert it, a wrong one is wrong).
    """
    verdicts = []
    for index, (completion, gold) in enumerate(zip(completions, answer, strict=True)):
        row = {key: values[index] for key, values in columns.items() if isinstance(values, list)}
        kind = row.get("kind") or _kind(gold, row)
        if kind not in KINDS:
            raise ValueError(f"expected kind in {sorted(KINDS)}, got {kind!r}")
        verdicts.append(KINDS[kind](completion, gold, row))
    return verdicts


def _kind(gold: Any, row: dict[str, Any]) -> str:
    if row.get("choices"):
        return "choice"
    return "number" if _gold_number(gold) is not None else "text"


def _verdict(right: bool, said: str) -> Verdict:
    said = said if len(said) <= 80 else said[:77] + "..."
    return {"score": float(right), "feedback": f"The answer {said} is {'right' if right else 'wrong'}."}


def _said(completion: str) -> str | None:
    """The final answer without LaTeX's type setting and dollars."""
    said = final_answer(completion)
    said = None if said is None else unwrapped(said).replace("\\%", "%").replace("$", "").strip().rstrip(".;,").strip()
    return said or None


def labelled(choices: Any) -> dict[str, str]:
    """label -> text of a row's choices. ValueError for labels other than letters up to J."""
    if not isinstance(choices, dict):
        return {LABELS[i]: str(text) for i, text in enumerate(choices)}
    options = {str(k).strip("() .").upper(): str(v) for k, v in zip(choices["label"], choices["text"], strict=True)}
    if not options.keys() <= set(LABELS) or len(options) != len(choices["text"]):
        raise ValueError(f"expected different labels of choices, each a letter of {LABELS}, got {choices['label']}")
    return options


def choice(completion: str, gold: Any, row: dict[str, Any]) -> Verdict:
    """The answer's label, or its text word for word. Two labels, or a label with another choice's text, are none."""
    options = labelled(row["choices"])
    expected = _label(gold, options)
    said = _said(completion)
    if said is None:
        return NO_ANSWER
    labels = _labels(said, options)
    if len(labels) != 1:
        return NO_ANSWER if labels or len(said) > 200 else _verdict(False, said)
    return _verdict(labels == {expected}, said)


def _label(gold: Any, options: dict[str, str]) -> str:
    """The label of a gold answer: an index, a label, or a choice's text. ValueError if it is none, or of several."""
    if isinstance(gold, int) and not isinstance(gold, bool):
        return list(options)[gold]
    stated = str(gold).strip("() .").upper()
    if stated in options:
        return stated
    for same in (str.__eq__, same_text):
        matching = [label for label, text in options.items() if same(text.strip(), str(gold).strip())]
        if len(matching) > 1:
            raise ValueError(f"gold answer {gold!r} is the text of several choices: {matching} of {options}")
        if matching:
            return matching[0]
    raise ValueError(f"gold answer {gold!r} is neither a label nor a text of the choices {options}")


def _labels(said: str, options: dict[str, str]) -> set[str]:
    """The labels that a statement names, by letter or by text."""
    labels = {match.group(1) for match in LABEL.finditer(said)} & options.keys()
    lead = LEAD.match(said)
    if lead and lead.group(1).upper() in options:
        first, separator, rest = lead.group(1).upper(), lead.group(2), lead.group(3)
        if not rest or same_text(rest, options[first]):  # "C", "(C) Atrophy", also where that text names labels
            return {first}
        if separator.isspace() and lead.group(1) == "A" and rest[0].islower():
            labels.discard("A")  # an article
        elif not separator.isspace():
            labels.add(first)
        labels |= {label for label, text in options.items() if same_text(rest, text)}
    texts = {label for label, text in options.items() if plain(text) == plain(said)}
    if texts:  # case decides where it tells two choices apart
        return {label for label in texts if same_text(said, options[label])} or texts
    unquoted = said
    for label in labels:
        unquoted = re.sub(rf"(?<!\w){re.escape(options[label])}(?!\w)", " ", unquoted, flags=re.IGNORECASE)
    if NEGATED.search(unquoted):
        return set(options)
    whole = f" {plain(said)} "
    for label in list(labels):  # "I think (C) Atrophy": the text of another choice beside it contradicts the label
        labels |= {
            other
            for other, text in options.items()
            if len(plain(text)) > 2 and f" {plain(text)} " in whole and plain(text) not in plain(options[label])
        }
    return labels


def _gold_number(gold: Any) -> tuple[Fraction, str] | None:
    text = with_raised_exponents(str(gold)).strip()
    found = numbers(text)
    short = len(found) == 1 and (len(found[0][1].split()) <= 2 or unit(found[0][1]) is not None)
    return found[0] if short and text[:1] in "+-.0123456789" else None


def number(completion: str, gold: Any, row: dict[str, Any]) -> Verdict:
    """One number within the relative tolerance, in the row's unit or one that converts to it."""
    expected = _gold_number(gold)
    if expected is None:
        raise ValueError(f"gold answer {gold!r} of a numeric question is not one number")
    said = _said(completion)
    found = None if said is None else only_number(with_raised_exponents(said))
    if said is None or found is None:
        return NO_ANSWER
    value = converted(float(found[0]), found[1], with_raised_exponents(str(row.get("unit") or expected[1])))
    if value is None:
        return {"score": 0.0, "feedback": f"The unit of {said[:80]} is wrong."}
    limit = abs(float(expected[0])) * float(row["tolerance"] if row.get("tolerance") is not None else TOLERANCE)
    return _verdict(abs(value - float(expected[0])) <= limit * (1 + 1e-9), said)


def text(completion: str, gold: Any, row: dict[str, Any]) -> Verdict:
    """The same words and signs (or one of a list of accepted answers), alone or after the one "is" of a statement."""
    said = _said(completion)
    if said is None:
        return NO_ANSWER
    forms = [said, said.strip(" \"'[]()*")]
    found = STATED.fullmatch(said) if len(said) < 200 else None
    if found and not NEGATED.search(found.group(1)) and not UNSURE.search(found.group(1)):
        forms.append(found.group(2).strip(" \"'[]()*:"))
    accepted = gold if isinstance(gold, list) else [gold]
    return _verdict(any(same_text(form, str(answer)) for answer in accepted for form in forms), said)


def formula(completion: str, gold: Any, row: dict[str, Any]) -> Verdict:
    """A molecular formula with the same count of every element; order and subscripts' form are free."""
    expected = _atoms(str(gold).strip(" []"))
    if expected is None:
        raise ValueError(f"gold answer {gold!r} is no molecular formula of elements and counts")
    text = without_thinking(completion)
    said = marked_answer(text)
    lines = [line for line in text.splitlines() if BRACKET.search(line)]
    if said is None and lines:  # as the question asks for it; what stands before it are other words
        before, bracket, after = lines[-1].partition(BRACKET.findall(lines[-1])[0])
        said = "" if NEGATED.search(before) else bracket + after
    said = final_answer(completion) if said is None else said
    if not said or len(said) > LONGEST or NEGATED.search(said) or re.search(r"\bor\b", said):
        return NO_ANSWER
    words = re.split(r"[\s\[\]$,;:=()]+", ENGLISH.sub("", re.sub(r"_\s*", "", unwrapped(said))))
    counts = [count for word in words if (count := _atoms(word.strip(".{}*"))) is not None]
    if not counts or any(count != counts[0] for count in counts):
        return NO_ANSWER
    return _verdict(counts[0] == expected, said)


def _atoms(text: str) -> dict[str, int] | None:
    """Element -> count of a formula without brackets; None for anything else."""
    text = re.sub(r"[_{}]", "", text).translate(SUBSCRIPTS)
    if len(text) > 80 or not re.fullmatch(r"(?:[A-Z][a-z]?\d{0,4})+(?:[+-]\d?)?", text):
        return None
    counts: dict[str, int] = {}
    for element, count in re.findall(r"([A-Z][a-z]?)(\d*)", text):
        counts[element] = counts.get(element, 0) + int(count or 1)
    return counts | {"charge": int({"+": 1, "-": -1}.get(text[-1:], 0))}


def equation(completion: str, gold: Any, row: dict[str, Any]) -> Verdict:
    """A balanced equation: the same coefficients for every species of both sides, as in the gold one."""
    accepted = [_sides(str(answer)) for answer in (gold if isinstance(gold, list) else [gold])]
    if None in accepted:
        raise ValueError(f"gold answer {gold!r} is no equation of two sides")
    said = marked_answer(without_thinking(completion))
    said = final_answer(completion) if said is None else said
    lines = [line for line in without_thinking(completion).splitlines() if ARROW.search(line)]
    said = said if said and ARROW.search(said) else (lines[-1] if lines else None)
    if said is None or NEGATED.search(said):
        return NO_ANSWER
    return _verdict(_sides(said) in accepted, said)


def _sides(text: str) -> list[dict[str, int]] | None:
    text = re.sub(r"[$_{}*]", "", ARROW.sub("=", unwrapped(text))).translate(SUBSCRIPTS).strip(" .")
    text = re.sub(r"^.*?:", "", text).strip()
    if text[:1] == "[" and text[-1:] == "]" and not re.search(r"[\[\]]", text[1:-1]):
        text = text[1:-1]
    parts = text.split("=")
    if len(parts) != 2 or len(text) > 300:
        return None
    sides: list[dict[str, int]] = []
    for part in parts:
        species: dict[str, int] = {}
        for term in PLUS.split(part):
            match = re.fullmatch(r"(\d{0,4})(\S+)", re.sub(r"\s", "", term.translate(MINUS)))
            if match is None:
                return None
            species[match.group(2)] = species.get(match.group(2), 0) + int(match.group(1) or 1)
        sides.append(species)
    return sides


KINDS: dict[str, Callable[[str, Any, dict[str, Any]], Verdict]] = {
    "choice": choice,
    "number": number,
    "text": text,
    "formula": formula,
    "equation": equation,
}
