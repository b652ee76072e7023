"""A page of two groups with known numbers and hostile text, for the tests of the inspector in a browser."""

from __future__ import annotations

from pathlib import Path

from mopd_train.analysis.inspect_page import GroupData, render
from mopd_train.analysis.inspect_scores import RolloutScores, TeacherScores, TokenScores
from mopd_train.contexts import Peers, TeacherPrompt
from mopd_train.rollout import Group, Prompt, Rollout

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><!-- &lt;b&gt;"
CONTEXTS = ["none", "2s"]


def rollout_with(tokenizer, text, reward, ratios, feedback=None):
    """A rollout whose log-ratio is 0 under `none` and as given, token after token, under `2s`; None: undefined there.
    Divergence is half of its size."""
    ids = tokenizer.encode(text)
    ratios = None if ratios is None else (ratios * len(ids))[: len(ids)]
    alternatives = [[i, *({34, 36} - {i})] for i in ids]

    def side(logprobs):
        return [[own, -0.2, -2.0][: len(row)] for own, row in zip(logprobs, alternatives, strict=True)]

    def teacher(name, values):
        prompt = TeacherPrompt(tokenizer.encode(f"{name} prompt {HOSTILE}"), Peers((1,), ()), False)
        logprobs = [x - 3.0 for x in values]
        return TeacherScores(
            logprobs, [0.5] * len(ids), side(logprobs), prompt, divergence=[abs(x) / 2 for x in values]
        )

    behind = [teacher("none", [0.0] * len(ids)), *([] if ratios is None else [teacher("peers", ratios)])]
    scores = RolloutScores(
        alternatives,
        TokenScores([-3.0] * len(ids), [0.25] * len(ids), side([-3.0] * len(ids))),
        behind,
        {"none": 0, "2s": None if ratios is None else 1},
    )
    return Rollout(ids, text, True, reward, feedback), scores


def write_page(tokenizer, folder: Path) -> Path:
    """Group 1, mixed, of task sums; group 2, all wrong, of task words, full of markup."""
    groups = [
        (
            "sums",
            "What is 6 * 7?",
            [
                rollout_with(tokenizer, "12 34 56", 1.0, [2.0, -2.0, 0.0, 0.9, -0.9], "right"),
                rollout_with(tokenizer, "78", 0.0, [0.5], "wrong"),
                rollout_with(tokenizer, "about forty or so", 0.25, [-1.0]),
                rollout_with(tokenizer, "none", None, None),
            ],
        ),
        ("words", f"Say {HOSTILE}", [rollout_with(tokenizer, f"{HOSTILE} 🙂", 0.0, [-0.1], HOSTILE)]),
    ]
    data = GroupData(tokenizer, threshold=1.0)
    for number, (task, prompt, rollouts) in enumerate(groups, start=1):
        row = {"answer": HOSTILE}
        some = Group(Prompt([{"role": "user", "content": prompt}], [1], row), [rollout for rollout, _ in rollouts])
        data.add(number, task, some, [scores for _, scores in rollouts])
    path = folder / "page.html"
    text = render("inspect", HOSTILE, {"about": HOSTILE, "contexts": CONTEXTS, **data.as_dict()})
    path.write_text(text, encoding="utf-8")
    return path
