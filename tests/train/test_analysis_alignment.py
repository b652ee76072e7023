"""Measures against groups worked out by hand and against scikit-learn; intervals against plain resampling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from mopd_train.analysis.alignment import MEASURES, bootstrap_interval, brier_scores, platt


def measured(scores, rewards):
    values, given_rewards = np.array(scores, float), np.array(rewards, float)
    return {name: measure(values, given_rewards, given_rewards >= 1) for name, measure in MEASURES.items()}


def test_a_group_by_hand():
    """Scores -1 (right), -2 (wrong), -3 (right), -3 (wrong): pairs right-wrong 1 > 2, 1 > 3, 3 < 2, 3 = 3."""
    found = measured([-1, -2, -3, -3], [1, 0, 1, 0])
    assert found["auc"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert found["pairwise_accuracy"] == pytest.approx(2.5 / 4)
    # tau-b: 2 concordant, 1 discordant; 5 pairs differ in score, 4 in reward
    assert found["kendall"] == pytest.approx((2 - 1) / np.sqrt(5 * 4))
    # ranks of the scores 4, 3, 1.5, 1.5 and of the rewards 3.5, 1.5, 3.5, 1.5, each less its mean 2.5
    assert found["spearman"] == pytest.approx((1.5 - 0.5 - 1 + 1) / np.sqrt((2.25 + 0.25 + 1 + 1) * 4))
    # deviations of the scores 1.25, 0.25, -0.75, -0.75
    assert found["point_biserial"] == pytest.approx(0.5 * (1.25 - 0.25 - 0.75 + 0.75) / np.sqrt(2.75 * 1))
    assert found["top1_hit"] == 1
    assert found["margin"] == pytest.approx(-2 - -2.5)


def test_graded_rewards_have_more_pairs():
    found = measured([-1, -2, -3], [0.5, 1, 0])
    assert found["auc"] == pytest.approx(1 / 2)
    assert found["pairwise_accuracy"] == pytest.approx(2 / 3)
    assert found["kendall"] == pytest.approx(1 / 3)
    assert found["top1_hit"] == 0


def test_undefined_is_none_and_never_zero():
    assert set(measured([-1, -2, -3], [0, 0, 0]).values()) == {None}
    assert set(measured([-1], [1]).values()) == {None}
    flat = measured([-1, -1], [1, 0])
    assert (flat["auc"], flat["top1_hit"], flat["margin"]) == (0.5, 0.5, 0)
    assert flat["spearman"] is flat["kendall"] is flat["point_biserial"] is None
    below = measured([-1, -2], [0.5, 0])  # graded, but no success
    assert below["auc"] is below["top1_hit"] is None
    assert below["pairwise_accuracy"] == 1
    assert below["spearman"] == pytest.approx(1)


@given(st.lists(st.tuples(st.integers(-4, 0), st.booleans()), min_size=2, max_size=12))
def test_auc_is_scikit_learns(pairs):
    scores, success = [s for s, _ in pairs], [int(y) for _, y in pairs]
    found = measured(scores, success)
    if len(set(success)) == 1:
        assert found["auc"] is None
    else:
        assert found["auc"] == pytest.approx(roc_auc_score(success, scores))
        assert found["pairwise_accuracy"] == pytest.approx(found["auc"])


def test_platt_is_logistic_regression_on_smoothed_targets():
    """The same optimum as scikit-learn's, which takes a soft target as two weighted hard ones."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=60)
    success = rng.random(60) < 1 / (1 + np.exp(-2 * scores))
    positives = success.sum()
    targets = np.where(success, (positives + 1) / (positives + 2), 1 / (60 - positives + 2))
    reference = LogisticRegression(C=np.inf, tol=1e-10).fit(
        np.tile(scores, 2)[:, None], np.repeat([1, 0], 60), sample_weight=np.concatenate([targets, 1 - targets])
    )
    slope, offset = platt(scores, success)
    assert slope == pytest.approx(reference.coef_.item(), rel=1e-3)
    assert offset == pytest.approx(reference.intercept_.item(), rel=1e-3, abs=1e-3)


def test_brier_fits_on_other_prompts_only():
    rng = np.random.default_rng(1)
    successes = [np.array(row, bool) for row in ([1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1])]
    scores = [rng.normal(size=4) + 2 * y for y in successes]
    standard = [(s - s.mean()) / s.std() for s in scores]
    found = brier_scores(scores, successes)
    for i in range(3):
        others = [j for j in range(3) if j != i]
        slope, offset = platt(
            np.concatenate([standard[j] for j in others]), np.concatenate([successes[j] for j in others])
        )
        probability = 1 / (1 + np.exp(-(slope * standard[i] + offset)))
        assert found[i] == pytest.approx(brier_score_loss(successes[i], probability))
    assert brier_scores(scores[:1], successes[:1]) == [None]
    uniform = brier_scores(
        [*scores, np.ones(2), np.arange(2.0)], [*successes, np.array([1, 0], bool), np.ones(2, bool)]
    )
    assert uniform == [*found, None, None]


def test_interval_of_every_resample():
    """Five prompts have 3125 resamples: the percentiles of their means are what the interval tends to."""
    values = np.array([0.0, 0.1, 0.5, 0.7, 1.0])
    means = [np.mean(draw) for draw in itertools.product(values, repeat=5)]
    expected = [np.percentile(means, 2.5), np.percentile(means, 97.5)]
    assert bootstrap_interval(values, 20000, seed=0) == pytest.approx(expected, abs=0.02)
    assert bootstrap_interval(values, 200, seed=3) == bootstrap_interval(values, 200, seed=3)
    assert bootstrap_interval(np.array([0.7]), 200, seed=0) == (None, None)
    assert bootstrap_interval(np.array([0.7, 0.7]), 200, seed=0) == (pytest.approx(0.7), pytest.approx(0.7))
