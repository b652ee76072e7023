"""Units of numeric answers: read from text, compared by dimension, converted. A word that is no unit is a wrong one."""

from __future__ import annotations

import re
from typing import NamedTuple

from .answers import MINUS, SUPERSCRIPTS

PREFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "c": 1e-2, "m": 1e-3, "µ": 1e-6, "u": 1e-6, "n": 1e-9, "p": 1e-12}
PREFIX_WORDS = {"kilo": 1e3, "mega": 1e6, "giga": 1e9, "centi": 1e-2, "milli": 1e-3, "micro": 1e-6, "nano": 1e-9,
                "pico": 1e-12}  # fmt: skip
UNITS = {  # name -> (size, in which base units); prefixed ones are derived. An atomic mass unit is a gram per mole.
    "m": (1.0, "m"), "Å": (1e-10, "m"), "g": (1e-3, "kg"), "s": (1.0, "s"), "min": (60.0, "s"), "h": (3600.0, "s"),
    "A": (1.0, "A"), "K": (1.0, "K"), "°C": (1.0, "°C"), "mol": (1.0, "mol"), "%": (1.0, "%"), "°": (1.0, "°"),
    "L": (1e-3, "m3"), "M": (1e3, "mol m-3"), "u": (1e-3, "kg mol-1"), "Da": (1e-3, "kg mol-1"),
    "amu": (1e-3, "kg mol-1"), "J": (1.0, "kg m2 s-2"), "eV": (1.602176634e-19, "kg m2 s-2"),
    "cal": (4.184, "kg m2 s-2"), "W": (1.0, "kg m2 s-3"), "N": (1.0, "kg m s-2"), "Pa": (1.0, "kg m-1 s-2"),
    "bar": (1e5, "kg m-1 s-2"), "atm": (101325.0, "kg m-1 s-2"), "Hz": (1.0, "s-1"), "C": (1.0, "A s"),
    "V": (1.0, "kg m2 s-3 A-1"), "Ω": (1.0, "kg m2 s-3 A-2"), "F": (1.0, "kg-1 m-2 s4 A2"), "T": (1.0, "kg s-2 A-1"),
}  # fmt: skip
SPELLED = {  # in the singular
    "meter": "m", "metre": "m", "angstrom": "Å", "gram": "g", "second": "s", "sec": "s", "minute": "min", "hour": "h",
    "hr": "h", "ampere": "A", "amp": "A", "kelvin": "K", "k": "K", "°c": "°C", "celsius": "°C", "mole": "mol",
    "percent": "%", "degree": "°", "liter": "L", "litre": "L", "l": "L", "molar": "M", "dalton": "Da", "joule": "J",
    "electronvolt": "eV", "ev": "eV", "calorie": "cal", "watt": "W", "newton": "N", "pascal": "Pa", "atmosphere": "atm",
    "hertz": "Hz", "coulomb": "C", "volt": "V", "ohm": "Ω", "farad": "F", "tesla": "T",
}  # fmt: skip
FACTOR = re.compile(r"([A-Za-zµΩÅ]+|°[A-Za-z]?|%)([⁻⁺]?[⁰¹²³⁴-⁹]{1,2}|-?\d(?!\d))?")
JOINED = re.compile(r"\s*([/·*])\s*\(?|\.(?=[A-Za-z])|\s+")
RAISED = re.compile(r"(?<=[A-Za-z°µΩ)])\s?\^\s*[({]?\s*([-+]?\d{1,2})(?!\d)(?:\s*[)}])?")
RAISED_BARE = re.compile(r"(?<![A-Za-z])((?:[kcmnµ]?[msgLJK]|mol|min))(-\d)(?!\w)")  # 5 m s-1
RAISE = str.maketrans({number: raised for raised, number in ((chr(k), chr(v)) for k, v in SUPERSCRIPTS.items())})
REWRITTEN = (
    (re.compile(r"\^\s*\{?\s*(?:\\circ|°)\s*\}?\s*|\\degree\b\s*"), "°"),
    (re.compile(r"\\mu\s*|μ"), "µ"),
    (re.compile(r"\\Omega\s*|\u2126"), "Ω"),
    (re.compile(r"\bdegrees? celsius\b|°\s+C\b", re.I), "°C"),
    (re.compile(r"\b(?:square|squared) (\w{1,20})", re.I), r"\1²"),
    (re.compile(r"\bcubic (\w{1,20})", re.I), r"\1³"),
    (re.compile(r"(\w{1,20}) squared\b", re.I), r"\1²"),
    (re.compile(r"\bper\b", re.I), "/"),
)
NO_UNIT = re.compile(r"[*/^+!\\]|[A-Za-zα-ω](?![A-Za-z])")  # goes on as an expression: 5 * y, 5x
Dimensions = tuple[tuple[str, int], ...]


