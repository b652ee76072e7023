"""Science: known layouts, questions generated from mendeleev's table of elements, and sets of the evals and lm_eval
packages."""

from __future__ import annotations

import random
import re
import sqlite3
from functools import lru_cache
from typing import Any

from .columns import with_answer
from .named import package_file, read_lines

Row = dict[str, Any]
MENDELEEV = "pip install --no-deps mendeleev"
EVALS = "pip install --no-deps evals==3.0.1.post1"
LM_EVAL = "pip install --no-deps lm_eval"
SCIENCE = re.compile(
    r"biology|chemistry|physics|astronomy|anatomy|medicine|medical|genetics|virology|nutrition|clinical|"
    r"electrical|computer|machine|mathematics|algebra|statistics"
)
OPTION = re.compile(r"\(([A-D])\)\s*(.*?)(?=\s*\([A-D]\)|\Z)", re.DOTALL)
LETTER = "\n\nAnswer with the letter of the right choice."
KINDS = ("symbol", "name", "number", "group", "period", "weight", "heavier")
HELD_OUT_SHARE = 5  # every fifth element's questions are held out


def adapt(row: Row) -> Row:
    """A row of SciKnowEval, ARC or MMLU with `prompt`, `choices` and `answer`; other rows as they are."""
    question = row.get("question")
    if question is None or (isinstance(row.get("prompt"), str | list) and "answer" in row):
        return with_answer(row)
    choices, key = row.get("choices"), row.get("answerKey")
    if isinstance(question, dict):  # OpenBookQA
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        choices = {"label": [c["label"] for c in choices], "text": [c["text"] for c in choices]}
    if choices and (isinstance(choices, list) or choices.get("text")):
        gold = key if key not in (None, "") else row.get("answer")
        choices, gold = _lettered(choices, gold)
        return {**row, "prompt": with_choices(str(question), choices), "choices": choices, "answer": gold}
    return {
        **{k: v for k, v in row.items() if k != "choices"},
        "prompt": str(question),
        "answer": row.get("answer") or key,
    }


def _lettered(choices: Any, gold: Any) -> tuple[Any, Any]:
    """ARC labels some of its choices 1 to 4: the prompt shows letters, so the choices become a list, the gold answer
    a letter."""
    labels = [str(label) for label in choices["label"]] if isinstance(choices, dict) else []
    if labels and labels == [str(number) for number in range(1, len(labels) + 1)]:
        gold = chr(ord("A") + labels.index(str(gold))) if str(gold) in labels else gold
        return list(choices["text"]), gold
    return choices, gold


def with_choices(question: str, choices: Any) -> str:
    from .science import labelled

    listed = "\n".join(f"{label}) {text}" for label, text in labelled(choices).items())
    return f"{question}\n\n{listed}{LETTER}"


@lru_cache(maxsize=1)
def elements() -> list[dict[str, Any]]:
    """The 118 elements of mendeleev's database (MIT)."""
    path = package_file("mendeleev", "elements.db", MENDELEEV)
    with sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True) as connection:
        connection.row_factory = sqlite3.Row
        columns = "atomic_number, symbol, name, period, group_id, atomic_weight, is_radioactive"
        found = [dict(row) for row in connection.execute(f"SELECT {columns} FROM elements ORDER BY atomic_number")]
    connection.close()
    return found


def mendeleev(
    kinds: str = "symbol,name,number", size: int = 400, seed: int = 0, split: str = "train", shots: int = 1
) -> list[Row]:
    """Questions about elements, drawn from `seed`; train and held-out ask about different elements.

    kinds, joined by commas: symbol, name, number, group, period, weight (numeric, in u), heavier (multiple choice).
    shots: solved examples of the same kind before the question, about train elements.
    """
    chosen = kinds.split(",")
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown or split not in ("train", "held_out"):
        raise ValueError(f"expected kinds in {KINDS} and split train or held_out, got {kinds!r} and {split!r}")
    rng = random.Random(f"{seed}/{split}")
    held_out = [e for e in elements() if e["atomic_number"] % HELD_OUT_SHARE == 0]
    trained = [e for e in elements() if e["atomic_number"] % HELD_OUT_SHARE]
    pool = trained if split == "train" else held_out
    rows, seen = [], set()
    for _ in range(20 * size):
        row = _question(rng.choice(chosen), rng, pool)
        if row is None or row["prompt"] in seen:
            continue
        seen.add(row["prompt"])
        examples = [_question(row["topic"], rng, trained[:40]) for _ in range(shots)]
        turns = [
            turn
            for example in examples
            if example is not None
            for turn in (
                {"role": "user", "content": example["prompt"]},
                {"role": "assistant", "content": str(example["answer"])},
            )
        ]
        rows.append({**row, "prompt": [*turns, {"role": "user", "content": row["prompt"]}]})
        if len(rows) == size:
            break
    return rows


