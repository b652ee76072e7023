"""The command line: mopd train | eval | serve | analyze | diversity | inspect | report.

Settings come from defaults, then --config FILE (YAML), then --section.key value.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

EXAMPLES = {
    "train": """examples:
  mopd train --config examples/smollm2.yaml
  mopd train --config examples/smollm2.yaml --training.output_dir runs/a --training.max_steps 50
  mopd train --config examples/smollm2.yaml --training.output_dir runs/a --training.resume_from_checkpoint latest
  mopd train --config examples/smollm2.yaml --training.output_dir runs/1s --context.context 1s
  mopd train --config examples/smollm2.yaml --training.output_dir runs/grpo --method grpo --training.learning_rate 1e-5
  mopd train --training.output_dir runs/math --data.task math --data.train_dataset train.jsonl \\
      --model.model_name_or_path Qwen/Qwen3-1.7B""",
    "eval": """examples:
  mopd eval --config examples/smollm2.yaml --evaluation.k 32 --output eval/base
  mopd eval --config examples/smollm2.yaml --model.model_name_or_path runs/a/checkpoint-24
  mopd eval --config runs/math/run.json --model.model_name_or_path runs/math/checkpoint-100 \\
      --data.eval_dataset test.jsonl --output eval/math""",
    "serve": """examples:
  mopd serve --config run.yaml                            then, elsewhere on this machine:
  mopd train --config run.yaml --rollout.use_vllm true --rollout.vllm_mode server
  mopd serve --config run.yaml --vllm_args="--tensor-parallel-size 2 --gpu-memory-utilization 0.9"
