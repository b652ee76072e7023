"""Science: gold answers of real sets in several wordings, answers that only look right, units, layouts."""

from __future__ import annotations

import pytest

from mopd_train.tasks import science_sets
from mopd_train.tasks.science import labelled, reward
from tests.train.verdicts import accepted, needs, refused, scores

OPTIONS = ["Hyperplasia", "Hypertrophy", "Atrophy", "Dysplasia"]
CHOICE = {"answer": "C", "choices": OPTIONS}


def first(answer):
    return answer[0] if isinstance(answer, list) else answer


def all_sets():
    sets = {name: science_sets.evals(name) for name in science_sets.EVALS_SETS}
    sets["mendeleev"] = science_sets.mendeleev(",".join(science_sets.KINDS), 300)
    sets["mmlu"] = science_sets.mmlu_dev("all")
    return sets


@needs("evals", "lm_eval", "mendeleev")
def test_gold_answers_of_real_sets():
    counts = {}
    for name, rows in all_sets().items():
        counts[name] = len(rows)
        for form in ("{}", "The answer is {}.", "<think>hm</think>so it is \\boxed{{{}}}", "First some words.\n\n{}"):
            assert refused(reward, rows, [form.format(first(row["answer"])) for row in rows]) == [], (name, form)
    assert counts == {"balance_chemical_equation": 100, "ph_calculation": 103, "smiles_to_formula": 905,
                      "medmcqa": 300, "mendeleev": 300, "mmlu": 281}  # fmt: skip


@needs("evals", "lm_eval", "mendeleev")
def test_wrong_answers_to_real_questions():
    for rows in all_sets().values():
        assert accepted(reward, rows, ["" for _ in rows]) == []
        assert accepted(reward, rows, [f"{first(row['answer'])} or Qq or 98765 or B or A" for row in rows]) == []
        shifted = [rows[i - 1]["answer"] for i in range(len(rows))]
        other = [(row, first(said)) for row, said in zip(rows, shifted, strict=True)
                 if str(first(said)).strip("0. []") != str(first(row["answer"])).strip("0. []")]  # fmt: skip
        kinds = [(row, said) for row, said in other if isinstance(said, type(first(row["answer"])))]
        given = scores(reward, [row for row, _ in kinds], [str(said) for _, said in kinds])
        same_answer = [pair for pair, score in zip(kinds, given, strict=True) if score == 1.0]
        assert len(same_answer) <= 0.01 * len(rows), same_answer[:3]  # another question, the same compound
        choices = [row for row in rows if row.get("choices")] or [CHOICE]
        listed = [" ".join(f"{k}) {v}" for k, v in labelled(row["choices"]).items()) for row in choices]
        assert accepted(reward, choices, listed) == []
        assert accepted(reward, choices, ["The answer is A, B, C or D" for _ in choices]) == []


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("C", 1), ("(c)", 1), ("C) Atrophy", 1), ("**C**", 1), (r"\boxed{\text{C}}", 1), ("Atrophy", 1),
        ("atrophy.", 1),
        ("The answer is (C).", 1), ("I think it is option C, Atrophy.", 1), ("A careful look leads to C", 1),
        ("A", 0), ("A C", 0), ("C and D", 0), ("C) Dysplasia", 0), ("It is (C) Hypertrophy", 0), ("not C", 0),
        ("The correct option is C, since A is false", 1), ("The answer is C because A and B are wrong", 1),
        ("I think C", 1), ("C - Atrophy", 1), (r"$\mathbf{C}$", 1), (r"\(\text{C}\)", 1),
        ("C is wrong", 0), ("C is incorrect.", 0), ("Everything except C", 0), ("Neither C", 0), ("It isn’t C", 0),
        ("The wrong answer is C", 0), ("I do not think the answer is C", 0), (r"not \boxed{C}", 0),
        ("All but C", 0), ("Any but C", 0), ("C is the least likely", 0), ("Ruling out C", 0),
        ("The incorrect option is C", 0),
        ("Hypertrophy or Atrophy", 0), ("A B C D", 0), ("<think>C</think>", 0), ("E", 0), ("Carbon", 0),
    ],
)  # fmt: skip
def test_choices(said, score):
    assert scores(reward, [CHOICE], [said]) == [score], said


