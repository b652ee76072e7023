"""`mopd diversity`: diversity and pass@k curves of saved rollouts over the steps of runs, or between files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..files import write_json
from .alignment import bootstrap_interval, statistics
from .diversity import group_diversity
from .groups import RolloutFiles, rollout_paths

console = Console()
RESAMPLES = 2000
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class DiversityOptions:
    """What `mopd diversity` does; `mopd diversity --help` explains each."""

    rollouts: list[str]
    output: str
    points: int
    code: bool
    threshold: float
    skip_bad_lines: bool


@dataclass(frozen=True)
class Point:
    """Some files of a series, pooled."""

    series: str
    label: str
    paths: list[Path]


def diversity_command(options: DiversityOptions) -> list[dict[str, Any]]:
    """Measure, print, plot, write diversity.json; its points."""
    statistics()  # asked for before any work
    if options.points < 1:
        raise ValueError(f"expected --points >= 1, got {options.points}")
    points = [point for name in options.rollouts for point in points_of(name, options.points)]
    sources = [RolloutFiles(point.paths, None, skip_bad_lines=options.skip_bad_lines) for point in points]
    results = []
    with Progress(console=console) as progress:
        bar = progress.add_task("reading", total=sum(source.size for source in sources))
        for point, source in zip(points, sources, strict=True):
            rows = []
            for saved in source:
                rows.append(group_diversity(saved.group, options.threshold, options.code))
                progress.update(bar, completed=sum(source.bytes_read for source in sources))
            if not rows:
                raise ValueError(f"{[str(path) for path in point.paths]} hold no rollouts")
            about = {"series": point.series, "label": point.label, "groups": len(rows), "bad_lines": source.bad_lines}
            results.append(about | averages(rows))
    output = Path(options.output)
    write_json(
        output / "diversity.json", {"files": options.rollouts, "threshold": options.threshold, "points": results}
    )
    plot_diversity(results, output / "diversity.png")
    console.print(diversity_table(results))
    dropped = sum(source.bad_lines for source in sources)
    if dropped:
        first = next(source.named[0] for source in sources if source.named)
        console.print(f"{dropped} bad lines dropped, first: {first}", highlight=False, soft_wrap=True)
    console.print(f"Written: {output}", highlight=False)
    return results


def points_of(name: str, most: int) -> list[Point]:
    """A file is one point; the step files of a run are pooled, consecutive ones, into at most `most`."""
    paths = rollout_paths([name])
    if len(paths) == 1:
        return [Point(name, paths[0].stem, paths)]
    chunks = [chunk.tolist() for chunk in np.array_split(np.arange(len(paths)), min(most, len(paths)))]
    pooled = [[paths[i] for i in chunk] for chunk in chunks]
    return [Point(name, _label(files[0], files[-1]), files) for files in pooled]


def _label(first: Path, last: Path) -> str:
    """step-000001, step-000004 -> 1-4"""
    ends = list(dict.fromkeys(path.stem.removeprefix("step-").lstrip("0") or "0" for path in (first, last)))
    return "-".join(ends)


def averages(rows: Iterable[dict[str, float | None]]) -> dict[str, Any]:
    """Means over the groups that define a measure, 95% intervals over groups, and how many do not define it."""
    rows, result = list(rows), {}
    for name in dict.fromkeys(name for row in rows for name in row):
        column = [row.get(name) for row in rows]
        values = np.array([value for value in column if value is not None], dtype=np.float64)
        low, high = bootstrap_interval(values, RESAMPLES, seed=0)
        value = float(values.mean()) if len(values) else None
        result[name] = {"value": value, "low": low, "high": high, "undefined": len(column) - len(values)}
    return result


def measures(results: list[dict[str, Any]]) -> list[str]:
    """Names of what was measured; pass@1 and the largest pass@k stand for the curve."""
    names = list(dict.fromkeys(name for row in results for name, value in row.items() if isinstance(value, dict)))
    curve = [name for name in names if name.startswith("pass@")]
    return [name for name in names if name not in curve[1:-1]]


def short_names(results: list[dict[str, Any]]) -> dict[str, str]:
    """The last part of each series' path, or the whole where last parts coincide."""
    paths = list(dict.fromkeys(row["series"] for row in results))
    last = [Path(path).stem for path in paths]
    return {path: name if last.count(name) == 1 else path for path, name in zip(paths, last, strict=True)}


def diversity_table(results: list[dict[str, Any]]) -> Table:
    table = Table(
        title="diversity of the rollouts of a prompt", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    names, short = measures(results), short_names(results)
    for heading in ("run", "steps", "groups", *(name.replace("_", "\n") for name in names)):
        table.add_column(heading, justify="left" if heading in ("run", "steps") else "right")
    for row in results:
        values = [row[name]["value"] if name in row else None for name in names]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        table.add_row(short[row["series"]], row["label"], str(row["groups"]), *cells)
    return table


def plot_diversity(results: list[dict[str, Any]], path: Path) -> None:
    """A panel a measure, over the points of each series; and pass@k over k, the first and the last point of each."""
    from matplotlib.figure import Figure

    names, short = [name for name in measures(results) if not name.startswith("pass@")], short_names(results)
    series = {
        name: [row for row in results if row["series"] == name] for name in dict.fromkeys(r["series"] for r in results)
    }
    height = -(-(len(names) + 1) // 3)
    figure = Figure(figsize=(10, 3 * height), layout="constrained")
    grid = figure.subplots(height, 3).flatten()
    panels = grid[: len(names) + 1]
    for unused in grid[len(panels) :]:
        unused.remove()
    for axes, name in zip(panels, names, strict=False):
        for color, rows in zip(_colors(series), series.values(), strict=True):
            _curve(axes, [row["label"] for row in rows], [row[name] for row in rows], color)
        axes.set_title(name.replace("_", " "))
        axes.tick_params(axis="x", rotation=45)
    curve = panels[-1]
    for color, (label, rows) in zip(_colors(series), series.items(), strict=True):
        for row, style in {id(row): (row, style) for row, style in ((rows[0], "--"), (rows[-1], "-"))}.values():
            ks = sorted(int(name.removeprefix("pass@")) for name in row if name.startswith("pass@"))
            text = f"{short[label]} {row['label']}"
            _curve(curve, ks, [row[f"pass@{k}"] for k in ks], color, style, text)
    curve.set(title="pass@k (dashed: first point)", xlabel="k", ylim=(0, 1))
    if curve.lines:
        curve.legend(fontsize="x-small", loc="lower right")
    for axes in panels:
        axes.grid(alpha=0.3)
    staging = path.with_suffix(".tmp.png")
    figure.savefig(staging, dpi=150)
    staging.replace(path)


def _colors(series: dict[str, Any]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(series))]


def _curve(
    axes: Any, x: list[Any], values: list[dict[str, Any]], color: str, style: str = "-", label: str = ""
) -> None:
    """Means as a line, intervals as bars; gaps where a measure is undefined."""
    y = np.array([np.nan if v["value"] is None else v["value"] for v in values], dtype=np.float64)
    ends = np.array([[v["low"], v["high"]] for v in values], dtype=np.float64).T.reshape(2, -1)
    errors = np.nan_to_num(np.abs(ends - y))
    axes.errorbar(x, y, errors, color=color, linestyle=style, marker="o", markersize=3, capsize=2, label=label or None)
