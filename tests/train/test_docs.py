"""docs/metrics.md explains every key that runs write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mopd_train import train
from tests.train.test_evaluate import write_rows
from tests.train.test_methods import run_of

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
SAMPLED = {"distillation__alpha": 1.0, "distillation__full_logit_distillation": False}


def documented() -> set[str]:
    first_cells = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {key for cell in first_cells for key in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("mopd", {"training__num_iterations": 2, "distillation__distillation_topk": 5, "context__summary_k": 1}),
        ("opd", SAMPLED),
        ("grpo", {}),
        ("dpo", {}),
        ("sft", {}),
    ],
)
def test_every_key_of_a_step_is_explained(tiny_model, tmp_path, method, changes):
    run = run_of(tiny_model, tmp_path / "run", write_rows(tmp_path), method, **changes)
    written = train.train_step(run, 1)
    assert {"loss", "reward", "time/student"} <= written.keys()
    assert set(written) - documented() == set()