@pytest.mark.parametrize(
    ("choices", "gold", "right", "wrong"),
    [
        (["5 m/s", "−5 m/s"], "−5 m/s", ["B", "−5 m/s", "B) -5 m/s", "(B)"], ["A", "5 m/s", "A) -5 m/s", "B) 5 m/s"]),
        (["5 m/s", "−5 m/s"], "5 m/s", ["A", "A) 5 m/s"], ["B", "-5 m/s"]),
        (["x < 5", "x > 5"], "x > 5", ["B", "x > 5", "$x > 5$", r"\boxed{x > 5}"], ["A", "x < 5", "A) x > 5"]),
        (["x \\le 5", "x < 5"], "A", ["A", "x ≤ 5", "A) x <= 5"], ["x < 5", "A) x < 5"]),
        (["1.5", "1 5", "15"], "1.5", ["A", "1.5", "A) 1.5"], ["1 5", "15", "B", "A) 15"]),
        (["CO", "Co"], "Co", ["B", "Co", "B) Co"], ["A", "CO", "B) CO"]),
        (["10^3", "103"], "A", ["A", "10³", "10^{3}"], ["103", "A) 103"]),
        (["It does not react", "It melts"], "A", ["A", "It does not react.", "I say A: it does not react"],
         ["It melts", "It does not melt"]),
        ({"label": ["a", "b"], "text": ["x", "y"]}, "b", ["B", "b"], ["A", "x"]),
    ],
)  # fmt: skip
def test_choices_that_differ_in_a_sign(choices, gold, right, wrong):
    row = {"answer": gold, "choices": choices}
    assert refused(reward, [row] * len(right), right) == []
    assert accepted(reward, [row] * len(wrong), wrong) == []


def test_choices_that_cannot_be_told_apart_are_errors():
    with pytest.raises(ValueError, match="text of several choices"):
        scores(reward, [{"answer": "same", "choices": ["same", "same", "other"]}], ["A"])
    with pytest.raises(ValueError, match="expected different labels"):
        scores(reward, [{"answer": "1", "choices": {"label": ["1", "2"], "text": ["x", "y"]}}], ["1"])


@pytest.mark.parametrize(
    ("gold", "unit", "said", "score"),
    [
        ("12.0", "u", "12.011", 1), ("12.011", "u", "The atomic weight of carbon-12 is 12.011 u", 1),
        ("12.011", "u", "12.011 g/mol", 1), ("6.022e23", None, r"6.02 \times 10^{23}", 1),
        ("6.022e23", None, "6.022 × 10²³ particles", 1), ("1.5", "nm", "1500 pm", 1), ("300", "K", "26.85 °C", 1),
        ("0.25", "kJ", "250 J", 1), ("5 m", None, "5 meters", 1), ("-3", None, "−3.0", 1), ("40", "%", "40 percent", 1),
        ("12.011", "u", "14.007", 0), ("12.011", "u", "12.011, not 14.007", 0), ("12.011", "u", "between 12 and 14", 0),
        ("300", "K", "300 °C", 0), ("300", "K", "300 J", 0), ("5 m", None, "5 km", 0), ("5", "m", "50", 0),
        ("5", "m", "not 5", 0), ("5", "m", "nan", 0), ("5", "m", "1e99999999", 0), ("5", "m", "5" * 100_000, 0),
        ("100", None, "10**2", 0), ("1.5", "nm", "1.5 pm", 0), ("0.25", "kJ", "0.25 J", 0),
        ("9.8", "m/s^2", "9.8 m/s^2", 1), ("9.8 m/s^2", None, "9.8 m/s²", 1), ("9.8 m/s^2", None, "9.8 m s^{-2}", 1),
        ("9.8", "m/s^2", r"\boxed{9.8\ \mathrm{m/s^2}}", 1), ("5 m/s", None, "5 meters per second", 1),
        ("5 m/s", None, "18 km/h", 1), ("5 m", None, "5", 1), ("5 m", None, r"The length is \(5\,\text{m}\).", 1),
        ("-40 kJ/mol", None, "−40 kJ mol⁻¹", 1), ("300", "K", r"26.85^\circ\mathrm{C}", 1), ("1", "kcal", "4184 J", 1),
        ("25", "J/(mol K)", "25 J mol^-1 K^-1", 1), ("6.022e23", None, "6.022 × 10^23 particles", 1),
        ("5 m", None, "5 miles", 0), ("5 m", None, "5 feet", 0), ("5 J", None, "5 kcal", 0),
        ("5 kg", None, "5 pounds", 0), ("5 m", None, "5 m/s", 0), ("9.8", "m/s^2", "9.8 m/s", 0),
        ("9.8", "m/s^2", "9.8 kg", 0), ("5 m", None, "5 mmx", 0), ("5 mM", None, "5 M", 0), ("5 m", None, "5 J m", 0),
        ("100", None, "more than 100", 0), ("100", None, "at most 100", 0), ("100", None, "< 100", 0),
        ("5", None, "I doubt it is 5", 0), ("5", None, "5 million", 0), ("5", None, "5x", 0), ("5", None, "minus 5", 0),
        ("5", None, "5 x^2", 0), ("5", None, "5!", 0), ("5", None, "The wrong result is 5", 0),
    ],
)  # fmt: skip
def test_numbers(gold, unit, said, score):
    assert scores(reward, [{"answer": gold, "unit": unit, "kind": "number"}], [said]) == [score], said


