"""One short MOPD run for each task family on its offline set: examples/{math,code,science,tools}.yaml, one seed.

Held-out scores before and after, and the reward of each step. Kept and resumed as `python -m bench methods` does.
"""

from __future__ import annotations

import argparse

from .methods import ROOT, Runs, add_runs, main

__all__ = ["EXAMPLES", "add_arguments", "main"]

EXAMPLES = """examples:
  python -m bench families                  all four: half an hour on two cores
  python -m bench families --only code      small Python functions: needs bubblewrap
"""
FAMILIES: Runs = {
    family: (label, ["--config", str(ROOT / f"examples/{family}.yaml")])
    for family, label in {
        "math": "mathematics: one-digit sums (reasoning-gym)",
        "code": "programming: small functions, run in the sandbox",
        "science": "science: symbols of elements (mendeleev)",
        "tools": "tool use: calls of four functions",
    }.items()
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_runs(parser, "families", FAMILIES, seeds=[0])
