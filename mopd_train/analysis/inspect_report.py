"""`mopd report`: a run as one HTML file: curves, time by phase, scores, settings, and what it sampled on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import Config
from ..files import read_json, read_jsonl, replacing
from ..rundir import METRICS, RUN
from ..tasks import as_messages
from .inspect_page import as_text, render, shortened, turns, verdict

STEP = re.compile(r"step-(\d+)\.jsonl")
SHOWN = ("prompt", "completion", "completion_ids", "reward")  # of every rollout
OWN_COLUMNS = {*SHOWN, "finished", "feedback", "group", "step", "model", "tokenizer"}
console = Console()


def report_command(run: Path, output: Path | None, steps: int, groups: int) -> Path:
    """Write the page of the run in folder `run`; its path. Works on a run that is still going on."""
    for name, value in (("--steps", steps), ("--groups", groups)):
        if value < 0:
            raise ValueError(f"expected {name} >= 0, got {value}")
    output = output or run / "report.html"
    page = render("report", f"Run {run.name}", report_data(run, steps, groups))
    with replacing(output) as handle:
        handle.write(page)
    console.print(f"{output.stat().st_size / 1e6:.2f} MB: {output}", highlight=False)
    return output


def report_data(run: Path, steps: int, groups: int) -> dict[str, Any]:
    """What page/report.js draws. FileNotFoundError where `run` is no run's folder."""
    if not (run / RUN).is_file() or not (run / METRICS).is_file():
        raise FileNotFoundError(f"{run} is no run: it has no {RUN} with {METRICS}; name the output_dir of mopd train")
    config = read_json(run / RUN)
    rows = read_jsonl(run / METRICS)
    threshold = float(_setting(config, "context", "success_reward_threshold"))
    planned = _setting(config, "training", "max_steps")
    about = (
        f"{_setting(config, 'data', 'task')}, {_setting(config, 'model', 'model_name_or_path')}, "
        f"context {_setting(config, 'context', 'context')}, {len(rows)} of {planned} steps"
    )
    last = rows[-1]["step"] if rows else 0
    return {
        "about": about,
        "steps": [row["step"] for row in rows],
        "metrics": _columns(rows),
        "evaluations": _evaluations(run, last),
        "settings": _settings(config),
        "samples": [
            {"step": step, "groups": list(islice(_sampled(path, threshold), groups))}
            for step, path in _spaced(_completions(run), steps)
        ],
    }


def _setting(config: dict[str, Any], section: str, key: str) -> Any:
    """Of the run, or today's default where the run was made by a version without that field."""
    return config.get(section, {}).get(key, Config().as_dict()[section][key])


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Every number that some step reports, None at the steps that lack it; infinities and NaN are lacking as well."""
    names = list(dict.fromkeys(name for row in rows for name, x in row.items() if _is_number(x) and name != "step"))
    return {name: [row[name] if _is_number(row.get(name)) else None for row in rows] for name in names}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def _evaluations(run: Path, last: int) -> list[dict[str, Any]]:
    """evaluation-before.json, -<step>.json, -after.json, in the order of their steps."""
    found = []
    for path in run.glob("evaluation-*.json"):
        name = path.stem.removeprefix("evaluation-")
        digits = re.search(r"\d+", name)
        step = {"before": 0, "after": last}.get(name, int(digits[0]) if digits else last)
        found.append({"name": name, "step": step, **read_json(path)})
    return sorted(found, key=lambda scores: (scores["step"], scores["name"] != "before"))


def _settings(config: dict[str, Any]) -> list[list[Any]]:
    """[section.key, value, whether it is today's default]"""
    defaults = Config().as_dict()
    return [
        [f"{section}.{key}", json.dumps(value, ensure_ascii=False), defaults.get(section, {}).get(key) == value]
        for section, fields in config.items()
        for key, value in fields.items()
    ]


def _completions(run: Path) -> list[tuple[int, Path]]:
    found = [(STEP.fullmatch(path.name), path) for path in (run / "completions").glob("*.jsonl")]
    return sorted((int(match[1]), path) for match, path in found if match)


def _spaced(items: list[Any], count: int) -> list[Any]:
    """At most `count` of them, the first and the last included."""
    if count >= len(items):
        return items
    if count == 1:
        return items[-1:]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _sampled(path: Path, threshold: float) -> Iterator[dict[str, Any]]:
    """Groups of a completions file: consecutive lines of one prompt. Read no further than they are asked for."""
    with open(path, encoding="utf-8") as handle:
        records = (_record(line, f"{path}:{n}") for n, line in enumerate(handle, 1) if line.endswith("\n"))
        for _, lines in groupby(records, key=lambda record: (record.get("group"), record["prompt"])):
            group = list(lines)
            yield {
                "prompt": turns(as_messages(group[0]["prompt"])),
                "columns": {k: shortened(v) for k, v in group[0].items() if k not in OWN_COLUMNS},
                "rollouts": [
                    {
                        "text": record["completion"],
                        "verdict": verdict(record["reward"], threshold),
                        "reward": record["reward"],
                        "feedback": as_text(record.get("feedback")),
                        "tokens": len(record["completion_ids"]),
                        "finished": record.get("finished", True),
                    }
                    for record in group
                ],
            }


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    missing = [key for key in SHOWN if not isinstance(record, dict) or key not in record]
    if missing:
        raise ValueError(f"{where} is no rollout: it has no {missing[0]!r}")
    return record
