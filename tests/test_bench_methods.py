"""`bench methods` and `bench sdpo`: what is collected, and the tables that docs quote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import methods, sdpo
from bench.__main__ import main


def finished(folder: Path, seed: int, rewards: list[float], after: float) -> None:
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"step": i, "reward": r, "time/rollout": 2.0, "time/student": i}) for i, r in enumerate(rewards)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for when, score in (("before", 0.25), ("after", after)):
        held_out = {"mean_at_k": score, "pass_at_k": 2 * score, "completion_length": 9.0}
        (folder / f"evaluation-{when}.json").write_text(json.dumps(held_out))
    (folder / "run.json").write_text(json.dumps({"training": {"seed": seed}}))
    (folder / "usage.json").write_text(json.dumps({"peak_bytes": 3_000_000_000, "commit": "abc"}))


def test_finished_runs_are_collected_and_unfinished_ones_left_out(tmp_path, capsys):
    finished(tmp_path / "grpo-0", 0, [0.0, 0.5, 1.0], 0.25)
    finished(tmp_path / "grpo-1", 1, [0.2, 0.2, 0.2], 0.5)
    finished(tmp_path / "sdpo-0", 0, [0.5], 0.5)
    (tmp_path / "sdpo-0" / methods.FINISHED).unlink()  # told to stop, which is no failure
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    assert main(["methods", "--collect", "--runs", str(tmp_path), "--out", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "| GRPO | 2 | 0.250 | 0.250, 0.500 | **0.375** | 0.500, 1.000 | 3.0 | 3.0 GB |" in printed
    assert "SDPO" not in printed
    record = json.loads(out.read_text())["runs"]
    assert list(record) == ["grpo"]
    assert [run["reward"] for run in record["grpo"]] == [[0.0, 0.5, 1.0], [0.2, 0.2, 0.2]]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert methods.smooth([3.0, 0.0, 3.0, 6.0]) == [3.0, 1.5, 2.0, 3.0]


def test_no_finished_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        main(["methods", "--collect", "--runs", str(tmp_path), "--out", str(tmp_path / "out.json")])


def test_opd_without_its_teacher_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="run grpo first"):
        main(["methods", "--only", "opd", "--seeds", "0", "--runs", str(tmp_path)])


def test_sdpo_table_gives_ratios_of_medians():
    def process(seconds: list[float], peak: int) -> dict:
        steps = [{"seconds": s, "phases": {"rollout": s / 2}, "tokens": 100} for s in seconds]
        return {"steps": steps, "extra_bytes": peak, "state_bytes": 2_000_000_000}

    theirs = sdpo.summary([process([10.0, 14.0], 7_000_000_000), process([12.0], 6_000_000_000)])
    ours = sdpo.summary([process([3.0, 4.0, 2.0], 3_000_000_000)])
    assert (theirs["seconds"], theirs["range"], theirs["extra_bytes"]) == (12.0, [10.0, 14.0], 7_000_000_000)
    table = sdpo.markdown({"trl": theirs, "ours": ours})
    assert "| step | 12 s | 3 s | 0.25 |" in table
    assert "| peak memory above both models' weights | 7 GB | 3 GB | 0.43 |" in table
    assert "| the same without gradients and Adam moments | 5 GB | 1 GB | 0.20 |" in table
