"""`bench sandbox`: the file it writes and the table that docs quote, from a few real sessions."""

from __future__ import annotations

import json

import pytest

from bench import sandbox
from bench.__main__ import main
from mopd_train.sandbox import SandboxUnavailable


def test_every_kind_of_run_is_timed(tmp_path, capsys):
    out = tmp_path / "sandbox.json"
    try:
        assert main(["sandbox", "--runs", "2", "--out", str(out)]) == 0
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    record = json.loads(out.read_text())
    assert all(found["least"] <= found["median"] <= found["most"] for found in record["milliseconds"].values())
    assert list(record["milliseconds"]) == [
        "session", "plain Python", "further test of a session", "further call of a session",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert f"| session | {record['milliseconds']['session']['median']:.3g} ms |" in printed
    assert f"by the pool of {record['workers']}" in printed


def test_a_wrong_answer_is_not_timed():
    with pytest.raises(RuntimeError, match="answered '2' instead of '1'"):
        sandbox.expect("2", "1")
