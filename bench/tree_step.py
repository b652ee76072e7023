"""One step of the trainer on examples/smollm2.yaml, with the tree and its sampler or as the first trainer did it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from mopd_train import rollout, train
from mopd_train.cli import build_parser
from mopd_train.config import Config

from . import tree_cases

EXAMPLE = Path(__file__).parents[1] / "examples/smollm2.yaml"


def set_up(model: Path, output: Path, quick: bool) -> train.Run:
    """The example's run. Its rate is tiny, so that every step starts from the same model."""
    changes = {
        "model.model_name_or_path": model,
        "training.output_dir": output,
        "training.learning_rate": 1e-12,
        "training.report_to": "[]",
    }
    if quick:  # random weights never succeed: a context that needs no peers
        changes |= {"context.context": "none", "rollout.num_prompts": 2, "rollout.max_completion_length": 4}
    arguments = ["train", "--config", str(EXAMPLE)]
    arguments += [part for key, value in changes.items() for part in (f"--{key}", str(value))]
    parser = build_parser()
    options = parser.instantiate_classes(parser.parse_args(arguments))["train"]
    return train.set_up(Config(**{name: options[name] for name in Config.__dataclass_fields__}))


def step(run: train.Run, number: int, tree: bool, prompts: int | None = None) -> dict[str, float]:
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
