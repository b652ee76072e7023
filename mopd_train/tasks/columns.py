"""The gold answer of a row, under the names that data sets give it."""

from __future__ import annotations

from typing import Any

from .answers import marked_answer


def with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose gold answer is in `ground_truth` or `solution`, with `answer`; other rows as they are."""
    if row.get("answer") is not None:
        return row
    if row.get("ground_truth") is not None:
        return {**row, "answer": row["ground_truth"]}
    return {**row, "answer": of_solution(row["solution"])} if row.get("solution") is not None else row


def of_solution(solution: Any) -> Any:
    """What a worked solution ends in: its last box, or what follows GSM8K's ####; a solution of one line may be the
    answer itself. ValueError for one of several lines that marks none."""
    if not isinstance(solution, str):
        return solution
    marked = marked_answer(solution)
    if marked is not None:
        return marked
    _, sign, last = solution.rpartition("####")
    if not sign and "\n" in solution.strip():
        raise ValueError(f"column 'solution' marks no final answer by \\boxed{{}} or ####: {solution!r:.200}")
    return last.strip()