def _question(kind: str, rng: random.Random, pool: list[dict[str, Any]]) -> Row | None:
    """One question; None where the element has no such property."""
    element = rng.choice(pool)
    name = element["name"].lower()
    short = "Answer with just the"
    asked: dict[str, tuple[str, Any, Row]] = {
        "symbol": (f"What is the chemical symbol of {name}? {short} symbol.", element["symbol"], {"kind": "text"}),
        "name": (f"Which element has the symbol {element['symbol']}? {short} name.", name, {"kind": "text"}),
        "number": (
            f"What is the atomic number of {name}? {short} number.",
            element["atomic_number"],
            {"tolerance": 0.0},
        ),
        "group": (f"Which group is {name} in? {short} number.", element["group_id"], {"tolerance": 0.0}),
        "period": (f"Which period is {name} in? {short} number.", element["period"], {"tolerance": 0.0}),
        "weight": (
            f"What is the standard atomic weight of {name} in u, to one decimal? {short} number.",
            None if element["is_radioactive"] else round(element["atomic_weight"], 1),
            {"tolerance": 0.0011, "unit": "u"},
        ),
    }
    if kind == "heavier":
        four = rng.sample(pool, 4)
        texts = [e["name"] for e in four]
        heaviest = max(range(4), key=lambda i: four[i]["atomic_number"])
        prompt = with_choices("Which of these elements has the most protons?", texts)
        return {"prompt": prompt, "answer": "ABCD"[heaviest], "choices": texts, "kind": "choice", "topic": kind}
    prompt, answer, more = asked[kind]
    if answer is None:
        return None
    return {"prompt": prompt, "answer": answer, "kind": "number", "topic": kind, **more}


def rows() -> tuple[list[Row], list[Row]]:
    """The task's own questions: symbols of elements, one solved example each."""
    return mendeleev("symbol", 94), mendeleev("symbol", 23, split="held_out")


def evals(variant: str) -> list[Row]:
    """balance_chemical_equation, ph_calculation, smiles_to_formula or medmcqa of the evals package (MIT)."""
    if variant not in EVALS_SETS:
        raise ValueError(f"expected evals:NAME with NAME in {sorted(EVALS_SETS)}, got {variant!r}")
    path = package_file("evals", f"registry/data/{variant}/samples.jsonl", EVALS)
    return [EVALS_SETS[variant](row) for row in read_lines(path)]


def _medmcqa(row: Row) -> Row:
    question, *options = re.split(r"\n+\s*[a-d]\)\s*", row["input"][-1]["content"])
    return {
        "prompt": with_choices(question, options),
        "choices": options,
        "kind": "choice",
        "answer": str(row["ideal"]).strip()[0].upper(),
    }


EVALS_SETS: dict[str, Any] = {
    "balance_chemical_equation": lambda row: {"prompt": row["input"], "answer": row["ideal"], "kind": "equation"},
    "ph_calculation": lambda row: {"prompt": row["input"], "answer": row["ideal"], "kind": "number", "tolerance": 0.0},
    "smiles_to_formula": lambda row: {"prompt": row["input"], "answer": row["ideal"], "kind": "formula"},
    "medmcqa": _medmcqa,
}


def mmlu_dev(subjects: str = "science") -> list[Row]:
    """MMLU's few-shot questions as lm_eval (MIT) carries them: `science`, `all`, or a part of a subject's name."""
    import yaml

    folder = package_file("lm_eval", "tasks/mmlu/flan_cot_fewshot", LM_EVAL)
    pattern = SCIENCE if subjects == "science" else re.compile("" if subjects == "all" else re.escape(subjects))
    found = []
    for path in sorted(folder.glob("mmlu_*.yaml")):
        subject = path.stem.removeprefix("mmlu_")
        if not pattern.search(subject):
            continue
        for sample in yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]:
            options = dict(OPTION.findall(sample["question"]))
            gold = re.findall(r"answer is \(([A-D])\)", sample["target"])
            if len(options) == 4 and gold:
                question = sample["question"][: sample["question"].index("(A)")].strip()
                texts = [options[label].strip() for label in "ABCD"]
                row = {"prompt": with_choices(question, texts), "choices": texts, "answer": gold[-1]}
                found.append({**row, "kind": "choice", "subject": subject})
    return found
