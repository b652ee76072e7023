"""Scoring, training and sampling over prefix trees against the plain way of transformers, on this machine.

Hidden states are compared first; then the ways are timed in turns, after a warm-up. Groups are random token ids, the
training step is the one of examples/smollm2.yaml. The plain way uses the batch size of {1, 2, 4, 8} that takes least
time a sequence. Results of cases that were not run again are kept in the results file.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from .origin import commit, processor

EXAMPLES = """examples:
  python -m bench tree                                  everything: about six minutes on two quiet cores
  python -m bench tree --case teacher-8 memory          some cases, merged into the results file
  python -m bench tree --quick --out /tmp/t.json        a small model of the same shape, seconds
  python -m bench tree --case none --markdown           the table of the results file, for docs/tree.md
"""
GOALS = {
    "teacher-8": ("teacher scoring, G=8, 2s1f", 0.50),
    "teacher-16": ("teacher scoring, G=16, 2s1f", 0.42),
    "analysis": ("analysis under nine contexts, G=8", 0.35),
    "student": ("student forward and backward with loss, G=8", 0.55),
    "sampler": ("sampler, prompts of the example, G=8, seconds a token", 0.667),
    "sampler-full": ("sampler, one prompt, G=8, no early stop", 0.667),
    "step": ("training step of examples/smollm2.yaml", 0.60),
    "memory": ("peak memory of teacher scoring, G=8", 1.0),
}
UNITS = {"sampler": ("ms/token", 1e3), "sampler-full": ("ms/token", 1e3), "memory": ("MB", 1e-6)}
BOUND = 1e-3  # relative difference of hidden states
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/tree.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", nargs="+", choices=(*GOALS, "curve", "none"), default=(*GOALS, "curve"))
    parser.add_argument("--rounds", type=int, default=3, help="measured runs of each way")
    parser.add_argument("--quick", action="store_true", help="a small model of the same shape, short sequences")
    parser.add_argument("--out", type=Path, help="results file (bench/results/tree.json; none if quick)")
    parser.add_argument("--plots", type=Path, help="folder for the plots (docs/img)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def main(options: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from mopd_train.cli import quieten

    from . import tree_report

    quieten()
    console = Console()
    out = options.out or (None if options.quick else RESULTS)
    record: dict[str, Any] = {"cases": {}, "quick": options.quick}
    if out is not None and out.is_file():
        record = json.loads(out.read_text())
        if record["quick"] != options.quick:
            raise ValueError(f"{out} has quick={record['quick']}, got quick={options.quick}: give another --out")
    wanted = [case for case in options.case if case != "none"]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.rounds, options.quick, Path(scratch)) if wanted else None
        for case in wanted:
            assert bench is not None
            console.print(f"measuring {case} ...", style="dim")
            record["cases"][case] = bench.run(case) | {"when": time.strftime("%Y-%m-%d"), "commit": commit()}
            record["machine"] = machine()
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(record, indent=1) + "\n")
    if options.markdown:
        print(tree_report.markdown(record))
    else:
        tree_report.show(console, record)
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        tree_report.plot_speedup(record, options.plots / "tree-speedup.png")
        tree_report.plot_pack(options.plots / "tree-pack.png")
    wrong = [name for name, row in record["cases"].items() if row.get("error", 0.0) > BOUND]
    for name in wrong:
        console.print(f"[red]{name}: hidden states differ by {record['cases'][name]['error']:.1e} > {BOUND}")
    return 1 if wrong else 0


def machine() -> dict[str, Any]:
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "cpu": processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **versions,
    }


class Bench:
    """The cases. Each gives {"ways": {name: summary}, "ratio", "error" of hidden states, "note"}."""

    def __init__(self, rounds: int, quick: bool, scratch: Path):
        from mopd_train.models import embedded_model, load_model

        from . import tree_cases

        self.rounds, self.quick, self.scratch, self.cases = rounds, quick, scratch, tree_cases
        self.shape = tree_cases.QUICK if quick else tree_cases.Shape()
        self.folder = small_model(scratch / "model") if quick else embedded_model()
        self.model = load_model(str(self.folder))
        self.size = min(8, self.shape.groups[-1])
        self._batch: int | None = None

    def run(self, case: str) -> dict[str, Any]:
        if case.startswith("teacher-"):
            return self.teacher(min(int(case.split("-")[1]), self.shape.groups[-1]))
        result: dict[str, Any] = getattr(self, case.replace("-", "_"))()
        return result

    def group(self, size: int, prompt: int, rollout: int) -> Any:
        return self.cases.random_group(size, prompt, rollout, self.model.config.vocab_size)

    @property
    def batch(self) -> int:
        """Best batch size of padded teacher scoring."""
        if self._batch is None:
            self._batch = self._best(self.teacher_pairs(self.size))
        return self._batch

    def _best(self, pairs: Any) -> int:
        import torch

        with torch.no_grad():
            best, _ = self.cases.best_batch(
                lambda size: self.cases.padded_hidden(self.model, pairs[:size], size), len(pairs)
            )
        return best

    def teacher_pairs(self, size: int) -> Any:
        return self.cases.teacher_pairs(self.group(size, self.shape.prompt, self.shape.rollout), "2s1f")

    def teacher(self, size: int) -> dict[str, Any]:
        return self.scored(self.teacher_pairs(size), self.batch)

    def analysis(self) -> dict[str, Any]:
        """All contexts' sequences in one pack; the plain way batches within a context, where lengths are equal."""
        from mopd_train.contexts import CONTEXTS

        group = self.group(self.size, self.shape.prompt, self.shape.analysis_rollout)
        pairs = [pair for context in CONTEXTS for pair in self.cases.teacher_pairs(group, context)]
        return self.scored(pairs, self._best(self.cases.teacher_pairs(group, "2s1f")))

    def scored(self, pairs: Any, batch: int, rounds: int | None = None) -> dict[str, Any]:
        import torch

        cases = self.cases
        unique, total = cases.sharing(pairs)
        with torch.no_grad():
            packed = cases.tree_hidden(self.model, pairs).unflatten(0, (len(pairs), -1))  # rollouts of equal length
            few = list(range(0, len(pairs), -(-len(pairs) // 4)))
            error = cases.difference(
                packed[few].flatten(0, 1), cases.padded_hidden(self.model, [pairs[i] for i in few], batch)
            )
            ways = {
                "plain": lambda: cases.padded_hidden(self.model, pairs, batch),
                "tree": lambda: cases.tree_hidden(self.model, pairs),
            }
            times = cases.interleaved(ways, rounds or self.rounds)
        return self.result(times, f"{unique} of {total} tokens; plain batch {batch}", error)

    def result(self, values: dict[str, list[float]], note: str, error: float | None = None) -> dict[str, Any]:
        ways = {name: self.cases.summary(runs) for name, runs in values.items()}
        row = {"ways": ways, "ratio": ways["tree"]["median"] / ways["plain"]["median"], "note": note}
        return row if error is None else row | {"error": error}

    def student(self) -> dict[str, Any]:
        cases, model = self.cases, self.model
        group = self.group(self.size, self.shape.student_prompt, self.shape.student_rollout)
        pairs = cases.student_pairs(group)
        best, _ = cases.best_batch(lambda size: cases.padded_backward(model, pairs[:size], size), self.size)
        gradients = []
        for run in (lambda: cases.padded_backward(model, pairs, best), lambda: cases.tree_backward(model, pairs)):
            model.zero_grad()
            run()
            gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
        ways = {
            "plain": lambda: cases.padded_backward(model, pairs, best),
            "tree": lambda: cases.tree_backward(model, pairs),
        }
        times = cases.interleaved(ways, self.rounds)
        model.zero_grad()
        unique, total = cases.sharing(pairs)
        note = f"{unique} of {total} tokens; plain batch {best}; error is of a gradient"
        return self.result(times, note, cases.difference(gradients[1], gradients[0]))

    def sampler(self) -> dict[str, Any]:
        """Prompts, temperature and stop tokens of the example: rows that end early cost the sampler nothing more."""
        from mopd_train.sampler import Sampling

        count, new_tokens = (2, 4) if self.quick else (8, 16)
        prompts, stops = self.cases.example_prompts(self.folder, count)
        sampling = Sampling(self.size, new_tokens, 0.5, 1.0, count * self.size)
        return self.sampled(prompts, sampling, stops, f"{count} prompts, at most {new_tokens} new tokens")

    def sampler_full(self) -> dict[str, Any]:
        """One prompt, no stop token: all that can be saved is the prompt, computed once instead of G times."""
        from mopd_train.sampler import Sampling

        prompts, count = [self.group(1, self.shape.prompt, 1).prompt.token_ids], self.shape.new_tokens
        row = self.sampled(prompts, Sampling(self.size, count, 1.0, 1.0, self.size), [], f"{count} new tokens")
        times = self.cases.interleaved({"linear": lambda: self.cases.linear_layers(self.model, self.size)}, 8)
        floor = self.cases.summary([seconds / self.size for seconds in times["linear"][3:]])
        row["note"] += f"; linear layers alone {floor['median'] * 1e3:.2f} ms/token"
        return row | {"linear_layers": floor}

    def sampled(self, prompts: Any, sampling: Any, stops: list[int], note: str) -> dict[str, Any]:
        """Seconds a token, stop tokens included. The ways draw different tokens: each is divided by its own."""
        from mopd_train.sampler import sample

        counts: dict[str, list[int]] = {"plain": [], "tree": []}

        def draw(way: str) -> None:
            sampler = sample if way == "tree" else self.cases.generated
            groups = sampler(self.model, prompts, sampling, stops or [-1], 2, len(counts[way]))
            counts[way].append(sum(len(row) for group in groups for row in group))

        times = self.cases.interleaved({"plain": lambda: draw("plain"), "tree": lambda: draw("tree")}, self.rounds + 1)
        values = {
            way: [seconds / tokens for seconds, tokens in zip(runs[1:], counts[way][1:], strict=True)]
            for way, runs in times.items()
        }
        return self.result(values, note)

    def step(self) -> dict[str, Any]:
        from . import tree_step

        run = tree_step.set_up(self.folder, self.scratch / "run", self.quick)
        tree_step.step(run, 1, tree=True, prompts=1)
        tree_step.step(run, 1, tree=False, prompts=1)
        rounds = min(2, self.rounds)
        numbers = {"plain": iter(range(2, 99)), "tree": iter(range(2, 99))}
        phases: dict[str, list[dict[str, float]]] = {"plain": [], "tree": []}

        def one(way: str) -> None:
            phases[way].append(tree_step.step(run, next(numbers[way]), tree=way == "tree"))

        times = self.cases.interleaved({"plain": lambda: one("plain"), "tree": lambda: one("tree")}, rounds)
        row = self.result(times, f"plain: padded batches and model.generate; {rounds} steps each")
        return row | {"phases": {way: {k: [p[k] for p in rows] for k in rows[0]} for way, rows in phases.items()}}

    def memory(self) -> dict[str, Any]:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        values: dict[str, list[float]] = {}
        for way in ("plain", "tree"):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as own:
                peak = own.submit(self.cases.peak_memory, str(self.folder), way, self.batch, self.shape).result()
            values[way] = [float(peak)]
        return self.result(values, f"above the loaded model; plain batch {self.batch}")

    def curve(self) -> dict[str, Any]:
        """One round each: smaller groups, and every context at G = 8, for the plot."""
        from mopd_train.contexts import CONTEXTS

        groups = {size: self.scored(self.teacher_pairs(size), self.batch, 1)["ratio"] for size in self.shape.groups[:2]}
        group = self.group(self.size, self.shape.prompt, self.shape.analysis_rollout * 2)
        contexts = {
            name: self.scored(self.cases.teacher_pairs(group, name), self.batch, 1)["ratio"] for name in CONTEXTS
        }
        return {"groups": groups, "contexts": contexts}


def small_model(folder: Path) -> Path:
    """Two layers over the embedded model's vocabulary, random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mopd_train.models import embedded_model, load_tokenizer

    tokenizer = load_tokenizer(str(embedded_model()))
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
    ids = {"eos_token_id": 2, "pad_token_id": 2, "bos_token_id": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, tie_word_embeddings=True, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
