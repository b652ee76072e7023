"""Short texts compared by their words and signs: `ΔG > 0` is not `ΔG < 0`, 1.5 not `1 5`, CO2 not Co2."""

from __future__ import annotations

import re

from .answers import MINUS, SUPERSCRIPTS

SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
COMMANDS = {
    "le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "ne": "≠", "neq": "≠", "lt": "<",
    "gt": ">", "times": "×", "cdot": "·", "pm": "±", "approx": "≈", "to": "→", "rightarrow": "→", "infty": "∞",
    "circ": "°",
}  # fmt: skip
REWRITTEN = (
    (re.compile(r"\\([A-Za-z]+)"), lambda match: COMMANDS.get(match.group(1), f" {match.group(1)} ")),
    (re.compile(r"_\s?\{?([^\W_]{1,20})\}?"), r"\1"),  # CO_2
    (re.compile(r"[⁻⁺]?[⁰¹²³⁴-⁹]+"), lambda match: "^" + match.group().translate(SUPERSCRIPTS)),
    (re.compile(r"\^\s?\{?\s?°\s?\}?"), "°"),
    (re.compile(r"<="), "≤"),
    (re.compile(r">="), "≥"),
    (re.compile(r"!="), "≠"),
    (re.compile(r"-+>"), "→"),
    (re.compile(r"[‘’]"), "'"),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
)
TOKEN = re.compile(r"[^\W_]+(?:\.\d+[^\W_]*)*|\.\d+|(?<=\d):(?=\d)|(?<=[\d)])!|[^\w\s.,;:!?\"`“”{}$\\]")


def tokens(text: str) -> list[str]:
    """Words, decimals and signs. Blanks, quotation marks, dollars and the marks that end a clause do not count."""
    text = text.translate(MINUS).translate(SUBSCRIPTS)
    for pattern, sign in REWRITTEN:
        text = pattern.sub(sign, text)
    return TOKEN.findall(text.strip(" '"))


def plain(text: str) -> str:
    return " ".join(tokens(text)).casefold()


def same_text(said: str, gold: str) -> bool:
    """The same tokens. Case counts where it tells things apart: in symbols of one or two letters, and in words with
    capitals inside, as formulas and units have them."""
    one, other = tokens(said), tokens(gold)
    alone = len(other) == 1 and len(other[0]) <= 2
    return len(one) == len(other) and all(
        a == b or (a.casefold() == b.casefold() and not alone and not (_cased(a) or _cased(b)))
        for a, b in zip(one, other, strict=True)
    )


def _cased(word: str) -> bool:
    capital_inside = any(letter.isupper() for letter in word[1:])
    return capital_inside and (len(word) == 2 or not (word.isalpha() and word.isupper()))
