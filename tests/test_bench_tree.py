"""`bench tree --quick`: every case runs, ways agree, and the report says what the results file holds."""

from __future__ import annotations

import json

import pytest

from bench import tree_cases, tree_report
from bench.__main__ import main
from bench.tree import GOALS
from mopd_train.contexts import CONTEXTS


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    out = folder / "tree.json"
    assert main(["tree", "--quick", "--rounds", "1", "--out", str(out), "--plots", str(folder)]) == 0
    return folder, json.loads(out.read_text())


def test_all_cases_ran_and_agree(quick):
    folder, record = quick
    assert record["quick"]
    assert set(record["cases"]) == {*GOALS, "curve"}
    for case in ("teacher-8", "teacher-16", "analysis", "student"):
        assert record["cases"][case]["error"] < 1e-5
    for case in GOALS:
        ways = record["cases"][case]["ways"]
        assert record["cases"][case]["ratio"] == pytest.approx(ways["tree"]["median"] / ways["plain"]["median"])
    assert record["cases"]["memory"]["ways"]["plain"]["median"] > 100_000  # bytes; hidden states alone are more
    steps = record["cases"]["step"]["phases"]
    assert steps["tree"]["tokens/student_computed"][0] < steps["tree"]["tokens/student_total"][0]
    assert steps["plain"]["tokens/student_computed"][0] >= steps["plain"]["tokens/student_total"][0]
    for name in ("tree-speedup.png", "tree-pack.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_results_of_other_cases_are_kept_and_sizes_never_mixed(quick, tmp_path, capsys):
    _, record = quick
    out = tmp_path / "tree.json"
    out.write_text(json.dumps(record))
    assert main(["tree", "--quick", "--rounds", "1", "--case", "teacher-8", "--out", str(out)]) == 0
    again = json.loads(out.read_text())["cases"]
    assert again["sampler"] == record["cases"]["sampler"]
    assert again["teacher-8"]["ways"] != record["cases"]["teacher-8"]["ways"]
    with pytest.raises(ValueError, match="quick=True, got quick=False"):
        main(["tree", "--case", "none", "--out", str(out)])
    capsys.readouterr()


def test_the_table_names_goals_that_are_met_missed_and_not_run():
    ways = {"plain": tree_cases.summary([2.0, 4.0, 3.0]), "tree": tree_cases.summary([1.2, 1.5, 1.4])}
    cases = {"teacher-8": {"ways": ways, "ratio": 1.4 / 3, "note": "", "commit": "c", "when": "d"}}
    cases["student"] = cases["teacher-8"] | {"ratio": 0.7}
    lines = {line[0]: line for line in tree_report.rows({"cases": cases})}
    assert lines[GOALS["teacher-8"][0]][1:] == ["3 s (2–4)", "1.4 s (1.2–1.5)", "0.47", "0.50", "met"]
    assert lines[GOALS["student"][0]][-1] == "not met"
    assert lines[GOALS["memory"][0]][-1] == "not run"


@pytest.mark.parametrize("context", CONTEXTS)
def test_sequences_have_the_length_the_plain_way_needs(context):
    """Equal within a context: padded batches, the baseline, compute no padding."""
    group = tree_cases.random_group(6, 5, 7, 100)
    peers = {"none": 0, "all": 5, "score_ordered": 5, "random_peer": 1}.get(context)
    peers = sum(int(c) for c in context if c.isdigit()) if peers is None else peers
    expected = 5 + peers * (tree_cases.HEADER + 7) + (tree_cases.INSTRUCTION if peers else 0)
    assert {len(read) for read, _ in tree_cases.teacher_pairs(group, context)} == {expected}


def test_generate_draws_what_the_sampler_draws(tmp_path):
    """Same greedy completions, cut behind the stop token."""
    from bench.tree import small_model
    from mopd_train.models import load_model
    from mopd_train.sampler import Sampling, sample

    model = load_model(str(small_model(tmp_path / "model")))
    prompts, greedy = [[5, 6, 7], [9, 10]], Sampling(2, 6, 1.0, 1e-9, 64)
    free = sample(model, prompts, greedy, [-1], 2, 0)
    stop = [free[0][0][2]]
    assert tree_cases.generated(model, prompts, greedy, stop, 2, 0) == sample(model, prompts, greedy, stop, 2, 0)
