"""Whether an answer of a program is the expected one. Works on data alone, outside the sandbox."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d{1,3})?", re.ASCII)
TOLERANCE = 1e-6  # relative and absolute, of decimals


def same_output(got: str, expected: str) -> bool:
    """Line by line, each split at blanks; empty lines at the end do not count. Numbers are compared by value,
    decimals within 1e-6, as LiveCodeBench does up to that tolerance."""
    left, right = got.strip().splitlines(), expected.strip().splitlines()
    return len(left) == len(right) and all(map(_same_line, left, right))


def _same_line(got: str, expected: str) -> bool:
    left, right = got.split(), expected.split()
    return len(left) == len(right) and all(map(_same_token, left, right))


def _same_token(got: str, expected: str) -> bool:
    if got == expected:
        return True
    if not (NUMBER.fullmatch(got) and NUMBER.fullmatch(expected)):
        return False
    if re.search("[.eE]", expected):
        return math.isclose(float(got), float(expected), rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return Decimal(got) == Decimal(expected)  # whole numbers are exact, however long


def same_value(got: Any, expected: Any) -> bool:
    """Of builtin data: tuples count as lists (expected values come from JSON), floats within 1e-6; the rest is
    Python's equality, True == 1 included, as LiveCodeBench has it."""
    if isinstance(got, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(same_value(got[key], expected[key]) for key in expected)
    if isinstance(got, float) or isinstance(expected, float):
        numbers = isinstance(got, (int, float)) and isinstance(expected, (int, float))
        return numbers and (got == expected or _close(got, expected))
    return bool(got == expected)


def _close(got: float, expected: float) -> bool:
    try:
        return math.isclose(got, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except OverflowError:  # an int beyond the floats
        return False
