"""Mathematics: gold answers of real sets, answers that only look right, hostile ones, and workers that are ended."""

from __future__ import annotations

import os
import time

import pytest

from mopd_train.tasks import math_sets
from mopd_train.tasks.answers import final_answer, numbers, only_number, unwrapped
from mopd_train.tasks.math import literal, reward
from mopd_train.tasks.workers import Workers, workers
from tests.train.verdicts import accepted, needs, refused, scores


def one(gold, completion, prompt="q"):
    return scores(reward, [{"prompt": prompt, "answer": gold}], [completion])[0]


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        (r"\frac{1}{2}", r"so the answer is \boxed{0.5}"),
        ("1/2", r"It is $\frac12$."),
        ("7", "first 3, then 4, so 7"),
        ("7", r"\boxed{7}" + "\nand again " + r"\boxed{\boxed{7}}"),
        ("7", "<think>8? 9?</think>The answer is **7**."),
        ("7", "The answer is:\n7"),
        ("34", "15 + 19 = 34"),
        ("12", "The answer is 12 because 3*4=12"),
        ("-5", "x = −5"),
        ("079", "79"),
        ("1234", "1,234"),
        ("1500", r"\boxed{1.5 \times 10^3}"),
        ("50\\%", "0.5"),
        ("90", r"\boxed{90^\circ}"),
        (r"\frac{1}{3}", "0.333333"),
        ("x+1", r"\boxed{1+x}"),
        ("n(n+1)/2", r"so the sum is $\frac{n(n+1)}{2}$."),
        ("1, 19", r"\boxed{19}, \boxed{1}"),
        ("[-1, 1]", r"\boxed{[-1,1]}"),
        ("No", "No, it is not."),
        (["C(10, 5)", "252"], "252"),
        ("42", r"The final answer is \(42\)."),
        ("42", r"The answer is \[42\]"),
        ("42", "The answer is: \\[\n42\n\\]"),
        ("42", "The answer is\n$$\n42\n$$"),
        ("42", r"The answer is \(x = 42\)."),
        ("42", r"so we get \(42\)"),
        ("42", r"<answer>\(42\)</answer>"),
        ("42", "**Answer:** 42"),
        ("42", "The correct option is 42, since 41 is odd."),
        ("42", "The number of terms greater than 3 is 42."),
        ("42", "I was wrong, the answer is 42."),
        ("3/4", r"**Answer:** \(\frac{3}{4}\)"),
        ("33", r"\boxed{\text{33}}"),
        ("5", r"\boxed{\mathbf{5}}"),
        ("5", r"\boxed{\displaystyle 5}"),
        ("12", r"\boxed{12\text{ cm}^2}"),
        ("12", r"\boxed{12\,\mathrm{m}/\mathrm{s}}"),
        ("5/2", r"\boxed{2\frac{1}{2}}"),
        ("5/2", r"\boxed{2 1/2}"),
        ("-5/2", r"\boxed{-2\frac{1}{2}}"),
        ("1234567", r"\boxed{1\,234\,567}"),
        ("n(n+1)/2", r"so the sum is \(\frac{n(n+1)}{2}\)."),
        (r"\text{does not exist}", r"\boxed{\text{does not exist}}"),
        ("x=1 or x=2", r"\boxed{x=1 \text{ or } x=2}"),
        (r"\text{Yes}", r"\boxed{\text{Yes}}"),
        ("Yes", "So the answer is: **Yes**, because 2 is even."),
        ("Yes", "Therefore, yes it is."),
        ("No", "no"),
        ("x^2", "The sum over all terms is $x^2$."),
        ("infinitely many", "Infinitely many."),
    ],
)
def test_right_answers(gold, completion):
    assert one(gold, completion) == 1.0


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("34", "15 + 19"),
        ("34", r"\boxed{15+19}"),
        ("34", "68/2"),
        ("1024", r"\boxed{2^{10}}"),
        ("2", r"$\sqrt{2}$"),
        ("2", "2x"),
        ("5", "5!"),
        ("1/2", r"\boxed{\frac{2}{4}}"),
        ("7", "5 or 6 or 7"),
        ("7", r"\boxed{5}, \boxed{6}, \boxed{7}"),
        ("7", "The answer is not 7"),
        ("7", "first 7, then 4"),
        ("7", r"\boxed{7} is wrong, it is \boxed{8}"),
        ("7", "<think>7"),
        ("7", ""),
        ("7", r"\boxed{nan}"),
        ("7", r"\boxed{\infty}"),
        ("7", r"\boxed{3 \boxed{7}}"),
        ("7", "7" * 100_000),
        ("x+1", "1" * 100_000),
        ("Yes", "Yes and no"),
        ("1, 19", r"\boxed{1, 19, 5}"),
        ("[-1, 1]", r"\boxed{(-1,1)}"),
        (r"\sqrt{2}", r"\boxed{1.414}"),
        (r"\frac{1}{3}", "0.33"),
        ("100", "10**10**10"),
        ("100", "1e999999999999"),
        ("Yes", r"\boxed{Not yes}"),
        ("Yes", "I would not say yes"),
        ("Yes", "Yes, that is wrong"),
        ("No", "no idea"),
        ("No", "There is no answer"),
        ("No", "I have no clue, sorry"),
        ("No", r"\boxed{\text{no solution}}"),
        ("infinitely many", "infinitely many + 5"),
        ("5", r"\boxed{\text{not }5}"),
        ("5", r"not \boxed{5}"),
        ("5", r"It is not equal to $\boxed{5}$"),
        ("5", r"\boxed{5} is wrong"),
        ("5", "The wrong answer is 5"),
        ("5", "I do not think that the answer is 5"),
        ("5", "The answer is greater than 5."),
        ("5", "The answer is at least 5"),
        ("5", "x > 5"),
        ("5", "x ≥ 5"),
        ("5", "The answer is minus 5"),
        ("5", "The square root of 5"),
        ("5", "log 5"),
        ("5", r"\boxed{5\text{ plus three}}"),
        ("5", "The answer is 5 million"),
        ("5", r"\boxed{\text{minus }5}"),
        ("5", r"\boxed{5\text{ or more}}"),
        ("5", r"\boxed{5\text{ million}}"),
        ("5", r"\boxed{5\mathrm{i}}"),
        ("42", r"\boxed{\text{at most }42}"),
        ("42", r"\boxed{42\text{ or }42}"),
        ("3/4", "The answer is less than 3/4"),
        ("x+1", r"\boxed{\text{not } x+1}"),
        ("x+1", r"\boxed{\text{at most } x+1}"),
        ("1", r"\boxed{2\frac{1}{2}}"),
        ("9/2", r"\boxed{3\frac{3}{2}}"),
    ],
)
def test_wrong_answers(gold, completion):
    assert one(gold, completion) == 0.0


