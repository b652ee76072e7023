"""Table and plots of `bench tree`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from .tree import GOALS, UNITS

COLUMNS = ("case", "plain", "tree", "ratio", "goal", "")


def rows(record: dict[str, Any]) -> list[list[str]]:
    """A line for each case: medians with the lowest and highest run."""
    lines = []
    for case, (title, goal) in GOALS.items():
        found = record["cases"].get(case)
        if found is None:
            lines.append([title, "-", "-", "-", f"{goal:.2f}", "not run"])
            continue
        unit, factor = UNITS.get(case, ("s", 1.0))
        cells = [spread(found["ways"][way], unit, factor) for way in ("plain", "tree")]
        verdict = "small model" if record.get("quick") else "met" if found["ratio"] <= goal else "not met"
        lines.append([title, *cells, f"{found['ratio']:.2f}", f"{goal:.2f}", verdict])
    return lines


def spread(way: dict[str, Any], unit: str, factor: float) -> str:
    middle, low, high = (way[key] * factor for key in ("median", "low", "high"))
    return f"{middle:.3g} {unit}" if len(way["runs"]) == 1 else f"{middle:.3g} {unit} ({low:.3g}–{high:.3g})"


def show(console: Any, record: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title="Prefix trees against transformers", title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows(record):
        table.add_row(*row)
    console.print(table)
    for line in notes(record):
        console.print(line, style="dim", highlight=False)


def notes(record: dict[str, Any]) -> list[str]:
    lines = []
    for case, (title, _) in GOALS.items():
        found = record["cases"].get(case)
        if found:
            error = f"; relative difference {found['error']:.0e}" if "error" in found else ""
            lines.append(f"{title}: {found['note']}{error}")
    if "machine" in record:
        commits = sorted({row["commit"] for row in record["cases"].values()})
        dates = sorted({row["when"] for row in record["cases"].values()})
        described = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
        lines.append(f"machine: {described}; {', '.join(dates)}, commit {', '.join(commits)}")
    return lines


def markdown(record: dict[str, Any]) -> str:
    cells = [list(COLUMNS), ["---"] * len(COLUMNS), *rows(record)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in cells)
    return table + "\n\n" + "\n".join(f"- {line}" for line in notes(record))


def plot_speedup(record: dict[str, Any], path: Path) -> None:
    """Left: tokens saved by group size, with the measured speed-ups. Right: measured, by context."""
    from matplotlib.figure import Figure

    from . import tree_cases

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shape, sizes = tree_cases.Shape(), [2, 4, 8, 16, 32]
    for context in ("none", "1s", "2s", "2s1f", "all"):
        groups = [tree_cases.random_group(size, shape.prompt, shape.rollout, 49152) for size in sizes]
        saved = [tree_cases.sharing(tree_cases.teacher_pairs(group, context)) for group in groups]
        left.plot(sizes, [total / unique for unique, total in saved], label=f"{context}, tokens saved")
    cases = record["cases"]
    curve = cases.get("curve", {"groups": {}, "contexts": {}})
    measured = {int(size): 1 / ratio for size, ratio in curve["groups"].items()}
    measured |= {size: 1 / cases[f"teacher-{size}"]["ratio"] for size in (8, 16) if f"teacher-{size}" in cases}
    left.plot(measured.keys(), measured.values(), "ko", label="2s1f, measured time")
    left.set(xscale="log", xlabel="rollouts of the group", ylabel="speed-up", title="prompt 64, rollouts 128")
    left.set_xticks(sizes, [str(size) for size in sizes])
    left.minorticks_off()
    left.legend(fontsize=8)
    names = list(curve["contexts"])
    if not names:
        right.text(0.5, 0.5, "case curve: not run", ha="center", transform=right.transAxes)
    right.barh(names, [1 / curve["contexts"][name] for name in names])
    right.invert_yaxis()
    tokens = shape.analysis_rollout * 2
    right.set(xlabel="measured speed-up", title=f"by context, G=8, prompt 64, rollouts {tokens}")
    for axes in (left, right):
        axes.axvline(1, color="grey", lw=0.5) if axes is right else axes.axhline(1, color="grey", lw=0.5)
    figure.savefig(path, dpi=120)


def plot_pack(path: Path) -> None:
    """One group of 8 under 2s1f: rows of the pack coloured by what they hold, and the rows each sequence reads."""
    import torch
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from mopd_kernels import PrefixTree

    from . import tree_cases

    shape = tree_cases.Shape()
    group = tree_cases.random_group(8, shape.prompt, shape.rollout, 49152)
    pairs = tree_cases.teacher_pairs(group, "2s1f")
    tree = PrefixTree.pack([torch.tensor(read + rollout) for read, rollout in pairs])
    colours = {"prompt": "#4c78a8", "peers and instruction": "#f2a541", "rollout": "#59a14f"}
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (read, _) in enumerate(pairs):
        kinds = {"prompt": (0, shape.prompt), "peers and instruction": (shape.prompt, len(read))}
        for kind, span in (kinds | {"rollout": (len(read), tree.length(i))}).items():
            for start, stop in pieces(tree.rows(i, *span).tolist()):
                axes.barh(i + 1, stop - start, left=start, color=colours[kind], height=0.7)
                axes.barh(0, stop - start, left=start, color=colours[kind], height=0.9)
    for node in tree.nodes[1:]:
        axes.axvline(node.start, color="k", lw=0.3)
    axes.set_yticks(range(9), ["pack", *(f"sequence {i}" for i in range(8))])
    axes.invert_yaxis()
    axes.set(xlabel="row of the pack", xlim=(0, tree.unique_tokens))
    axes.set_title(f"{tree.unique_tokens} rows hold {tree.total_tokens} tokens; thin lines: where the tree branches")
    figure.legend(handles=[Patch(color=c, label=k) for k, c in colours.items()], loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def pieces(indices: list[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers as [start, stop)."""
    cuts = [0, *(k for k in range(1, len(indices)) if indices[k] != indices[k - 1] + 1), len(indices)]
    return [(indices[a], indices[b - 1] + 1) for a, b in pairwise(cuts)]
