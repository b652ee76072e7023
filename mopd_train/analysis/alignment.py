"""How well scores of a group's rollouts agree with their rewards: measures of one prompt, and their averages.

Legend: n rollouts of a prompt, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Measure = Callable[[Array, Array, NDArray[np.bool_]], float | None]  # (n,) scores, rewards, successes
FOLDS = 10


def statistics() -> Any:
    """scipy.stats, which only analysis needs."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("analysis needs scipy: pip install 'mopd[analysis]'") from error
    return stats


def auc(scores: Array, rewards: Array, success: NDArray[np.bool_]) -> float | None:
    """Chance that a success outscores a failure, ties one half. None without one of each."""
    positives = int(success.sum())
    negatives = len(success) - positives
    if not positives or not negatives:
        return None
    ranks = statistics().rankdata(scores)
    return float((ranks[success].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def pairwise_accuracy(scores: Array, rewards: Array, success: NDArray[np.bool_]) -> float | None:
    """Over pairs of different reward: how often the better one scores higher, ties one half. With rewards of 0 and 1
    it is the AUC; graded rewards add pairs. None without such a pair."""
    better = rewards[:, None] > rewards[None, :]
    if not better.any():
        return None
    wins = np.sign(scores[:, None] - scores[None, :])[better]
    return float((wins + 1).mean() / 2)


def spearman(scores: Array, rewards: Array, success: NDArray[np.bool_]) -> float | None:
    """Rank correlation with the reward. None where scores or rewards are all equal."""
    return float(statistics().spearmanr(scores, rewards).statistic) if _vary(scores, rewards) else None


def kendall(scores: Array, rewards: Array, success: NDArray[np.bool_]) -> float | None:
    """Kendall's tau-b with the reward. None where scores or rewards are all equal."""
    return float(statistics().kendalltau(scores, rewards).statistic) if _vary(scores, rewards) else None


def point_biserial(scores: Array, rewards: Array, success: NDArray[np.bool_]) -> float | None:
    """Pearson correlation of the score with success as 0 and 1. None where either is constant."""
    return float(statistics().pointbiserialr(success, scores).statistic) if _vary(scores, success) else None


def top1_hit(scores: Array, rewards: Array, success: NDArray[np.bool_]) -> float | None:
    """1 if the best-scored rollout succeeded; among several best, the share that did. None without one of each:
    there every choice is right, or none."""
    if success.all() or not success.any():
        return None
    return float(success[scores == scores.max()].mean())


def margin(scores: Array, rewards: Array, success: NDArray[np.bool_]) -> float | None:
    """Mean score of the successes minus that of the failures, nats a token. None without one of each."""
    if success.all() or not success.any():
        return None
    return float(scores[success].mean() - scores[~success].mean())


def _vary(*values: NDArray[Any]) -> bool:
    return all(len(set(column.tolist())) > 1 for column in values)


MEASURES: dict[str, Measure] = {
    "auc": auc,
    "pairwise_accuracy": pairwise_accuracy,
    "spearman": spearman,
    "kendall": kendall,
    "point_biserial": point_biserial,
    "top1_hit": top1_hit,
    "margin": margin,
}
BRIER = "brier"  # beside MEASURES: a score becomes a probability with the help of other prompts


def brier_scores(scores: Sequence[Array], successes: Sequence[NDArray[np.bool_]]) -> list[float | None]:  # (P,)
    """Mean squared error of P(success) against success, prompt by prompt; lower is better.

    A score becomes a probability by Platt scaling (Platt 1999): sigmoid(a z + b) of the score standardised within its
    prompt, a and b fitted on the prompts of the other folds, so that no prompt is judged by its own verdicts. None
    where a prompt has no success or no failure or its scores are all equal, and where there are no other prompts.
    """
    usable = [i for i, y in enumerate(successes) if _vary(scores[i], y)]
    standard = {i: (scores[i] - scores[i].mean()) / scores[i].std() for i in usable}
    result: list[float | None] = [None] * len(scores)
    folds = min(FOLDS, len(usable))
    if folds < 2:
        return result
    for fold in range(folds):
        held_out = usable[fold::folds]
        others = [i for i in usable if i not in set(held_out)]
        slope, offset = platt(
            np.concatenate([standard[i] for i in others]), np.concatenate([successes[i] for i in others])
        )
        for i in held_out:
            probability = 1 / (1 + np.exp(-(slope * standard[i] + offset)))
            result[i] = float(np.mean((probability - successes[i]) ** 2))
    return result


def platt(scores: Array, success: NDArray[np.bool_]) -> tuple[float, float]:
    """a, b of sigmoid(a s + b) by maximum likelihood on Platt's smoothed targets (n+ + 1)/(n+ + 2) and 1/(n- + 2),
    which keep a finite where scores part the classes."""
    from scipy.optimize import minimize

    positives = int(success.sum())
    targets = np.where(success, (positives + 1) / (positives + 2), 1 / (len(success) - positives + 2))

    def loss(parameters: Array) -> tuple[float, Array]:
        logits = parameters[0] * scores + parameters[1]
        error = 1 / (1 + np.exp(-logits)) - targets
        value = np.logaddexp(0, logits) - targets * logits
        return float(value.mean()), np.array([(error * scores).mean(), error.mean()])

    slope, offset = minimize(loss, np.zeros(2), jac=True, method="BFGS").x
    return float(slope), float(offset)


def bootstrap_interval(
    values: Array, resamples: int, seed: int, confidence: float = 0.95
) -> tuple[float | None, float | None]:
    """Percentile interval of the mean over resampled prompts; the same seed draws the same prompts, so that intervals
    over the same prompts are comparable. (None, None) for fewer than two prompts, which cannot be resampled."""
    if len(values) < 2:
        return None, None
    found = statistics().bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
