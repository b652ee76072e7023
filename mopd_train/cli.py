"""The command line: mopd train | eval | serve.

Settings come from defaults, then --config FILE (YAML), then --section.key value.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

EXAMPLES = {
    "train": """examples:
  mopd train --config examples/smollm2.yaml
  mopd train --config examples/smollm2.yaml --training.max_steps 50 --context.context 1s
  mopd train --config examples/smollm2.yaml --training.output_dir runs/a --training.resume_from_checkpoint latest
  mopd train --data.task math --data.train_dataset train.jsonl --model.model_name_or_path Qwen/Qwen3-1.7B""",
    "eval": """examples:
  mopd eval --model.model_name_or_path runs/a/checkpoint-20
  mopd eval --model.model_name_or_path embedded:smollm2 --evaluation.k 32 --output eval/base
  mopd eval --model.model_name_or_path runs/a/checkpoint-20 --data.task math --data.eval_dataset test.jsonl""",
    "serve": """examples:
  mopd serve --config run.yaml                            then, elsewhere on this machine:
  mopd train --config run.yaml --rollout.use_vllm true --rollout.vllm_mode server
  mopd serve --config run.yaml --vllm_args "--tensor-parallel-size 2 --gpu-memory-utilization 0.9"
""",
}


def build_parser() -> Any:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    from .config import Config

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Examples keep their lines."""

    def command(name: str, text: str) -> Any:
        parser = ArgumentParser(description=text, epilog=EXAMPLES[name], formatter_class=HelpFormatter)
        parser.add_argument("--config", action="config", help="YAML file with any of the sections below")
        parser.add_class_arguments(Config, fail_untyped=True)
        return parser

    parser = ArgumentParser(
        prog="mopd", description="Multi-Rollout On-Policy Distillation", formatter_class=HelpFormatter
    )
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand("train", command("train", "Train a student by MOPD."), help="train a student")
    evaluation = command("eval", "mean@k and pass@k of a model on held-out prompts.")
    evaluation.add_argument("--output", type=str, default="eval", help="folder for scores.json and completions.jsonl")
    commands.add_subcommand("eval", evaluation, help="mean@k and pass@k of a model or checkpoint")
    server = command("serve", "A vLLM server for rollout.vllm_mode=server, from the configuration of the training run.")
    server.add_argument("--vllm_args", type=str, default="", help="further arguments of vLLM's server, as one string")
    commands.add_subcommand("serve", server, help="a vLLM server for rollouts")
    return parser


def main(arguments: list[str] | None = None) -> None:
    # Idle OpenMP threads that spin make small products many times slower on busy machines.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    quieten()
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    try:
        _run(parser.instantiate_classes(parsed))
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError) as error:
        if os.environ.get("MOPD_DEBUG"):
            raise
        print(f"mopd: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def _run(parsed: Any) -> None:
    from .config import Config

    options = parsed[parsed.subcommand]
    config = Config(**{name: options[name] for name in Config.__dataclass_fields__})
    if parsed.subcommand == "train":
        from .train import train

        train(config)
    elif parsed.subcommand == "serve":
        from .engines.serve import serve

        serve(config, shlex.split(options.vllm_args))
    else:
        from .evaluate import evaluate_command

        evaluate_command(config, Path(options.output))


def quieten() -> None:
    """Messages of libraries that repeat for every call and that no user can act on."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for name in ("httpx", "accelerate", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
