"""What a run shows of itself: the line a step, the table before and after, the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from .evaluate import Scores

LINE = ("loss", "reward", "frac_reward_zero_std", "entropy", "completions/mean_length", "grad_norm")


def step_line(metrics: dict[str, Any], max_steps: int) -> str:
    if metrics.get("skipped_steps"):
        return (
            f"step {metrics['step']:>4}/{max_steps}  skipped: no rollout to learn from  reward {metrics['reward']:.4g}"
        )
    parts = [f"{name.rsplit('/', 1)[-1]} {metrics[name]:.4g}" for name in LINE if name in metrics]
    return f"step {metrics['step']:>4}/{max_steps}  " + "  ".join(parts)


def before_after_table(before: Scores, after: Scores) -> Table:
    table = Table(title=f"Held-out, {after.prompts} prompts x {after.k} samples")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    old, new = before.as_dict(), after.as_dict()
    for name in old | new:  # resumed with another evaluation.k, mean@k and pass@k have a row each
        values = (row.get(name, "") for row in (old, new))
        table.add_row(name, *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    return table


def plot_run(rows: list[dict[str, Any]], path: Path, before: Scores | None = None, after: Scores | None = None) -> None:
    """Reward and loss over steps, with the held-out mean@k before and after as marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    reward, loss = figure.subplots(1, 2)
    trained = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in trained]
    reward.plot(steps, [row["reward"] for row in trained], color="#0072B2", label="rollouts, mean reward")
    if before and after and steps:
        ends = [steps[0] - 1, steps[-1]]
        marks = " and ".join(dict.fromkeys(f"mean@{scores.k}" for scores in (before, after)))
        reward.plot(ends, [before.mean_at_k, after.mean_at_k], "o", color="#D55E00", label=f"held-out {marks}")
    reward.set(xlabel="step", ylabel="reward")
    if all(0 <= row["reward"] <= 1 for row in trained):  # weighted or negative rewards need a range of their own
        reward.set_ylim(0, 1)
    reward.legend(loc="lower right")
    loss.plot(steps, [row["loss"] for row in trained], color="#0072B2")
    loss.set(xlabel="step", ylabel="loss")
    for axes in (reward, loss):
        axes.grid(alpha=0.3)
    staging = path.with_suffix(".tmp.png")
    figure.savefig(staging, dpi=150)
    staging.replace(path)