def test_an_answer_that_restates_the_question_is_none():
    question = "Expand $(x+1)^2$."
    assert one("x^2+2x+1", r"\boxed{(x+1)^2}", question) == 0.0
    assert one("x^2+2x+1", r"\boxed{1+2x+x^2}", question) == 1.0
    assert one("(x+1)^2", r"\boxed{(x+1)^2}", question) == 1.0


@needs("champ_dataset", "evals")
def test_gold_answers_of_champ_and_aime():
    for rows in (math_sets.champ(), math_sets.aime()):
        assert len(rows) in (212, 15)
        golds = [row["answer"][0] if isinstance(row["answer"], list) else row["answer"] for row in rows]
        assert refused(reward, rows, [f"<think>no</think>It is \\boxed{{{gold}}}." for gold in golds]) == []
        numeric = [(row, gold) for row, gold in zip(rows, golds, strict=True) if literal(gold)]
        assert len(numeric) > len(rows) // 2 - 10
        some = [row for row, _ in numeric]
        assert refused(reward, some, [f"The answer is {gold}." for _, gold in numeric]) == []
        for form in ("{}1", "1{}", "{} + 0", "{} or 3456", "not {}", "98765.5"):
            assert accepted(reward, some, [f"The answer is {form.format(gold)}" for _, gold in numeric]) == []


def test_a_symbolic_comparison_that_runs_away_ends_and_the_next_is_judged(monkeypatch):
    monkeypatch.setattr("mopd_train.tasks.math.SECONDS", 1.5)
    rows = [{"answer": "x+1"}] * 3
    completions = [r"\boxed{9^{9^{9^{9}}}+x!}", r"\boxed{1+x}", r"\boxed{10^{10^{10}}}"]
    assert scores(reward, rows, completions) == [0.0, 1.0, 0.0]


def test_gold_answers_that_cannot_be_read_are_errors():
    with pytest.raises(ValueError, match="cannot be parsed as mathematics"):
        one("", r"\boxed{x}")


def busy(item):
    """A worker's function: hang, die, raise, print, or answer."""
    if item == "hang":
        while True:
            pass
    if item == "memory":
        return len(bytearray(1 << 40))
    if item == "die":
        os._exit(3)
    if item == "raise":
        raise ValueError("no")
    print("printed, and not taken for an answer")
    return item


