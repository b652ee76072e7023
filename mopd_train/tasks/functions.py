"""Tiny Python functions asked for in one sentence, with tests computed by reference solutions: a training set that a
135M-parameter model solves in part."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

HELD_OUT = 16
TESTS = 8
WORDS = ["apple", "river", "stone", "light", "dog", "level", "noon", "tree", "sun", "window", "paper", "cat", "radar"]

EXAMPLE = [
    {"role": "user", "content": "Write a Python function triple(n) that returns n multiplied by 3."},
    {"role": "assistant", "content": "```python\ndef triple(n):\n    return n * 3\n```"},
]

# Arguments are drawn by name: a, b, n whole numbers (n >= 0, the others of any sign), k 1 to 9, s a word or two,
# t a word, xs numbers, ws words; lists and words are never empty.
PROBLEMS: list[tuple[str, str, str, Callable[..., Any]]] = [
    ("add", "a, b", "the sum of a and b", lambda a, b: a + b),
    ("subtract", "a, b", "a minus b", lambda a, b: a - b),
    ("multiply", "a, b", "the product of a and b", lambda a, b: a * b),
    ("divide", "a, k", "a divided by k as a float", lambda a, k: a / k),
    ("floor_divide", "a, k", "a divided by k, rounded down", lambda a, k: a // k),
    ("remainder", "n, k", "the remainder of n divided by k", lambda n, k: n % k),
    ("double", "n", "n multiplied by 2", lambda n: 2 * n),
    ("square", "a", "the square of a", lambda a: a * a),
    ("cube", "a", "the cube of a", lambda a: a**3),
    ("negate", "a", "a with the opposite sign", lambda a: -a),
    ("increment", "a", "a plus 1", lambda a: a + 1),
    ("decrement", "a", "a minus 1", lambda a: a - 1),
    ("absolute", "a", "the absolute value of a", lambda a: abs(a)),
    ("half", "n", "n divided by 2, rounded down", lambda n: n // 2),
    ("average", "a, b", "the average of a and b", lambda a, b: (a + b) / 2),
    ("larger", "a, b", "the larger of a and b", lambda a, b: max(a, b)),
    ("smaller", "a, b", "the smaller of a and b", lambda a, b: min(a, b)),
    ("power", "a, k", "a to the power of k", lambda a, k: a**k),
    ("distance", "a, b", "the absolute difference of a and b", lambda a, b: abs(a - b)),
    ("last_digit", "n", "the last digit of n", lambda n: n % 10),
    ("digit_sum", "n", "the sum of the digits of n", lambda n: sum(map(int, str(n)))),
    ("count_digits", "n", "the number of digits of n", lambda n: len(str(n))),
    ("factorial", "k", "the factorial of k", math.factorial),
    ("sum_to", "n", "the sum of all whole numbers from 1 to n", lambda n: n * (n + 1) // 2),
    ("sum_of_squares", "a, b", "the square of a plus the square of b", lambda a, b: a * a + b * b),
    ("perimeter", "a, b", "the perimeter of a rectangle with sides a and b", lambda a, b: 2 * (a + b)),
    ("celsius", "a", "the temperature a in Fahrenheit converted to Celsius", lambda a: (a - 32) * 5 / 9),
    ("minutes", "n", "the number of minutes in n hours", lambda n: 60 * n),
    ("clamp_to_ten", "a", "a, but 10 if a is greater than 10", lambda a: min(a, 10)),
    ("is_even", "a", "True if a is even, else False", lambda a: a % 2 == 0),
    ("is_odd", "a", "True if a is odd, else False", lambda a: a % 2 == 1),
    ("is_positive", "a", "True if a is greater than 0, else False", lambda a: a > 0),
    ("is_negative", "a", "True if a is less than 0, else False", lambda a: a < 0),
    ("is_divisible", "n, k", "True if n is divisible by k, else False", lambda n, k: n % k == 0),
    ("is_greater", "a, b", "True if a is greater than b, else False", lambda a, b: a > b),
    ("both_positive", "a, b", "True if a and b are both greater than 0, else False", lambda a, b: a > 0 and b > 0),
    ("to_string", "a", "a as a string", lambda a: str(a)),
    ("to_binary", "n", "n as a string of binary digits without a prefix", lambda n: f"{n:b}"),
    ("reverse", "s", "the string s reversed", lambda s: s[::-1]),
    ("length", "s", "the length of the string s", lambda s: len(s)),
    ("to_upper", "s", "the string s in upper case", lambda s: s.upper()),
    ("capitalize_first", "t", "the word t with a capital first letter", lambda t: t.capitalize()),
    ("first_char", "s", "the first character of s", lambda s: s[0]),
    ("last_char", "s", "the last character of s", lambda s: s[-1]),
    ("repeat", "s, k", "the string s repeated k times", lambda s, k: s * k),
    ("join_words", "s, t", "s and t joined by a space", lambda s, t: f"{s} {t}"),
    ("concat", "s, t", "s followed by t", lambda s, t: s + t),
    ("is_palindrome", "t", "True if t reads the same backwards, else False", lambda t: t == t[::-1]),
    ("starts_with", "s, t", "True if s starts with t, else False", lambda s, t: s.startswith(t)),
    ("contains", "s, t", "True if t occurs in s, else False", lambda s, t: t in s),
    ("count_words", "s", "the number of words in s", lambda s: len(s.split())),
    ("count_vowels", "s", "the number of vowels (aeiou) in s", lambda s: sum(c in "aeiou" for c in s)),
    ("remove_spaces", "s", "the string s without spaces", lambda s: s.replace(" ", "")),
    ("swap_e", "s", "the string s with every e replaced by a", lambda s: s.replace("e", "a")),
    ("first_k", "s, k", "the first k characters of s", lambda s, k: s[:k]),
    ("greet", "t", "the string Hello, followed by a space and t", lambda t: f"Hello, {t}"),
    ("sort_letters", "t", "a string of the letters of t in alphabetical order", lambda t: "".join(sorted(t))),
    ("total", "xs", "the sum of the list xs", lambda xs: sum(xs)),
    ("largest", "xs", "the largest number of the list xs", lambda xs: max(xs)),
    ("smallest", "xs", "the smallest number of the list xs", lambda xs: min(xs)),
    ("mean", "xs", "the average of the list xs", lambda xs: sum(xs) / len(xs)),
    ("size", "xs", "the number of elements of the list xs", lambda xs: len(xs)),
    ("first", "xs", "the first element of the list xs", lambda xs: xs[0]),
    ("last", "xs", "the last element of the list xs", lambda xs: xs[-1]),
    ("reverse_list", "xs", "the list xs reversed", lambda xs: xs[::-1]),
    ("sort_list", "xs", "the list xs sorted from smallest to largest", lambda xs: sorted(xs)),
    ("sort_descending", "xs", "the list xs sorted from largest to smallest", lambda xs: sorted(xs, reverse=True)),
    ("span", "xs", "the largest minus the smallest number of xs", lambda xs: max(xs) - min(xs)),
    ("has_number", "xs, a", "True if a is in the list xs, else False", lambda xs, a: a in xs),
    ("evens", "xs", "a list of the even numbers of xs", lambda xs: [x for x in xs if x % 2 == 0]),
    ("positives", "xs", "a list of the numbers of xs greater than 0", lambda xs: [x for x in xs if x > 0]),
    ("doubled", "xs", "a list of the numbers of xs multiplied by 2", lambda xs: [2 * x for x in xs]),
    ("squares", "xs", "a list of the squares of the numbers of xs", lambda xs: [x * x for x in xs]),
    ("count_evens", "xs", "how many numbers of xs are even", lambda xs: sum(x % 2 == 0 for x in xs)),
    ("range_list", "k", "a list of the whole numbers from 1 to k", lambda k: list(range(1, k + 1))),
    ("append_item", "xs, a", "the list xs with a added at the end", lambda xs, a: [*xs, a]),
    ("longest_word", "ws", "the first of the longest words of the list ws", lambda ws: max(ws, key=len)),
    ("join_list", "ws", "the words of the list ws joined by commas", lambda ws: ",".join(ws)),
    ("lengths", "ws", "a list of the lengths of the words of ws", lambda ws: [len(w) for w in ws]),
]


DRAWS: dict[str, Callable[[random.Random], Any]] = {
    "a": lambda rng: rng.randint(-15, 15),
    "b": lambda rng: rng.randint(-15, 15),
    "n": lambda rng: rng.randint(0, 40),
    "k": lambda rng: rng.randint(1, 9),
    "s": lambda rng: " ".join(rng.sample(WORDS, rng.randint(1, 3))),
    "t": lambda rng: rng.choice(WORDS),
    "xs": lambda rng: [rng.randint(-9, 9) for _ in range(rng.randint(1, 6))],
    "ws": lambda rng: rng.sample(WORDS, rng.randint(1, 4)),
}


def rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train and held-out rows, different functions in each; always the same."""
    order = [_row(*problem) for problem in PROBLEMS]
    random.Random(20260512).shuffle(order)
    return order[HELD_OUT:], order[:HELD_OUT]


def _row(name: str, arguments: str, returns: str, reference: Callable[..., Any]) -> dict[str, Any]:
    rng = random.Random(name)
    names = arguments.split(", ")
    tests: list[dict[str, Any]] = []
    for attempt in range(200):
        given = _draw(name, names, rng)
        expected = reference(*given)
        # The second half only takes outputs not seen yet, as long as there are any: yes/no questions get both.
        seen = [test["output"] for test in tests]
        if len(tests) < TESTS // 2 or expected not in seen or attempt > 100:
            tests.append({"input": given, "output": expected})
        if len(tests) == TESTS:
            break
    question = f"Write a Python function {name}({arguments}) that returns {returns}."
    opened = {"role": "assistant", "content": f"```python\ndef {name}({arguments}):"}  # no newline: a token boundary
    return {
        "prompt": [*EXAMPLE, {"role": "user", "content": question}, opened],
        "tests": tests,
        "entry_point": name,
    }


def _draw(name: str, names: list[str], rng: random.Random) -> list[Any]:
    given = {argument: DRAWS[argument](rng) for argument in names}
    if name == "starts_with" and rng.random() < 0.5:
        given["s"] = given["t"] + given["s"]
    return list(given.values())
