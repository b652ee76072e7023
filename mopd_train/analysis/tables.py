"""An analysis as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .summary import METRICS, Analysis


def metrics_table(analysis: Analysis, title: str) -> Table:
    """A row a context; the intervals of the other metrics are in analysis.json."""
    cells = {(row["context"], row["metric"]): row for row in analysis.rows}
    table = Table(
        title=title, caption="means over the prompts that define the metric under every context, 95% intervals"
    )
    table.add_column("context")
    for name in ("AUC", "AUC - none", "prompts", "defined"):
        table.add_column(name, justify="right")
    others = [metric for metric in METRICS if metric != "auc"]
    for metric in others:
        table.add_column(metric.replace("_", " "), justify="right")
    for name in dict.fromkeys(row["context"] for row in analysis.rows):
        row = cells[name, "auc"]
        table.add_row(
            name,
            with_interval(row, "value", ""),
            with_interval(row, "difference", "difference_"),
            str(row["prompts"]),
            str(row["defined"]),
            *(number(cells[name, metric]["value"]) for metric in others),
        )
    return table


def controls_table(analysis: Analysis) -> Table:
    """Whether an AUC is owed to the label leak of leave-one-out."""
    table = Table(title="label-leak control: AUC", caption="matched: every rollout sees equally many of each kind")
    table.add_column("context")
    for name in ("prompts", "as trained", "counting peers", "matched", "matched - none"):
        table.add_column(name, justify="right")
    for row in analysis.controls:
        table.add_row(
            row["context"],
            str(row["prompts"]),
            with_interval(row, "auc", "auc_"),
            number(row["composition_auc"]),
            with_interval(row, "matched_auc", "matched_auc_"),
            with_interval(row, "matched_difference", "matched_difference_"),
        )
    return table


def with_interval(row: dict[str, Any], key: str, prefix: str) -> str:
    low, high = row.get(f"{prefix}low"), row.get(f"{prefix}high")
    interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return number(row.get(key)) + interval


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