def test_symbols_formulas_and_equations():
    def one(kind, gold, said):
        return scores(reward, [{"answer": gold, "kind": kind}], [said])[0]

    assert one("text", "Co", "The symbol is Co.") == 1.0
    assert one("text", "Co", "CO") == one("text", "Co", "Co or Cu") == one("text", "Co", "cobalt") == 0.0
    assert one("formula", "[C19H23ClN2]", "so we get [C19H23N2Cl]") == 1.0
    assert one("formula", "[C19H23ClN2]", "[C19H23ClN] or [C19H22ClN2]") == 0.0
    assert one("formula", "[C2H6]", r"\boxed{C_2H_6}") == 1.0
    assert one("equation", ["2Fe + 3Cl2 = 2FeCl3"], "3Cl2 + 2Fe -> 2FeCl3") == 1.0
    assert one("equation", ["2Fe + 3Cl2 = 2FeCl3"], "Fe + Cl2 = FeCl3") == 0.0
    assert one("equation", ["2Fe + 3Cl2 = 2FeCl3"], "4Fe + 6Cl2 = 4FeCl3") == 0.0
    for said in ("Fe", r"\boxed{\text{Fe}}", r"$\mathrm{Fe}$", "The chemical symbol of iron is Fe.", "**Fe**"):
        assert one("text", "Fe", said) == 1.0, said
    for gold, said in (("CO2", r"CO$_2$"), ("CO2", "CO₂"), ("ΔG > 0", "ΔG > 0."), ("1.5", "The ratio is 1.5"),
                       ("mitosis", "Mitosis"), ("DNA", "DNA"), ("x ≤ 5", r"\boxed{x \le 5}")):  # fmt: skip
        assert one("text", gold, said) == 1.0, said
    for gold, said in (("ΔG > 0", "ΔG < 0"), ("1.5", "1 5"), ("1.5", "15"), ("CO2", "Co2"), ("-5", "5"), ("5", "−5"),
                       ("x ≤ 5", "x < 5"), ("10^3", "103"), ("mitosis", "The answer is not mitosis"), ("5!", "5"),
                       ("mitosis", "I doubt it is mitosis"), ("iron", "It is copper, is iron"), ("[0, 1)", "(0, 1)"),
                       ("mitosis", "It is meiosis or is mitosis"), ("mitosis", "mitosis is wrong")):  # fmt: skip
        assert one("text", gold, said) == 0.0, said
    for said in ("The formula is C₆H₁₂O₆.", r"\boxed{\mathrm{C_6H_{12}O_6}}", r"\ce{C6H12O6}", "In short: C6H12O6",
                 r"\(\text{C}_6\text{H}_{12}\text{O}_6\)", "[C6H12O6]", "Thus it is C6H12O6 (H12C6O6)"):  # fmt: skip
        assert one("formula", "C6H12O6", said) == 1.0, said
    for said in ("not C6H12O6", "not [C6H12O6]", "C6H12O6, CO", "C6H12O6 or B", "[C6H12O6] is wrong", "C6h12O6"):
        assert one("formula", "C6H12O6", said) == 0.0, said
    for gold in ("2H2+O2=2H2O", "[2H2+O2=2H2O]", "2H2 + O2 -> 2H2O"):
        for said in ("[2H2 + O2 -> 2H2O]", r"2H_2 + O_2 \to 2H_2O", r"\ce{2H2 + O2 -> 2H2O}", "2H₂ + O₂ ⟶ 2H₂O",
                     r"$2\mathrm{H_2} + \mathrm{O_2} \longrightarrow 2\mathrm{H_2O}$"):  # fmt: skip
            assert one("equation", gold, said) == 1.0, said
        for said in ("This is not balanced: 2H2 + O2 = 2H2O", "2H2O = 2H2 + O2", "2H2 + O2 = 2H2O = 2H2O"):
            assert one("equation", gold, said) == 0.0, said
    assert one("equation", "Fe3+ + e- = Fe2+", "e- + Fe3+ -> Fe2+") == 1.0
    assert one("equation", "Fe3+ + e- = Fe2+", "Fe2+ + e- -> Fe3+") == 0.0
    for kind, gold in (("formula", "glucose"), ("equation", "2H2 + O2"), ("number", "many")):
        with pytest.raises(ValueError, match="gold answer"):
            one(kind, gold, "x")
    with pytest.raises(ValueError, match=r"expected kind in .* got 'poem'"):
        one("poem", "x", "x")
    with pytest.raises(ValueError, match="neither a label nor a text"):
        scores(reward, [{**CHOICE, "answer": "Z"}], ["A"])


