"""Diversity against values worked out by hand, and tree edit distance against zss."""

from __future__ import annotations

import ast
import itertools
import json
import math

import pytest
import zss

from mopd_train.analysis.ast_distance import ast_distance, syntax_tree, tree_edit_distance
from mopd_train.analysis.diversity import code_distance, distinct_n, group_diversity, self_bleu, unique_ratio
from mopd_train.analysis.diversity_command import DiversityOptions, diversity_command, points_of
from mopd_train.evaluate import completion_records
from mopd_train.files import write_jsonl
from mopd_train.rollout import Group, Prompt, Rollout

PROGRAMS = [
    "def f(xs):\n    total = 0\n    for x in xs:\n        total += x\n    return total\n",
    "def f(xs):\n    return sum(xs)\n",
    "def f(values):\n    return sum(values)\n",
    "def f(xs):\n    return sum(x for x in xs if x != 3)\n",
    "f = lambda xs: xs[0] + f(xs[1:]) if xs else 0\n",
    "",
]


def group(texts, rewards):
    rollouts = [Rollout([i], text, True, reward) for i, (text, reward) in enumerate(zip(texts, rewards, strict=True))]
    return Group(Prompt([{"role": "user", "content": "q"}], [], {}), rollouts)


def test_ratios_by_hand():
    texts = ["a b a", "a b c.", "a b a"]
    assert unique_ratio(texts) == pytest.approx(2 / 3)
    assert distinct_n(texts, 1) == pytest.approx(4 / 10)  # a b c . of 3 + 4 + 3 words
    assert distinct_n(texts, 2) == pytest.approx(4 / 7)  # ab ba bc c. of 2 + 3 + 2
    assert distinct_n(["a", "b"], 2) is None


def test_self_bleu_by_hand():
    """A: 4, 2, 1 of its 4, 3, 2 n-grams stand in B or C, none of one 4-gram, which method 1 counts as 0.1."""
    a, b, c = "a b c d", "a b d e", "b c d f"
    bleu_a = (4 / 4 * 3 / 3 * 1 / 2 * 0.1 / 1) ** 0.25  # ab in B; bc, cd, bcd in C
    bleu_b = (3 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25  # a, b, d; ab
    bleu_c = (3 / 4 * 2 / 3 * 1 / 2 * 0.1 / 1) ** 0.25  # b, c, d; bc, cd; bcd
    assert self_bleu([a, b, c]) == pytest.approx((bleu_a + bleu_b + bleu_c) / 3)
    assert self_bleu([a, a]) == self_bleu(["12", "12"]) == self_bleu(["", ""]) == 1
    assert self_bleu(["12", "13"]) == pytest.approx(0, abs=1e-12)
    assert self_bleu(["", "12"]) == pytest.approx(0, abs=1e-12)
    assert self_bleu([a]) is None


def as_zss(node):
    label = type(node).__name__ + (f" {node.value!r}" if isinstance(node, ast.Constant) else "")
    children = [as_zss(child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)]
    return zss.Node(label, children)


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(PROGRAMS, 2)))
def test_tree_edit_distance_is_zss(a, b):
    expected = zss.simple_distance(as_zss(ast.parse(a)), as_zss(ast.parse(b)), label_dist=lambda x, y: int(x != y))
    first, second = syntax_tree(a), syntax_tree(b)
    assert tree_edit_distance(first, second) == tree_edit_distance(second, first) == expected


def test_distance_of_programs():
    assert ast_distance(syntax_tree("x = 1"), syntax_tree("y = 1")) == 0  # a renaming
    # Module, Assign, Name, Constant: one relabelled
    assert ast_distance(syntax_tree("x = 1"), syntax_tree("x = 2")) == 1 / 4
    fenced = "Here:\n```python\nx = 1\n```\nDone."
    assert ast_distance(syntax_tree(fenced), syntax_tree("x = 1")) == 0
    distance, parsed = code_distance(["x = 1", "x = 2", "no python", "x = 1"])
    assert distance == pytest.approx((1 / 4 + 1 / 4 + 0) / 3)
    assert parsed == 3 / 4
    assert code_distance(["1 +", "'\\d' is 1"]) == (None, 1 / 2)
    assert syntax_tree("x = '\0'") is None


def test_pass_curve_of_a_group():
    found = group_diversity(group(["1", "2", "3", "4", "5"], [1, 0, 0.5, None, 1]), 1.0, code=False)
    for k in range(1, 5):
        assert found[f"pass@{k}"] == pytest.approx(1 - math.comb(2, k) / math.comb(4, k))
    assert "pass@5" not in found
    assert "ast_distance" not in found
    alone = group_diversity(group(["1"], [None]), 1.0, code=False)
    assert alone["self_bleu_4"] is alone["distinct_2"] is None
    assert not any(name.startswith("pass@") for name in alone)


def test_over_the_steps_of_a_run(tmp_path, capsys):
    """Five steps in two points; the second run's rollouts are all alike."""
    for step in range(1, 6):
        same = group(["x = 1"] * 2, [1, 1])
        varied = group([f"x = {step}", "y = 3 + 4"], [1, 0])
        for run, groups in (("a", [same, varied]), ("b", [same, same])):
            write_jsonl(
                tmp_path / run / "completions" / f"step-{step:06d}.jsonl", completion_records(groups, step=step)
            )
    names = [str(tmp_path / run) for run in "ab"]
    points = points_of(names[0], 2)
    assert [(point.label, len(point.paths)) for point in points] == [("1-3", 3), ("4-5", 2)]
    results = diversity_command(DiversityOptions(names, str(tmp_path / "out"), 2, True, 1.0, False))
    assert [row["groups"] for row in results] == [6, 4, 6, 4]
    assert results[0]["unique_ratio"]["value"] == pytest.approx(0.75)
    assert results[0]["pass@1"]["value"] == pytest.approx(0.75)
    assert results[2]["self_bleu_4"] == {"value": 1, "low": 1, "high": 1, "undefined": 0}
    assert results[2]["ast_distance"]["value"] == 0
    assert json.loads((tmp_path / "out" / "diversity.json").read_text())["points"] == results
    assert (tmp_path / "out" / "diversity.png").read_bytes().startswith(b"\x89PNG")
    assert "pass@2" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(ValueError, match="--points >= 1, got 0"):
        diversity_command(DiversityOptions(names, str(tmp_path / "out"), 0, True, 1.0, False))
