"""Mathematics: known layouts, and sets that install from PyPI (CHAMP, evals' AIME, reasoning-gym's generators)."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from .answers import final_answer, marked_answer, without_thinking
from .columns import of_solution, with_answer
from .math import INSTRUCTION, literal
from .named import package_file, read_lines
from .workers import workers

SECONDS = 10.0  # of processor time to score one puzzle, its generation included
COLUMNS = (  # question and answer of AIME/HMMT/MATH, DeepMath, GSM8K-like sets
    ("problem", "answer"),
    ("problem", "expected_answer"),
    ("question", "final_answer"),
    ("question", "answer"),
    ("problem", "solution"),
)
UNCHECKABLE = re.compile(
    r"sum_|floor|\.\.\.|±|C\(|for all|f\(x\)|[a-z]=.* and |[a-z]{4,}.*\d|\d.*[a-z]{4,}|[a-z]{3,} [a-z]{2,}"
)
LEAD = re.compile(
    r"^The limit exists and is equal to |^The only possible value for the limit is | is the only possible value$", re.I
)


def adapt(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a known layout with `prompt` and `answer`; other rows as they are."""
    if "prompt" in row:
        return with_answer(row)
    for question, answer in COLUMNS:
        if row.get(question) is not None and row.get(answer) is not None:
            gold = row[answer]
            if answer == "solution":
                gold = of_solution(gold)
            elif isinstance(gold, str):
                gold = gold.rsplit("####", 1)[-1].strip().strip("$")  # GSM8K
            return {**row, "prompt": str(row[question]) + INSTRUCTION, "answer": gold}
    return row


def champ() -> list[dict[str, Any]]:
    """The CHAMP problems (MIT) whose answer is a number, an expression or yes/no: those that can be checked."""
    path = package_file("champ_dataset", "dataset_files/v0.json", "pip install --no-deps champ-dataset")
    problems = json.loads(path.read_text(encoding="utf-8"))["problems"].values()
    rows = []
    for problem in problems:
        stated = re.sub(
            r"\s*\((?:i\.e\.|none|no )[^()]*(?:\([^()]*\))*[^()]*\)$|, or approximately.*", "", problem["_answer"]
        )
        forms = [LEAD.sub("", form) for form in stated.split(", or equivalently ")]
        forms = [form for form in forms if form in ("Yes", "No") or not UNCHECKABLE.search(form)]
        forms = [form for form in forms if literal(form)] or forms  # "(20*10^15-2)/17" is not worked out
        if forms:
            rows.append({"prompt": problem["_text"] + INSTRUCTION, "answer": forms, "id": problem["identifier"]})
    return rows


def aime() -> list[dict[str, Any]]:
    """15 AIME problems from the evals package (MIT)."""
    install = "pip install --no-deps evals==3.0.1.post1"
    path = package_file("evals", "registry/data/aime_evaluation/samples.jsonl", install)
    return [{"prompt": row["input"][-1]["content"] + INSTRUCTION, "answer": row["ideal"]} for row in read_lines(path)]


def reasoning_gym(
    variant: str, size: int = 200, seed: int = 0, instruction: str = "", **options: Any
) -> list[dict[str, Any]]:
    """Puzzles of the generator `variant`, whose own options are taken as well. Another seed, other puzzles."""
    dataset = _generator(variant, json.dumps({**options, "size": size, "seed": seed}, sort_keys=True))
    return [
        {
            "prompt": entry["question"] + instruction,
            "answer": str(entry["answer"]),
            "generator": variant,
            "generator_options": {**options, "size": size, "seed": seed},
            "index": index,
        }
        for index, entry in enumerate(dataset)
    ]


@lru_cache(maxsize=16)
def _generator(name: str, options: str) -> Any:
    try:
        import reasoning_gym as gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(f"reasoning-gym:{name} needs its package: pip install reasoning-gym ({error})") from error
    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no generator {name!r}, choose from {sorted(DATASETS)}")
    try:
        return gym.create_dataset(name, **json.loads(options))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym:{name} with options {options}: {error}") from error


def gym_reward(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    *,
    generator: list[str],
    generator_options: list[dict[str, Any]],
    index: list[int],
    **_: Any,
) -> list[dict[str, Any]]:
    """1.0 where the puzzle's own `score_answer` gives the extracted answer full marks, else 0.0.

    The answer is taken out of the reply first, and its partial marks are dropped: generators give them where the
    gold answer is a part of the reply, so that the more is said the better.
    """
    items: list[list[Any]] = []
    for completion, name, options, number in zip(completions, generator, generator_options, index, strict=True):
        candidates = _candidates(completion)
        items.append([name, json.dumps(options, sort_keys=True), number, candidates])
    results = workers(f"{__name__}:score_puzzle", SECONDS).map(items)
    verdicts = []
    for item, result in zip(items, results, strict=True):
        if "error" in result:
            raise ValueError(f"reasoning-gym:{item[0]} puzzle {item[2]}: {result['error']}")
        right = result.get("value") == 1.0
        said = item[3][0][:80] if item[3] else "of an empty reply"
        verdicts.append({"score": float(right), "feedback": f"The answer {said} is {'right' if right else 'wrong'}."})
    return verdicts


def _candidates(completion: str) -> list[str]:
    """The marked answer alone; else the whole reply, for answers of many lines, or its stated final answer."""
    text = without_thinking(completion).strip()
    marked = marked_answer(text)
    if marked is not None:
        return [marked]
    final = final_answer(completion)
    return [text] if final is None or final == text else [final.replace("$", "").strip(), text]


def score_puzzle(item: list[Any]) -> float:
    """In a worker: the best full mark of the candidates."""
    name, options, number, candidates = item
    dataset = _generator(name, options)
    entry = dataset[number]
    return float(any(float(dataset.score_answer(answer=said, entry=entry)) >= 1.0 for said in candidates if said))
