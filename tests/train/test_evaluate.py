"""pass@k against enumeration, scores of known groups, and `mopd eval` from the command line."""

from __future__ import annotations

import itertools
import json

import pytest

from mopd_train.evaluate import pass_at_k, scores
from mopd_train.rollout import Group, Prompt, Rollout
from tests.train.launch import mopd


@pytest.mark.parametrize(("samples", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (7, 3, 7)])
def test_pass_at_k_counts_subsets(samples, correct, k):
    subsets = list(itertools.combinations(range(samples), k))
    hits = sum(any(i < correct for i in subset) for subset in subsets)
    assert pass_at_k(samples, correct, k) == pytest.approx(hits / len(subsets))


def test_pass_at_k_refuses_more_than_was_sampled():
    with pytest.raises(ValueError, match="expected 1 <= k <= 4 samples, got 5"):
        pass_at_k(4, 2, 5)


def group(rewards):
    return Group(Prompt([], [], {}), [Rollout([1] * (i + 1), "", True, r) for i, r in enumerate(rewards)])


def test_scores_of_known_groups():
    """Completions without a verdict are in neither score, and counted."""
    result = scores([group([1, 0, 0, 0]), group([0, 0, 0, 0]), group([1, None, None, 1])], threshold=1.0)
    assert result.mean_at_k == pytest.approx((0.25 + 0 + 1) / 3)
    assert result.pass_at_k == pytest.approx(2 / 3)
    assert (result.k, result.prompts, result.unjudged) == (4, 3, 2)
    assert result.completion_length == 2.5
    with pytest.raises(ValueError, match="no verdict on any of 2 completions"):
        scores([group([None, None])], threshold=1.0)


def test_eval_command(tiny_model, tmp_path):
    done = mopd(
        "eval",
        *("--model.model_name_or_path", str(tiny_model), "--output", str(tmp_path / "out")),
        *("--evaluation.num_prompts", "3", "--evaluation.k", "4", "--rollout.max_completion_length", "5"),
        *("--data.task", "tests.train.rewards.parity", "--data.eval_dataset", str(write_rows(tmp_path))),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "scores.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert record["mean@4"] == pytest.approx(sum(line["reward"] for line in lines) / 12)
    assert all(line["reward"] == float(line["completion_ids"][0] % 2 == 0) for line in lines)
    assert "mean@4" in done.stdout


def write_rows(folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(5)))
    return path
