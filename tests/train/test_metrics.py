"""What a step and a run report: spread of rewards, the table before and after, the plot, the files."""

from __future__ import annotations

import datetime
import statistics

import pytest
from matplotlib.figure import Figure

from mopd_train.evaluate import Scores, completion_records
from mopd_train.files import read_jsonl, write_jsonl
from mopd_train.metrics import group_metrics
from mopd_train.report import before_after_table, plot_run
from mopd_train.rollout import Group, Prompt, Rollout


def group(rewards, **row):
    return Group(Prompt([], [], row), [Rollout([1], "", True, reward) for reward in rewards])


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, 1.0])
def test_equal_rewards_have_no_spread_whatever_their_binary_form(reward):
    metrics = group_metrics([group([reward] * 8), group([reward, None])], 1.0)
    assert metrics["reward_std"] == 0.0
    assert metrics["frac_reward_zero_std"] == 1.0
    assert metrics["reward"] == pytest.approx(reward)


def test_the_spread_of_rewards_is_the_sample_deviation():
    """As TRL's, and as the one advantages are divided by."""
    metrics = group_metrics([group([0.0, 1.0, 1.0, None]), group([0.5, 0.5])], 1.0)
    assert metrics["reward_std"] == pytest.approx(statistics.stdev([0, 1, 1]) / 2)
    assert metrics["frac_reward_zero_std"] == 0.5


def test_scores_of_another_number_of_samples_stand_beside_each_other():
    before, after = Scores(0.25, 0.5, 2, 3, 7.0, 0), Scores(0.75, 1.0, 4, 3, 6.0, 0)
    table = before_after_table(before, after)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert ("mean@2", "0.250", "") in rows
    assert ("mean@4", "", "0.750") in rows
    assert ("completion_length", "7.000", "6.000") in rows


@pytest.mark.parametrize(("rewards", "limits"), [([0.0, 0.5], (0, 1)), ([-3.0, 2.5], None)])
def test_the_plot_shows_every_reward(tmp_path, monkeypatch, rewards, limits):
    seen = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: (seen.append(figure.axes[0]), path.write_bytes(b""))
    )
    rows = [{"step": i, "loss": 1.0, "reward": reward} for i, reward in enumerate(rewards, start=1)]
    plot_run(rows, tmp_path / "plot.png", Scores(0.2, 0.5, 2, 3, 7.0, 0), Scores(0.4, 0.5, 4, 3, 7.0, 0))
    low, high = seen[0].get_ylim()
    assert (low, high) == limits if limits else low < min(rewards) < max(rewards) < high
    assert "held-out mean@2 and mean@4" in seen[0].get_legend_handles_labels()[1]


def test_a_column_without_a_form_in_json_is_written_as_text(tmp_path):
    one = group([1.0], created=datetime.date(2026, 5, 12), answer="3")
    write_jsonl(tmp_path / "a.jsonl", completion_records([one]))
    [row] = read_jsonl(tmp_path / "a.jsonl")
    assert (row["created"], row["answer"]) == ("2026-05-12", "3")