class Unit(NamedTuple):
    size: float  # in base units
    dimensions: Dimensions


def with_raised_exponents(text: str) -> str:
    """m/s^2, m/s^{2} and m s-2 as m/s², m s⁻²: no number stands in a unit any more. Words such as "per" are signs."""
    text = text.translate(MINUS)
    for pattern, sign in REWRITTEN:
        text = pattern.sub(sign, text)
    text = RAISED.sub(lambda match: match.group(1).translate(RAISE), text)
    return RAISED_BARE.sub(lambda match: match.group(1) + match.group(2).translate(RAISE), text)


def unit(text: str) -> Unit | None:
    """The unit at the start of a text with raised exponents. What follows a slash divides: J/mol·K is J/(mol·K)."""
    text = text.strip(" .,;:()[]*$")
    size, powers = 1.0, dict[str, int]()
    position, sign, explicit = 0, 1, True
    while True:
        factor = FACTOR.match(text, position)
        known = _known(factor.group(1)) if factor else None
        if factor is None or known is None:
            return None if explicit else Unit(size, tuple(sorted((k, v) for k, v in powers.items() if v)))
        power = sign * int((factor.group(2) or "1").translate(SUPERSCRIPTS))
        size *= known[0] ** power
        for name, exponent in re.findall(r"([^\s\d-]+)(-?\d+)?", known[1]):
            powers[name] = powers.get(name, 0) + int(exponent or 1) * power
        joined = JOINED.match(text, factor.end())
        if joined is None:  # letters or digits glued to it are no part of a unit
            explicit = text[factor.end() : factor.end() + 1].isalnum()
            position = len(text)
            continue
        sign = -1 if joined.group(1) == "/" else sign
        position, explicit = joined.end(), joined.group(1) is not None or joined.group() == "."


def _known(name: str) -> tuple[float, str] | None:
    word = name.lower()
    for spelled in (name, SPELLED.get(word, ""), SPELLED.get(word.removesuffix("s"), "")):
        if spelled in UNITS:
            return UNITS[spelled]
    if name[:1] in PREFIXES and name[1:] in UNITS and name[1:] not in ("°C", "%", "°", "min", "h", "u"):
        size, base = UNITS[name[1:]]
        return size * PREFIXES[name[:1]], base
    for prefix, factor in PREFIX_WORDS.items():
        rest = word.removeprefix(prefix).removesuffix("s")
        if word.startswith(prefix) and len(rest) > 2 and rest in SPELLED:
            size, base = UNITS[SPELLED[rest]]
            return size * factor, base
    return None


def converted(value: float, said: str, wanted: str) -> float | None:
    """`value`, followed by the text `said`, in the unit `wanted`; None where its unit is another one.

    It may be left out. Where no unit is wanted, or one that is not known, words beside the number are not units.
    """
    said = said.strip(" .,;:()[]*$")
    own, goal = unit(said), unit(wanted)
    if own is None and NO_UNIT.match(said):
        return None
    if not wanted or not re.search(r"[^\W\d_]|[%°]", said):
        return value
    if own is None or goal is None:  # a unit that is not known is compared as it is written
        return value if own is goal and said.casefold().startswith(wanted.strip().casefold()) else None
    if {own.dimensions, goal.dimensions} == {(("°C", 1),), (("K", 1),)}:
        return value + (273.15 if own.dimensions[0][0] == "°C" else -273.15)
    return value * own.size / goal.size if own.dimensions == goal.dimensions else None
