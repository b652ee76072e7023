"""Science questions: multiple choice, numbers with units, and short texts such as symbols, formulas and equations."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .answers import LONGEST, MINUS, NEGATED, final_answer, marked_answer, numbers, only_number, without_thinking

TOLERANCE = 0.01  # relative, where a row has no column `tolerance`
LABEL = re.compile(r"(?<![\w'])\(?([A-J])\)?(?![\w'+-])")
LEAD = re.compile(r"\(?([A-Ja-j])([).:]+|\s+|$)\s*[-:]?\s*(.*)", re.DOTALL)
PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "c": 1e-2, "m": 1e-3, "µ": 1e-6, "u": 1e-6, "n": 1e-9, "p": 1e-12}
UNITS = {  # name -> (dimension, value in its base unit); prefixed ones are derived
    "m": ("length", 1.0), "Å": ("length", 1e-10), "g": ("mass", 1.0), "s": ("time", 1.0), "min": ("time", 60.0),
    "h": ("time", 3600.0), "J": ("energy", 1.0), "eV": ("energy", 1.602176634e-19), "W": ("power", 1.0),
    "Pa": ("pressure", 1.0), "bar": ("pressure", 1e5), "atm": ("pressure", 101325.0), "Hz": ("frequency", 1.0),
    "V": ("voltage", 1.0), "A": ("current", 1.0), "C": ("charge", 1.0), "N": ("force", 1.0), "mol": ("amount", 1.0),
    "L": ("volume", 1.0), "K": ("temperature", 1.0), "°C": ("celsius", 1.0), "M": ("molarity", 1.0),
    "u": ("atomic mass", 1.0), "Da": ("atomic mass", 1.0), "amu": ("atomic mass", 1.0), "g/mol": ("atomic mass", 1.0),
    "J/mol": ("molar energy", 1.0), "g/cm3": ("density", 1.0), "kg/m3": ("density", 1e-3), "%": ("percent", 1.0),
}  # fmt: skip
SPELLED = {
    "kelvin": "K", "kelvins": "K", "meters": "m", "meter": "m", "metres": "m", "picometers": "pm", "nanometers": "nm",
    "grams": "g", "gram": "g", "seconds": "s", "joules": "J", "degrees celsius": "°C", "celsius": "°C", "moles": "mol",
    "electronvolts": "eV", "ev": "eV", "g/cm^3": "g/cm3", "g/cm³": "g/cm3", "percent": "%", "liters": "L", "k": "K",
    "angstrom": "Å", "kj mol^-1": "kJ/mol", "g mol^-1": "g/mol", "°c": "°C", "daltons": "Da",
}  # fmt: skip
NO_ANSWER = {"score": 0.0, "feedback": "The reply has no single final answer."}
BRACKET = re.compile(r"\[[A-Z][^\[\]\s]{0,80}\]")
MOLECULE = re.compile(r"[A-Z][A-Za-z0-9{}₀-₉+-]{0,80}")
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


def labelled(choices: Any) -> dict[str, str]:
    """label -> text of a row's choices."""
    if isinstance(choices, dict):
        return {str(k): str(v) for k, v in zip(choices["label"], choices["text"], strict=True)}
    return {chr(ord("A") + i): str(text) for i, text in enumerate(choices)}


def choice(completion: str, gold: Any, row: dict[str, Any]) -> Verdict:
    """The answer's label, or its text word for word. Two labels, or a label with another choice's text, are none."""
    options = labelled(row["choices"])
    expected = str(gold).strip("() .")
    if isinstance(gold, int) and not isinstance(gold, bool):
        expected = list(options)[gold]
    if expected not in options:
        matching = [label for label, text in options.items() if _plain(text) == _plain(str(gold))]
        if not matching:
            raise ValueError(f"gold answer {gold!r} is neither a label nor a text of the choices {options}")
        expected = matching[0]
    said = final_answer(completion)
    if said is None:
        return NO_ANSWER
    said = re.sub(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", said)
    labels = _labels(said, options)
    if len(labels) != 1:
        return NO_ANSWER if labels or len(said) > 200 else _verdict(False, said)
    return _verdict(labels == {expected}, said)


def _labels(said: str, options: dict[str, str]) -> set[str]:
    """The labels that a statement names, by letter or by text."""
    labels = {match.group(1) for match in LABEL.finditer(said)} & options.keys()
    lead = LEAD.match(said)
    if lead and lead.group(1).upper() in options:
        first, separator, rest = lead.group(1).upper(), lead.group(2), lead.group(3)
        if not rest or _plain(rest) == _plain(options[first]):  # "C", "(C) Atrophy", also where that text names labels
            return {first}
        if separator.isspace() and lead.group(1) == "A" and rest[0].islower():
            labels.discard("A")  # an article
        elif not separator.isspace():
            labels.add(first)
    texts = {label for label, text in options.items() if _plain(text) == _plain(said)}
    if texts:
        return texts
    if NEGATED.search(said):
        return set(options)
    for label in list(labels):  # "I think (C) Atrophy": the text of another choice beside it contradicts the label
        labels |= {
            other
            for other, text in options.items()
            if len(_plain(text)) > 2
            and f" {_plain(text)} " in f" {_plain(said)} "
            and _plain(text) not in _plain(options[label])
        }
    return labels


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+|[-+]", text.lower()))


def _gold_number(gold: Any) -> tuple[Fraction, str] | None:
    found = numbers(str(gold))
    starts = str(gold).translate(MINUS).strip()[:1] in "+-.0123456789"
    return found[0] if len(found) == 1 and starts and len(found[0][1].split()) <= 2 else None


def number(completion: str, gold: Any, row: dict[str, Any]) -> Verdict:
    """One number within the relative tolerance, in the row's unit or one that converts to it."""
    expected = _gold_number(gold)
    if expected is None:
        raise ValueError(f"gold answer {gold!r} of a numeric question is not one number")
    said = final_answer(completion)
    if said is None:
        return NO_ANSWER
    said = re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}", r" \1", said).replace("\\,", " ").replace("\\%", "%")
    found = only_number(said)
    if found is None:
        return NO_ANSWER
    value, unit = _in_unit(float(found[0]), found[1], str(row.get("unit") or expected[1]))
    if not unit:
        return {"score": 0.0, "feedback": f"The unit of {said[:80]} is wrong."}
    limit = abs(float(expected[0])) * float(row["tolerance"] if row.get("tolerance") is not None else TOLERANCE)
    return _verdict(abs(value - float(expected[0])) <= limit * (1 + 1e-9), said)


