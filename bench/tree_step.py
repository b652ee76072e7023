"""One step of the trainer on examples/smollm2.yaml, with the tree and its sampler or as the first trainer did it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from mopd_train import rollout, setup, train
from mopd_train.config import Config

from . import tree_cases

EXAMPLE = Path(__file__).parents[1] / "examples/smollm2.yaml"


def set_up(model: Path, output: Path, quick: bool) -> setup.Run:
    """The example's run. Its rate is tiny, so that every step starts from the same model."""
    config = Config()
    for section, values in yaml.safe_load(EXAMPLE.read_text()).items():
        for key, value in values.items():
            setattr(getattr(config, section), key, value)
    config.model.model_name_or_path = str(model)
    config.training.output_dir = str(output)
    config.training.learning_rate = 1e-12
    config.training.report_to = []
    if quick:  # random weights never succeed: a context that needs no peers
        config.context.context = "none"
        config.rollout.num_prompts, config.rollout.max_completion_length = 2, 4
    return setup.set_up(config)


def step(run: setup.Run, number: int, tree: bool, prompts: int | None = None) -> dict[str, float]:
    """Seconds of each phase and tokens of a whole step; `prompts` shortens it to warm up."""
    settings, full = run.config, run.config.rollout.num_prompts
    settings.training.tree = tree
    settings.rollout.num_prompts = prompts or full
    sampler: Any = rollout.sample if tree else tree_cases.generated
    try:
        with mock.patch.object(rollout, "sample", sampler):
            metrics = train.train_step(run, number)
    finally:
        settings.rollout.num_prompts = full
    return {key: value for key, value in metrics.items() if key.startswith(("time/", "tokens/")) or key == "num_tokens"}
