"""From scored groups to figures: per prompt, averaged over the prompts that all contexts share, with intervals."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .alignment import BRIER, MEASURES, auc, bootstrap_interval, brier_scores
from .controls import MATCHED
from .scored import ScoredGroup

logger = logging.getLogger(__name__)

METRICS = (*MEASURES, BRIER)
Row = dict[str, Any]
Values = dict[str, dict[str, list[float | None]]]  # condition -> metric -> one value a group


@dataclass(frozen=True)
class Analysis:
    """`rows`, `controls`, `prompts` and `rollouts` are lists of flat dicts, ready for pandas.DataFrame."""

    counts: dict[str, Any]
    reference: str  # the context from which differences are taken
    rows: list[Row]  # context x metric, on the prompts where all contexts define the metric
    controls: list[Row]  # by context: composition alone, matched peers
    groups: list[ScoredGroup]
    values: Values

    @property
    def prompts(self) -> list[Row]:
        """Condition x prompt: every metric, None where it is undefined."""
        return [
            {"context": name, "source": group.source, "question": group.question}
            | {metric: column[i] for metric, column in metrics.items()}
            for name, metrics in self.values.items()
            for i, group in enumerate(self.groups)
            if group.scores
        ]

    @property
    def rollouts(self) -> list[Row]:
        """Condition x rollout: score, reward, and how many successes and failures its teacher was shown."""
        return [
            {
                "context": name,
                "source": group.source,
                "rollout": i,
                "reward": group.rewards[i],
                "score": score,
                "tokens": group.lengths[i],
            }
            | dict(zip(("successes_shown", "failures_shown"), group.shown[name][i] or (None, None), strict=True))
            for group in self.groups
            for name, scores in group.scores.items()
            for i, score in enumerate(scores)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for json."""
        return {
            "counts": self.counts,
            "reference": self.reference,
            "rows": self.rows,
            "controls": self.controls,
            "prompts": self.prompts,
            "groups": [asdict(group) for group in self.groups],
        }


def summarise(
    groups: list[ScoredGroup], contexts: list[str], threshold: float, resamples: int, seed: int, reference: str = "none"
) -> Analysis:
    """Averages over prompts with prompt-level bootstrap intervals (95%).

    Each metric is averaged over the prompts on which every context defines it (paired intersection); a context defines
    a prompt's metrics if it has something to show for each judged rollout. Differences from `reference` resample the
    prompts of both together; there are none where it is not among the contexts. ValueError if no group defines an AUC
    under any context.
    """
    conditions = list(dict.fromkeys(name for group in groups for name in group.scores))
    values = {name: _values(groups, name, threshold) for name in conditions}
    counts = _counts(groups, threshold)
    if not any(value is not None for name in values for value in values[name]["auc"]):
        raise ValueError(
            f"none of {len(groups)} groups holds a success and a failure (reward threshold {threshold:g}) that a "
            f"context can be scored on: {counts}; sample more prompts, or choose a task that is neither too easy nor "
            "too hard"
        )
    rows = [row for metric in METRICS for row in _rows(values, contexts, metric, resamples, seed, reference)]
    _warn_of_empty(rows, len(groups))
    matched = [name for name in contexts if name + MATCHED in values]
    controls = [_control(groups, values, name, threshold, resamples, seed) for name in matched]
    return Analysis(counts, reference, rows, controls, groups, values)


def judged(
    group: ScoredGroup, numbers: list[float | None], threshold: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]] | None:
    """Numbers, rewards and successes of the judged rollouts; None if one of them has no number."""
    pairs = [(n, r) for n, r in zip(numbers, group.rewards, strict=True) if r is not None]
    if any(number is None for number, _ in pairs):
        return None
    columns = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return columns[0], columns[1], columns[1] >= threshold


def _values(groups: list[ScoredGroup], name: str, threshold: float) -> dict[str, list[float | None]]:
    data = [judged(group, group.scores[name], threshold) if name in group.scores else None for group in groups]
    values = {
        metric: [None if entry is None else measure(*entry) for entry in data] for metric, measure in MEASURES.items()
    }
    whole = [entry for entry in data if entry is not None]
    brier = iter(brier_scores([entry[0] for entry in whole], [entry[2] for entry in whole]))
    return values | {BRIER: [None if entry is None else next(brier) for entry in data]}


