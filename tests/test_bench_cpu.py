"""`bench cpu` on a problem of a few tokens: what is right is timed, what is wrong is said to be."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from bench import cpu, measure, peers, phases, report
from bench.cases import Case, inputs

CASES = {
    "divergence": Case("divergence", N=70, H=8, V=150, alpha=0.5),
    "topk": Case("topk", N=5, H=8, V=150, alpha=0.5),
    "score": Case("score", N=5, H=8, V=150, K=3, products=3),
}
RUN_HERE = ("ours, exact", "ours, filter 1e-7", "ours, eager backend", "dense")


def options(**changes: object) -> argparse.Namespace:
    defaults = {"provider": list(RUN_HERE), "rounds": 2, "quick": False, "no_memory": True}
    return argparse.Namespace(**(defaults | changes))


@pytest.mark.parametrize("name", CASES)
def test_providers_agree_with_float64_and_are_timed(name):
    found = cpu.run(name, CASES[name], options())
    rows = {row["provider"]: row for row in found["rows"]}
    assert set(rows) == {provider for provider in RUN_HERE if name in peers.PROVIDERS[provider].tasks}
    for row in rows.values():
        assert not row["wrong"], row
        assert 0 < row["seconds"]["best"] <= row["seconds"]["median"]
    _, header, table = report.case_table(found)
    assert all(len(line) == len(header) for line in table)


def test_a_wrong_provider_is_reported_and_not_timed(monkeypatch):
    def build(case, p):
        step = peers.ours("eager")(case, p)
        return lambda: tuple(1.001 * result for result in step())

    monkeypatch.setitem(peers.PROVIDERS, "wrong", peers.Provider(build, ("divergence",)))
    found = cpu.run("x", CASES["divergence"], options(provider=["dense", "wrong"]))
    rows = {row["provider"]: row for row in found["rows"]}
    assert rows["wrong"]["wrong"]
    assert "seconds" not in rows["wrong"]
    assert "WRONG: 1e-03" in report.case_table(found)[2][-1][-1]


def test_oracle_is_the_gradient_of_the_loss():
    """Against finite differences along a random direction."""
    case = CASES["divergence"]
    p = inputs(case)
    _, grad_hidden, grad_weight = measure.oracle(case, p)
    directions = [torch.randn_like(x) for x in (p.hidden.detach(), p.weight.detach())]

    def loss(step: float) -> float:
        moved = [x.detach().double() + step * d.double() for x, d in zip((p.hidden, p.weight), directions, strict=True)]
        teacher = p.teacher_hidden[0].double(), p.teacher_weight.double()
        return float(peers.dense_divergence(moved[0], moved[1], *teacher, case.alpha))

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    expected = sum((g * d).sum() for g, d in zip((grad_hidden, grad_weight), directions, strict=True))
    assert slope == pytest.approx(float(expected), rel=1e-6)


def test_exponent_of_known_growth():
    assert measure.exponent([100, 200, 400], [3.0, 6.0, 12.0]) == pytest.approx(1.0)
    assert measure.exponent([100, 200, 400], [1.0, 4.0, 16.0]) == pytest.approx(2.0)


@pytest.mark.parametrize(("backend", "grad_filter"), [("cpu", 0.0), ("cpu", 1e-7), ("eager", 0.0)])
def test_phases_add_up_and_say_what_they_need(backend, grad_filter):
    case = CASES["divergence"]
    rows = phases.profile(case, inputs(case), backend, grad_filter, rounds=1)
    found = {row["phase"]: row for row in rows}
    assert {"z_s and z_t", "statistics", "gradient", "rest", "all"} <= set(found)
    assert ("dW" in found) != ("sparse dH and dW" in found)
    parts = sum(row["seconds"]["median"] for name, row in found.items() if name != "all")
    assert parts == pytest.approx(found["all"]["seconds"]["median"])
    assert found["z_s and z_t"]["flop"] == 4 * 70 * 150 * 8
    assert found["gradient"]["bytes"] == 3 * 4 * 70 * 150
    _, header, table = phases.table({"provider": "x", "phases": rows})
    assert all(len(line) == len(header) for line in table)


def test_best_of_one_chunk_size_is_not_called_best():
    def row(provider: str, seconds: float) -> dict[str, object]:
        clock = {"median": seconds}
        return {"provider": provider, "seconds": clock, "cpu_seconds": clock}

    names = {"Liger, chunk 64": 4.0, "Liger, chunk 128": 2.0}
    rows = [row("ours, filter 1e-6", 1.0), *(row(name, seconds) for name, seconds in names.items())]
    case = {"name": "smollm2", "floor": row("", 1.0), "rows": rows, "products": 4}
    record = {"cases": [case], "scaling": []}
    assert "| filtered / Liger, chunk 128 (its best) | 0.45 | 0.50 (0.50) |" in report.goals(record)
    case["rows"] = rows[:2]
    assert "| filtered / Liger, chunk 64 | 0.45 | 0.25 (0.25) |" in report.goals(record)


def test_worker_measures_memory_of_one_run():
    """A run that needs 64 MB and returns 16 MB of them."""
    from bench.worker import memory

    def step() -> torch.Tensor:
        return torch.ones(16 << 20)[: 4 << 20].clone()

    found = memory(step, gradient_bytes=16 << 20)
    assert 60 << 20 <= found["extra_bytes"] <= 100 << 20
    assert json.loads(json.dumps(found)) == found


def test_docs_keep_what_stands_above_the_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    page.write_text(f"# Speed\n\nWords.\n\n{report.MARK}\nold\n")
    found = cpu.run("smollm2", CASES["divergence"], options())
    record = {"machine": cpu.machine(), "quick": False, "cases": [found], "scaling": []}
    report.write(record, tmp_path / "results")
    text = page.read_text()
    assert text.startswith("# Speed\n\nWords.\n\n")
    assert "old" not in text
    assert "| exact / four plain GEMMs | 1.10 |" in text
    assert (tmp_path / "docs" / "img" / "cpu-smollm2.png").is_file()
    assert json.loads((tmp_path / "results" / "cpu.json").read_text())["cases"][0]["name"] == "smollm2"