def _in_unit(value: float, said: str, wanted: str) -> tuple[float, bool]:
    """The value in the wanted unit, and whether its own unit allows that. Words that are no unit do not count."""
    own, goal = _unit(said), _unit(wanted)
    if own is None:
        return value, not (goal is None and re.match(r"\s*[*/^+]", said))
    if goal is None or own == goal:
        return value, goal is not None or not wanted
    if {own[0], goal[0]} == {"celsius", "temperature"}:
        return value + (273.15 if own[0] == "celsius" else -273.15), True
    return value * own[1] / goal[1], own[0] == goal[0]


def _unit(text: str) -> tuple[str, float] | None:
    """Dimension and size of the unit at the start of a text."""
    text = text.strip(" .,;:()*$")
    words = text.split()
    for candidate in (" ".join(words[:2]), words[0] if words else ""):
        name = SPELLED.get(candidate.lower(), candidate)
        if name in UNITS:
            return UNITS[name]
        if name[:1] in PREFIXES and name[1:] in UNITS and UNITS[name[1:]][0] not in ("celsius", "percent"):
            dimension, size = UNITS[name[1:]]
            return dimension, size * PREFIXES[name[:1]]
    return None


def text(completion: str, gold: Any, row: dict[str, Any]) -> Verdict:
    """The same words (or one of a list of accepted answers), case aside unless case is all that tells two apart."""
    said = final_answer(completion)
    if said is None:
        return NO_ANSWER
    accepted = gold if isinstance(gold, list) else [gold]
    stated = re.split(r"\b(?:is|are)\b(?!.*\b(?:is|are)\b)", said)[-1] if len(said) < 200 else said
    same = any(_same_text(form, str(answer)) for answer in accepted for form in (said, stated))
    return _verdict(same, said)


def _same_text(said: str, gold: str) -> bool:
    said, gold = said.strip(" \"'[]()*"), gold.strip(" \"'[]()*")
    if len(gold) <= 2:  # chemical symbols: Co is not CO
        return said == gold
    return _plain(said) == _plain(gold)


def formula(completion: str, gold: Any, row: dict[str, Any]) -> Verdict:
    """A molecular formula with the same count of every element; order and subscripts' form are free."""
    text = without_thinking(completion)
    bracketed = [line[match.start() :] for line in text.splitlines() if (match := BRACKET.search(line))]
    said = marked_answer(text) or (bracketed[-1] if bracketed else final_answer(completion))
    if said is None or len(said) > LONGEST:
        return NO_ANSWER
    stated = {
        token
        for token in re.split(r"[\s\[\]$,;:=()]+", said.replace("_", ""))
        if MOLECULE.fullmatch(token.strip(".{}*"))
    }
    counts = [_atoms(token.strip(".*")) for token in stated]
    if len(stated) != 1 or counts == [None]:
        return NO_ANSWER
    return _verdict(counts[0] == _atoms(str(gold).strip(" []")), said)


def _atoms(text: str) -> dict[str, int] | None:
    """Element -> count of a formula without brackets; None for anything else."""
    text = re.sub(r"[_{}]", "", text).translate(str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
    if len(text) > 80 or not re.fullmatch(r"(?:[A-Z][a-z]?\d{0,4})+(?:[+-]\d?)?", text):
        return None
    counts: dict[str, int] = {}
    for element, count in re.findall(r"([A-Z][a-z]?)(\d*)", text):
        counts[element] = counts.get(element, 0) + int(count or 1)
    return counts | {"charge": int({"+": 1, "-": -1}.get(text[-1:], 0))}


def equation(completion: str, gold: Any, row: dict[str, Any]) -> Verdict:
    """A balanced equation: the same coefficients for every species of both sides, as in the gold one."""
    said = marked_answer(without_thinking(completion)) or final_answer(completion)
    lines = [line for line in without_thinking(completion).splitlines() if re.search(r"=|→|->", line)]
    said = said if said and re.search(r"=|→|->", said) else (lines[-1] if lines else None)
    if said is None:
        return NO_ANSWER
    accepted = gold if isinstance(gold, list) else [gold]
    return _verdict(any(_sides(said) is not None and _sides(said) == _sides(str(answer)) for answer in accepted), said)


def _sides(text: str) -> list[dict[str, int]] | None:
    text = re.sub(r"[\s$_{}*]|\\(?:text|mathrm|ce)", "", text.replace("\\rightarrow", "=")).strip(".")
    text = text.translate(str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
    text = re.sub(r"^.*?:", "", text)
    parts = re.split(r"=+>?|→|-+>", text)
    if len(parts) != 2 or len(text) > 300:
        return None
    sides: list[dict[str, int]] = []
    for part in parts:
        species: dict[str, int] = {}
        for term in part.split("+"):
            match = re.fullmatch(r"(\d{0,4})(.+)", term)
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