def _rows(values: Values, contexts: list[str], metric: str, resamples: int, seed: int, reference: str) -> list[Row]:
    columns = {name: np.array(values[name][metric], dtype=np.float64) for name in contexts}  # None becomes nan
    paired = ~np.isnan(np.stack(list(columns.values()))).any(axis=0)
    rows = []
    for name, column in columns.items():
        defined = int((~np.isnan(column)).sum())
        row = {"context": name, "metric": metric, "prompts": int(paired.sum())}
        row |= _mean(column[paired], "", resamples, seed)
        if reference in columns and name != reference:
            row |= _mean((column - columns[reference])[paired], "difference", resamples, seed)
        else:
            row |= {"difference": None, "difference_low": None, "difference_high": None}
        row |= {"unpaired_value": float(np.nanmean(column)) if defined else None}
        rows.append(row | {"defined": defined, "undefined": len(column) - defined})
    return rows


def _mean(values: NDArray[np.float64], name: str, resamples: int, seed: int) -> Row:
    low, high = bootstrap_interval(values, resamples, seed)
    prefix = f"{name}_" if name else ""
    return {
        name or "value": float(values.mean()) if len(values) else None,
        f"{prefix}low": low,
        f"{prefix}high": high,
    }


def _control(groups: list[ScoredGroup], values: Values, name: str, threshold: float, resamples: int, seed: int) -> Row:
    """AUC of a context as trained, of counting the shown peers, and with matched numbers of them: on the prompts that
    define all three, and `none` if it was scored."""
    counted: list[float | None] = []
    for group in groups:
        numbers = [
            None if s is None else float(s[1] - s[0]) for s in group.shown.get(name, [None] * len(group.rewards))
        ]
        entry = judged(group, numbers, threshold)
        counted.append(None if entry is None else auc(*entry))
    columns = {"auc": values[name]["auc"], "composition_auc": counted, "matched_auc": values[name + MATCHED]["auc"]}
    if "none" in values:
        columns["none_auc"] = values["none"]["auc"]
    table = np.array(list(columns.values()), dtype=np.float64)
    table = table[:, ~np.isnan(table).any(axis=0)]
    row: Row = {"context": name, "prompts": table.shape[1]}
    for key, column in zip(columns, table, strict=True):
        row |= _mean(column, key, resamples, seed)
    if "none" in values:
        row |= _mean(table[2] - table[3], "matched_difference", resamples, seed)
    return row


def _counts(groups: list[ScoredGroup], threshold: float) -> dict[str, Any]:
    rewards = [[r for r in group.rewards if r is not None] for group in groups]
    by_length = [judged(group, [-float(length) for length in group.lengths], threshold) for group in groups]
    shorter = [value for entry in by_length if entry is not None and (value := auc(*entry)) is not None]
    mixed = [
        [r >= threshold for r in row] for row in rewards if any(r >= threshold for r in row) and min(row) < threshold
    ]
    return {
        "groups": len(groups),
        "rollouts": sum(len(group.rewards) for group in groups),
        "unjudged_rollouts": sum(group.rewards.count(None) for group in groups),
        "groups_of_one": sum(len(row) < 2 for row in rewards),
        "uniform_groups": sum(len(row) > 1 and len(set(row)) == 1 for row in rewards),
        "mixed_groups": len(mixed),
        "success_rate_of_mixed": float(np.mean([np.mean(row) for row in mixed])) if mixed else None,
        "shorter_first_auc": float(np.mean(shorter)) if shorter else None,  # what length alone would reach
        "tokens_computed": sum(group.tokens_computed for group in groups),
        "tokens_total": sum(group.tokens_total for group in groups),
        "scoring_seconds": sum(group.seconds for group in groups),
    }


def _warn_of_empty(rows: list[Row], groups: int) -> None:
    for row in rows:
        if row["prompts"] == 0 and row["metric"] == "auc":
            logger.warning(
                "no prompt defines the AUC of all contexts (%s does on %d of %d groups): analyse fewer contexts, or "
                "more rollouts a prompt", row["context"], row["defined"], groups,
            )  # fmt: skip