@needs("mendeleev")
def test_generated_questions_are_repeatable_and_held_out_elements_are_not_trained_on():
    train, held_out = science_sets.rows()
    asked = [{row["prompt"][-1]["content"] for row in rows} for rows in (train, held_out)]
    assert len(asked[0]) == 94
    assert len(asked[1]) == 23
    assert not asked[0] & asked[1]
    examples = {message["content"] for row in held_out for message in row["prompt"][:-1]}
    assert not examples & asked[1]
    assert science_sets.mendeleev("number,heavier", 50, seed=3) == science_sets.mendeleev("number,heavier", 50, seed=3)
    assert science_sets.mendeleev("number", 50, seed=3) != science_sets.mendeleev("number", 50, seed=4)
    gold = {e["symbol"]: e["atomic_number"] for e in science_sets.elements()}
    assert (gold["Fe"], gold["Og"], len(gold)) == (26, 118, 118)
    with pytest.raises(ValueError, match="expected kinds in"):
        science_sets.mendeleev("colour")


def test_layouts_of_science():
    mine = science_sets.adapt({"prompt": "Which?", "choices": OPTIONS, "ground_truth": "C"})
    assert scores(reward, [mine] * 2, ["C", "D"]) == [1.0, 0.0]
    sciknow = {"question": "Which?", "choices": {"text": OPTIONS, "label": list("ABCD")}, "answerKey": "C",
               "type": "mcq-4-choices", "domain": "Biology", "prompt": {"default": "Given a question"}}  # fmt: skip
    open_ended = {"question": "How many?", "choices": {"text": [], "label": []}, "answerKey": "", "answer": "46"}
    mmlu = {"question": "Which?", "choices": OPTIONS, "answer": 2}
    numbered = [{"text": text, "label": str(number)} for number, text in enumerate(OPTIONS, start=1)]
    arc = {"question": {"stem": "Which?", "choices": numbered}, "answerKey": "3"}
    rows = [science_sets.adapt(row) for row in (sciknow, open_ended, mmlu, arc)]
    assert (rows[3]["answer"], rows[3]["choices"]) == ("C", OPTIONS)
    assert rows[3]["prompt"].startswith("Which?\n\nA) Hyperplasia\nB) Hypertrophy")
    assert rows[0]["prompt"].startswith("Which?\n\nA) Hyperplasia\nB) Hypertrophy")
    for row, right, wrong in zip(rows, ("C", "46", "(C)", "Atrophy"), ("D", "45", "B", "Dysplasia"), strict=True):
        assert scores(reward, [row], [right]) == [1.0]
        assert scores(reward, [row], [wrong]) == [0.0]