def test_workers_end_what_hangs_and_go_on():
    pool = Workers(f"{__name__}:busy", seconds=0.5, count=2)
    start = time.monotonic()
    results = pool.map(["a", "hang", "memory", "die", "raise", "b"] + ["c"] * 10)
    assert time.monotonic() - start < 120
    assert [result.get("value") for result in results] == ["a", None, None, None, None, "b"] + ["c"] * 10
    assert "took over 0.5 s" in results[1]["ended"]
    assert "MemoryError" in results[2]["ended"]
    assert "code 3" in results[3]["ended"]
    assert results[4]["error"] == "ValueError: no"
    processes = list(pool.started)
    assert len(processes) <= 2
    pool.close()
    assert all(process.poll() is not None for process in processes)
    assert pool.map([1]) == [{"value": 1}]
    pool.close()


def test_hostile_replies_cost_linear_time():
    """Each of these took minutes with a quadratic expression; a test run of this file would show it."""
    for unit in (
        "\\boxed{",
        "\\[",
        "$$ ",
        "not the ",
        "not boxed \\boxed{7}",
        "\\text{",
        "{}",
        "<think>",
        "<answer>",
        "the answer is ",
        "111,",
        "1e",
        "-",
        ". ",
        "[",
        "1x10^",
    ):
        reply = unit * (100_000 // len(unit))
        final_answer(reply)
        numbers(reply)
        unwrapped(reply)


def test_numbers_are_read_with_their_powers_and_units():
    assert [(float(v), u) for v, u in numbers("1.5 × 10⁻³ kg or 2e3 m")] == [(0.0015, "kg or"), (2000.0, "m")]
    assert float(only_number("the number of carbon-12 is 6")[0]) == 6
    assert only_number("12.011, not 14.007") is None


@needs("reasoning_gym")
def test_puzzles_of_reasoning_gym():
    pool = workers("mopd_train.tasks.math_sets:score_puzzle", math_sets.SECONDS)
    rows = []
    for name in ("chain_sum", "gcd", "letter_counting", "count_bits", "syllogism", "spell_backward", "number_sorting"):
        rows += math_sets.reasoning_gym(name, size=3, seed=1)
    golds = [row["answer"] for row in rows]
    assert refused(math_sets.gym_reward, rows, [f"<answer>{gold}</answer>" for gold in golds]) == []
    assert refused(math_sets.gym_reward, rows, [f"<think>x</think>{gold}" for gold in golds]) == []
    assert accepted(math_sets.gym_reward, rows, [f"{gold} or {gold}1 or yes or no" for gold in golds]) == []
    assert accepted(math_sets.gym_reward, rows, [""] * len(rows)) == []
    assert len(pool.started) <= pool.count
    with pytest.raises(ValueError, match="no generator 'sums', choose from"):
        math_sets.reasoning_gym("sums")
    with pytest.raises(ValueError, match="min_digits"):
        math_sets.reasoning_gym("chain_sum", min_digits=-1)


def test_layouts_of_mathematics():
    adapted = [
        math_sets.adapt(row)
        for row in (
            {"problem": "p", "answer": 204},
            {"question": "p", "final_answer": r"$\frac{1}{2}$", "r1_solution_1": "..."},
            {"question": "p", "answer": "Six.\n#### 6"},
            {"problem": "p", "solution": r"thus \boxed{6}"},
        )
    ]
    assert [row["answer"] for row in adapted] == [204, r"\frac{1}{2}", "6", "6"]
    assert all(row["prompt"] == "p" + math_sets.INSTRUCTION for row in adapted)
    for more, gold in (
        ({"solution": r"so \boxed{3}"}, "3"),
        ({"solution": "one\ntwo\n#### 3"}, "3"),
        ({"solution": "$3$"}, "$3$"),
        ({"ground_truth": "3"}, "3"),
        ({"answer": "3", "solution": "four"}, "3"),
    ):
        row = math_sets.adapt({"prompt": "1 + 2?", **more})
        assert (row["prompt"], row["answer"]) == ("1 + 2?", gold)
        assert scores(reward, [row], [r"\boxed{3}"]) == [1.0]
    with pytest.raises(ValueError, match="'solution' marks no final answer"):
        math_sets.adapt({"prompt": "1 + 2?", "solution": "first this\nthen that"})
    assert math_sets.adapt({"prompt": "mine", "answer": "1"}) == {"prompt": "mine", "answer": "1"}
