"""`python -m bench COMMAND`: one module a command, each with `add_arguments(parser)` and `main(options) -> code`."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "cpu": "measure on this machine's CPU: ours, plain GEMMs, dense, torch.compile, Liger, TRL, CCE (the default)",
    "static": "compile every Triton kernel ahead of time: registers, spills, tensor-core code, roofline model",
    "gpu": "measure on this machine's GPU: ours, dense, torch.compile, Liger, CCE",
    "methods": "learning curves of methods and contexts on the embedded task",
    "families": "one short training run for each task family",
    "sandbox": "running untrusted code apart: what a session costs, and sessions a second",
    "sdpo": "a training step by this trainer and by TRL's SDPO trainer: time by phase and memory",
    "tree": "scoring, training and sampling over prefix trees against the plain way of transformers",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["cpu", *arguments]
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of mopd_kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == next(iter(arguments), None):  # only the chosen one: what it imports can depend on its options
            module = importlib.import_module(f".{name}", __package__)
            command.description, command.epilog = module.__doc__, module.EXAMPLES
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    code: int = options.main(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
