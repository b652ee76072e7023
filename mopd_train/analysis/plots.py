"""An analysis as plots; colours that colour-blind readers can tell apart (Okabe and Ito)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .controls import MATCHED
from .summary import Analysis

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


def plot_auc(analysis: Analysis, path: Path) -> None:
    """Forest plot: AUC by context with intervals; matched peers and counting peers beside it."""
    rows = [row for row in analysis.rows if row["metric"] == "auc" and row["value"] is not None]
    controls = {row["context"]: row for row in analysis.controls if row["prompts"]}
    figure, axes = _figure(len(rows))
    for place, row in enumerate(reversed(rows)):
        _point(axes, place, row, "value", "", BLUE, "o", "as trained")
        control = controls.get(row["context"])
        if control:
            _point(axes, place - 0.25, control, "matched_auc", "matched_auc_", ORANGE, "s", "matched peers")
            axes.plot(control["composition_auc"], place - 0.25, "x", color=GREY, label="counting peers alone")
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="AUC of the teacher's score against the verdict, 95% interval")
    axes.set_yticks(range(len(rows)), [row["context"] for row in reversed(rows)])
    _legend(axes)
    _save(figure, path)


def plot_margins(analysis: Analysis, path: Path) -> None:
    """Distribution over prompts of (mean score of successes - mean score of failures) by context."""
    margins: dict[str, list[float]] = {}
    for row in analysis.prompts:
        if row["margin"] is not None and not row["context"].endswith(MATCHED):
            margins.setdefault(row["context"], []).append(row["margin"])
    names = list(reversed(margins))
    figure, axes = _figure(len(names))
    boxes = axes.boxplot([margins[name] for name in names], orientation="horizontal", showfliers=False, widths=0.6)
    for median in boxes["medians"]:
        median.set(color=ORANGE, linewidth=2)
    for place, name in enumerate(names, start=1):
        axes.plot(margins[name], [place] * len(margins[name]), "|", color=BLUE, alpha=0.6)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(1, len(names) + 1), names)
    axes.set(xlabel="score of successes - score of failures, nats per token; one mark a prompt")
    _save(figure, path)


def _figure(rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.4 + 0.42 * rows), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3, axis="x")
    return figure, axes


def _point(
    axes: Any, place: float, row: dict[str, Any], key: str, prefix: str, color: str, marker: str, label: str
) -> None:
    axes.plot(row[key], place, marker, color=color, label=label)
    if row[f"{prefix}low"] is not None:
        axes.plot([row[f"{prefix}low"], row[f"{prefix}high"]], [place, place], color=color)


def _legend(axes: Any) -> None:
    """Each label once."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), loc="best", fontsize="small")


def _save(figure: Any, path: Path) -> None:
    staging = path.with_suffix(".tmp.png")
    figure.savefig(staging, dpi=150)
    staging.replace(path)
