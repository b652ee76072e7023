"""What `bench cpu` found, as a table on the terminal, and as results, plots and docs/performance.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import phases

ROOT = Path(__file__).parents[1]
MARK = "<!-- written by python -m bench cpu --docs -->"


def show(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for title, header, rows in tables(record):
        table = Table(title=escape(title), title_justify="left")
        for column in header:
            table.add_column(column, justify="left" if column in ("provider", "loss", "phase") else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(escape(where(record)))


def where(record: dict[str, Any]) -> str:
    m = record["machine"]
    return (
        f"{m['processor']}, {m['threads']} threads, {m['level']}, torch {m['torch']}, commit {m['commit']}, "
        f"load {m['load']:.1f} when begun{', quick' if record['quick'] else ''}"
    )


def tables(record: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of all that a record holds."""
    found = [case_table(case) for case in record.get("cases", [])]
    found += [phases.table(profile) for profile in record.get("phases", [])]
    if record.get("scaling"):
        found.append(scaling_table(record["scaling"]))
    if record.get("filters"):
        found.append(filter_table(record["filters"]))
    return found


def case_table(case: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    title = f"{case['name']}: {case['task']}, N={case['N']} H={case['H']} V={case['V']}"
    title += f" alpha={case['alpha']}" if case["task"] != "score" else f" K={case['K']}"
    header = ["provider", "seconds", "quartiles", "/ GEMMs", "/ GEMMs (cpu)", "extra MB", "error loss, dH, dW"]
    rows = [[f"{case['products']} plain GEMMs", *_times(case["floor"]), "1.00", "1.00", "", ""]]
    for row in case["rows"]:
        rows.append([row["provider"], *_cells(row, case["floor"])])
    return title, header, rows


def _times(timed: dict[str, Any]) -> list[str]:
    s = timed["seconds"]
    return [f"{s['median']:.3f}", f"{s['low']:.3f}-{s['high']:.3f}"]


def _cells(row: dict[str, Any], floor: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return ["", "", "", "", "", f"not run: {row['skipped']}"]
    error = ", ".join(f"{value:.0e}" for value in row["errors"])
    if row["wrong"]:
        return ["", "", "", "", "", f"WRONG: {error}"]
    return [*_times(row), *(f"{value:.2f}" for value in ratios(row, floor)), _extra(row), error]


def ratios(row: dict[str, Any], floor: dict[str, Any]) -> list[float]:
    """Times over the floor's, by the clock and by the processor."""
    return [row[clock]["median"] / floor[clock]["median"] for clock in ("seconds", "cpu_seconds")]


def _extra(row: dict[str, Any]) -> str:
    """Beyond inputs, dH and dW."""
    return f"{(row['extra_bytes'] - row['gradient_bytes']) / 1e6:.0f}" if "extra_bytes" in row else ""


def scaling_table(scaling: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for found in scaling:
        for size in ("N", "V"):
            for clock, values in zip(("seconds", "cpu"), found[size], strict=True):
                rows.append([found["provider"], size, clock, *(f"{v:.3f}" for v in values[:-1]), f"{values[-1]:.2f}"])
    header = ["provider", "grows", "clock", "quarter", "half", "full", "exponent"]
    return "growth with tokens N (256, 512, 1024) and vocabulary V (12288, 24576, 49152)", header, rows


def filter_table(filters: list[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    names = {0.0: "forward KL", 0.5: "JSD", 1.0: "reverse KL"}
    rows = []
    for found in filters:
        threshold = f"{found['filter']:.0e}" if found["filter"] else "exact"
        times = [f"{found[clock]:.2f}" for clock in ("seconds", "cpu_seconds")]
        rows.append([names[found["alpha"]], threshold, *(f"{e:.1e}" for e in found["errors"][1:]), *times])
    return (
        "grad_filter on real hidden states",
        ["loss", "filter", "dH error", "dW error", "/ GEMMs", "/ GEMMs (cpu)"],
        rows,
    )


def write(record: dict[str, Any], results: Path) -> None:
    """The record, its plots, and its tables in docs/performance.md (docs/cpu.md for filters)."""
    results.mkdir(exist_ok=True)
    kind = "filters" if "filters" in record else "cpu"
    (results / f"{kind}.json").write_text(json.dumps(record, indent=1) + "\n")
    page = ROOT / "docs" / ("cpu.md" if kind == "filters" else "performance.md")
    parts = [MARK, "", f"Measured on {where(record)}.", ""]
    if kind == "cpu":
        parts += [*goals(record), *plots(record)]
    for title, header, rows in tables(record):
        parts += [f"### {title}", "", *_markdown(header, rows), ""]
    page.parent.mkdir(exist_ok=True)
    before = page.read_text().split(MARK)[0] if page.is_file() else f"# {page.stem.capitalize()}\n\n"
    page.write_text(before + "\n".join(parts).rstrip() + "\n")


def _markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def goals(record: dict[str, Any]) -> list[str]:
    """The project's goals on SmolLM2 and what was measured."""
    cases = {case["name"]: case for case in record["cases"]}
    rows = {name: {row["provider"]: row for row in case["rows"] if "seconds" in row} for name, case in cases.items()}
    lines = []
    if "smollm2" in cases:
        floor, main = cases["smollm2"]["floor"], rows["smollm2"]
        exact, fast, dense = (main.get(name) for name in ("ours, exact", "ours, filter 1e-6", "dense"))
        liger = [row for name, row in main.items() if name.startswith("Liger")]
        best = min(liger, key=lambda row: row["seconds"]["median"]) if liger else None
        named = f"{best['provider']}{' (its best)' if len(liger) > 1 else ''}" if best else "Liger"
        lines += [
            ["exact / four plain GEMMs", "1.10", _ratio(exact, floor)],
            ["filtered / four plain GEMMs", "0.70", _ratio(fast, floor)],
            ["filtered / torch.compile of the dense formula", "0.70", _ratio(fast, main.get("torch.compile of dense"))],
            [f"filtered / {named}", "0.45", _ratio(fast, best)],
            ["eager backend / four plain GEMMs", "1.25", _ratio(main.get("ours, eager backend"), floor)],
            ["extra memory beyond gradients / dense eager", "0.10", _memory(exact, dense)],
        ]
    for name in ("smollm2, scoring", "smollm2, scoring 4 contexts"):
        if name in cases:
            plain = f"{cases[name]['products']} plain GEMM{'s' if cases[name]['products'] > 1 else ''}"
            for provider in ("ours, exact", "ours, eager backend"):
                goal = "1.10" if provider == "ours, exact" else ""
                lines.append(
                    [f"{name}, {provider} / {plain}", goal, _ratio(rows[name].get(provider), cases[name]["floor"])]
                )
    for found in record["scaling"]:
        for size in ("N", "V"):
            by_clock, by_cpu = (values[-1] for values in found[size])
            lines.append([f"growth with {size}, {found['provider']}", "1.05", f"{by_clock:.2f} ({by_cpu:.2f})"])
    if not lines:
        return []
    return ["### Goals", "", *_markdown(["", "goal", "measured (by processor time)"], lines), ""]


def _ratio(row: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    if row is None or other is None:
        return "not measured"
    by_clock, by_cpu = ratios(row, other)
    return f"{by_clock:.2f} ({by_cpu:.2f})"


def _memory(row: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    if row is None or other is None or "extra_bytes" not in row or "extra_bytes" not in other:
        return "not measured"
    own, dense = (r["extra_bytes"] - r["gradient_bytes"] for r in (row, other))
    return f"{own / dense:.2f} ({own / 1e6:.0f} of {dense / 1e6:.0f} MB)"


def plots(record: dict[str, Any]) -> list[str]:
    """Bars of time and memory for each case, as PNG files; returns the lines that show them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder, lines = ROOT / "docs" / "img", []
    folder.mkdir(parents=True, exist_ok=True)
    for case in record["cases"]:
        rows = [row for row in case["rows"] if "seconds" in row]
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 0.4 * len(rows) + 1.4), sharey=True)
        names = [row["provider"] for row in rows]
        colors = ["#1f77b4" if name.startswith("ours") else "#b0b0b0" for name in names]
        left.barh(names, [ratios(row, case["floor"])[0] for row in rows], color=colors)
        left.axvline(1, color="black", linewidth=0.8)
        left.set_xlabel(f"time / {case['products']} plain GEMMs")
        right.barh(
            names, [(row.get("extra_bytes", 0) - row.get("gradient_bytes", 0)) / 1e6 for row in rows], color=colors
        )
        right.set_xlabel("extra memory beyond gradients, MB")
        left.invert_yaxis()
        figure.suptitle(f"{case['name']}, N={case['N']} V={case['V']}")
        figure.tight_layout()
        path = folder / f"cpu-{''.join(c if c.isalnum() else '-' for c in case['name'])}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        lines += [f"![{case['name']}](img/{path.name})", ""]
    return lines