""",
    "analyze": """examples:
  mopd analyze --config examples/smollm2.yaml --num-prompts 40
  mopd analyze --config runs/a/run.json --model.model_name_or_path runs/a/checkpoint-24 --rollouts runs/a
  mopd analyze --rollouts eval/completions.jsonl --contexts none 1s 2s1f --output analysis/base""",
    "diversity": """examples:
  mopd diversity runs/a
  mopd diversity runs/a runs/b --points 6 --output diversity/ab
  mopd diversity runs/a/completions-before.jsonl runs/a/completions-after.jsonl --code""",
    "inspect": """examples:
  mopd inspect --config runs/a/run.json --model.model_name_or_path runs/a/checkpoint-24 \\
      --rollouts runs/a/completions/step-000024.jsonl --output page.html
  mopd inspect --rollouts eval/completions.jsonl --contexts none 1s 2s 2s1f --only-mixed
  mopd inspect --rollouts runs/a --groups 3 17 --top 10""",
    "report": """examples:
  mopd report runs/a
  mopd report runs/a --output a.html --steps 12 --groups 4""",
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
        prog="mopd",
        description="Multi-Rollout On-Policy Distillation",
        formatter_class=HelpFormatter,
        version=version(),
        allow_abbrev=False,  # an abbreviated key is an unknown one; the commands take this over
    )
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand("train", command("train", "Train a student by MOPD."), help="train a student")
    evaluation = command(
        "eval",
        "mean@k and pass@k of a model on held-out prompts. Reads model (name, dtype, attention), data, evaluation, "
        "sandbox, context.success_reward_threshold and of rollout max_completion_length, generation_batch_size and "
        "vllm; other settings have no effect. Without --config these are the defaults, not those of the run.",
    )
    evaluation.add_argument("--output", type=str, default="eval", help="folder for scores.json and completions.jsonl")
    commands.add_subcommand("eval", evaluation, help="mean@k and pass@k of a model or checkpoint")
    server = command("serve", "A vLLM server for rollout.vllm_mode=server, from the configuration of the training run.")
    server.add_argument(
        "--vllm_args", type=str, default="", help="further arguments of vLLM's server, one string after the '='"
    )
    commands.add_subcommand("serve", server, help="a vLLM server for rollouts")
    analysis = command("analyze", "Does the teacher score successes above failures, and under which context?")
    _analyze_arguments(analysis)
    commands.add_subcommand("analyze", analysis, help="agreement of the teacher's scores with the verifier")
    diversity = ArgumentParser(
        description="How different the rollouts of a group are, over steps, checkpoints and runs.",
        epilog=EXAMPLES["diversity"],
        formatter_class=HelpFormatter,
    )
    _diversity_arguments(diversity)
    commands.add_subcommand("diversity", diversity, help="self-BLEU, distinct-n, unique ratio, pass@k curves")
    inspection = command("inspect", "A page of rollout groups, token by token, as the teacher sees them.")
    _inspect_arguments(inspection)
    commands.add_subcommand("inspect", inspection, help="HTML page of rollout groups, token by token")
    page = ArgumentParser(
        description="A page of a run: curves, time, scores, sampled groups.",
        epilog=EXAMPLES["report"],
        formatter_class=HelpFormatter,
    )
    _report_arguments(page)
    commands.add_subcommand("report", page, help="HTML page of a run: curves, time, scores, samples")
    return parser


def _analyze_arguments(parser: Any) -> None:
    add = parser.add_argument
    add("--rollouts", nargs="+", type=str, default=[], help="completions files or run folders; none: sampled here")
    add("--output", type=str, default="analysis", help="folder for tables and plots; started again, it goes on")
    add("--contexts", nargs="+", type=str, default=[], help="what the teacher reads; none named: all nine")
    add("--num-prompts", type=int, default=0, help="prompts to sample, or groups to read; 0: 64 sampled, all read")
    add("--controls", type=bool, default=True, help="score every context with matched numbers of peers as well")
    add("--resamples", type=int, default=2000, help="bootstrap resamples of the prompts")
    add("--reference", type=str, default="none", help="context from which differences are taken")
    add("--skip-bad-lines", action="store_true", help="drop lines that are no rollouts instead of stopping at them")
    add("--other-model", action="store_true", help="accept rollouts that another architecture sampled")
    add("--overwrite", action="store_true", help="delete what --output holds and begin anew")


def _diversity_arguments(parser: Any) -> None:
    add = parser.add_argument
    parser.add_argument("rollouts", nargs="+", type=str, help="run folders or completions files; each is a series")
    add("--output", type=str, default="diversity", help="folder for diversity.json and diversity.png")
    add("--points", type=int, default=8, help="points of a run at most: consecutive steps are pooled")
    add("--code", action="store_true", help="completions are Python: report the distance of their syntax trees")
    add("--threshold", type=float, default=1.0, help="a rollout succeeds if its reward is at least this")
    add("--skip-bad-lines", action="store_true", help="drop lines that are no rollouts instead of stopping at them")


def _inspect_arguments(parser: Any) -> None:
    add = parser.add_argument
    add("--rollouts", nargs="+", type=str, required=True, help="completions files (jsonl), or folders of runs or evals")
    add("--output", type=str, default="inspect.html", help="the page")
    add(
        "--contexts",
        nargs="+",
        type=str,
        default=["none", "2s", "2s1f"],
        help="what the teacher reads; each is scored, beside context.context",
    )
    add("--groups", nargs="+", type=int, default=[], help="groups to show, numbered from 1; none: the first max-groups")
    add("--max-groups", type=int, default=8, help="groups on the page where none are named")
    add("--only-mixed", action="store_true", help="skip groups in which all rollouts succeed, or none does")
    add("--top", type=int, default=5, help="likeliest tokens kept of the student and of every context")
    add("--skip-bad-lines", action="store_true", help="drop lines that are no rollouts instead of stopping at them")
    add("--other-model", action="store_true", help="accept rollouts that another architecture sampled")


def _report_arguments(parser: Any) -> None:
    parser.add_argument("run", type=str, help="output folder of mopd train")
    parser.add_argument("--output", type=str, default=None, help="the page; null: report.html in that folder")
    parser.add_argument("--steps", type=int, default=8, help="steps of which samples are shown, evenly spaced")
    parser.add_argument("--groups", type=int, default=3, help="groups shown of each of those steps")


def main(arguments: list[str] | None = None) -> None:
    # Idle OpenMP threads that spin make small products many times slower on busy machines.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    quieten()
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    try:
        _run(parser.instantiate(parsed))
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError) as error:
        if os.environ.get("MOPD_DEBUG"):
            raise
        print(f"mopd: {type(error).__name__}: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        sys.exit(1)


def _run(parsed: Any) -> None:
    from .config import Config

    options = parsed[parsed.subcommand]
    if parsed.subcommand == "diversity":
        from .analysis.diversity_command import DiversityOptions, diversity_command

        diversity_command(DiversityOptions(**{name: options[name] for name in DiversityOptions.__dataclass_fields__}))
        return
    if parsed.subcommand == "report":
        from .analysis.inspect_report import report_command

        report_command(Path(options.run), options.output and Path(options.output), options.steps, options.groups)
        return
    config = Config(**{name: options[name] for name in Config.__dataclass_fields__})
    if parsed.subcommand == "train":
        from .train import train

        train(config)
    elif parsed.subcommand == "serve":
        from .rollout_engines.serve import serve

        serve(config, shlex.split(options.vllm_args))
    elif parsed.subcommand == "analyze":
        from .analysis.command import AnalyzeOptions, analyze_command

        analyze_command(config, AnalyzeOptions(**{name: options[name] for name in AnalyzeOptions.__dataclass_fields__}))
    elif parsed.subcommand == "inspect":
        from .analysis.inspect import InspectOptions, inspect_command

        inspect_command(config, InspectOptions(**{name: options[name] for name in InspectOptions.__dataclass_fields__}))
    else:
        from .evaluate import evaluate_command

        evaluate_command(config, Path(options.output))


def version() -> str:
    try:
        return importlib.metadata.version("mopd")
    except importlib.metadata.PackageNotFoundError:
        return "unknown: run from a folder that was not installed"


def quieten() -> None:
    """Messages of libraries that repeat for every call and that no user can act on."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for name in ("httpx", "accelerate", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
