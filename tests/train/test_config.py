"""What a Config may hold, however it was built, and keys of the command line."""

from __future__ import annotations

import pytest

from mopd_train import cli
from mopd_train.config import Config, validate


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "ppo", r"expected method in \['mopd', .*\], got 'ppo'"),
        ("distillation.teacher_regularization", "EMA", r"teacher_regularization in \['ema', .*\], got 'EMA'"),
        ("distillation.teacher_dtype", "fp8", r"teacher_dtype in \['float32', .*, None\], got 'fp8'"),
        ("context.context", "3s", r"expected context.context in .*, got '3s'"),
        ("context.feedback_condition", "sometimes", "got 'sometimes'"),
        ("context.failure_solution_condition", None, "got None"),
        ("context.peer_choice", "rand", "got 'rand'"),
        ("context.peer_control_mode", "foo", "got 'foo'"),
        ("model.sharding", "FSDP", "got 'FSDP'"),
        ("training.mixed_precision", True, "got True"),
        ("training.report_to", ["jsonl", "wand"], r"training.report_to in \['tensorboard', .*\], got 'wand'"),
        ("training.report_to", "wandb", "expected a list in training.report_to, got 'wandb'"),
        ("evaluation.num_prompts", 0, "expected evaluation.num_prompts >= 1, got 0"),
        ("evaluation.num_prompts", -3, "expected evaluation.num_prompts >= 1, got -3"),
    ],
)
def test_a_value_that_its_type_does_not_allow_is_refused(key, value, message):
    """The command line's parser is not there for those who write Config(...) in Python."""
    config = Config()
    section, _, name = key.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_what_is_allowed_passes():
    config = Config(method="grpo")
    config.training.report_to, config.distillation.teacher_dtype = [], "bfloat16"
    validate(config)


@pytest.mark.parametrize("arguments", [["train", "--training.max_step", "3"], ["eval", "--outp", "x"]])
def test_an_abbreviated_key_is_an_unknown_one(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.build_parser().parse_args(arguments)
    assert end.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as end:
        cli.build_parser().parse_args(["--version"])
    assert end.value.code == 0
    assert cli.version() in capsys.readouterr().out
