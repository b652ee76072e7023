"""An analysis as tables for the terminal, each within 80 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from .summary import METRICS, Analysis


def auc_table(analysis: Analysis, title: str) -> Table:
    """The main result: AUC by context with its interval and its difference from the reference."""
    table = _table(title, "means over the n prompts that every context defines, 95% intervals")
    for name in ("context", "AUC", f"AUC - {analysis.reference}", "n", "defined alone"):
        _column(table, name)
    for row in analysis.rows:
        if row["metric"] == "auc":
            table.add_row(
                row["context"],
                with_interval(row, "value", ""),
                with_interval(row, "difference", "difference_", sign="+"),
                str(row["prompts"]),
                str(row["defined"]),
            )
    return table


def metrics_table(analysis: Analysis) -> Table:
    """The other metrics; their intervals and numbers of prompts are in analysis.json."""
    metrics = [metric for metric in METRICS if metric != "auc"]
    cells = {(row["context"], row["metric"]): row["value"] for row in analysis.rows}
    table = _table("other metrics", "brier: lower is better; margin: nats a token")
    _column(table, "context")
    for metric in metrics:
        _column(table, metric.replace("_", "\n"))
    for name in dict.fromkeys(row["context"] for row in analysis.rows):
        table.add_row(name, *(number(cells[name, metric]) for metric in metrics))
    return table


def controls_table(analysis: Analysis) -> Table:
    """Whether an AUC is owed to the label leak of leave-one-out."""
    table = _table("label-leak control: AUC", "matched: every rollout is shown equally many of each kind")
    for name in ("context", "n", "as\ntrained", "counting\npeers", "matched", "matched - none"):
        _column(table, name)
    for row in analysis.controls:
        table.add_row(
            row["context"],
            str(row["prompts"]),
            number(row["auc"]),
            number(row["composition_auc"]),
            with_interval(row, "matched_auc", "matched_auc_"),
            with_interval(row, "matched_difference", "matched_difference_", sign="+"),
        )
    return table


def _table(title: str, caption: str) -> Table:
    return Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _column(table: Table, name: str) -> None:
    table.add_column(name, justify="left" if name == "context" else "right", no_wrap=True)


def with_interval(row: dict[str, Any], key: str, prefix: str, sign: str = "-") -> str:
    low, high = row.get(f"{prefix}low"), row.get(f"{prefix}high")
    interval = "" if low is None else f" [{low:{sign}.2f}, {high:{sign}.2f}]"
    return number(row.get(key), sign) + interval


def number(value: float | None, sign: str = "-") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"
