"""Hooks into a run, in the manner of transformers' TrainerCallback: what happened arrives as one Event.

class StopWhenSolved(Callback):
    def on_step_end(self, event):
        if event.metrics.get("reward", 0) > 0.95:  # the main process has it; one that stops, stops all
            event.stop()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate import Scores
    from .rollout import Group
    from .setup import Run


@dataclass
class Event:
    """What a hook can see, and change where that makes sense."""

    run: Run
    step: int  # the step at hand; before the first one the number of steps done
    metrics: dict[str, Any] = field(default_factory=dict)  # of the step; what on_step_end adds is logged as well
    groups: list[Group] = field(default_factory=list)  # on_rollouts: judged, before the teacher reads them
    checkpoint: Path | None = None  # on_save
    scores: Scores | None = None  # on_evaluate
    stopped: bool = False

    def stop(self) -> None:
        """End the run after this step: it saves a checkpoint and evaluates as after the last step. With several
        processes each runs its own callbacks: decide on something that all of them see alike, such as metrics."""
        self.stopped = True


class Callback:
    """Override what is needed. An exception of a callback ends the run."""

    def on_train_begin(self, event: Event) -> None:
        """Everything is set up and nothing has happened yet."""

    def on_step_begin(self, event: Event) -> None:
        """Before the rollouts of a step."""

    def on_rollouts(self, event: Event) -> None:
        """The step's groups have been sampled and judged."""

    def on_step_end(self, event: Event) -> None:
        """The optimizer has stepped; metrics are not written yet."""

    def on_save(self, event: Event) -> None:
        """A checkpoint is complete on disk."""

    def on_evaluate(self, event: Event) -> None:
        """The held-out prompts were scored, before (step 0) or after training."""

    def on_train_end(self, event: Event) -> None:
        """All is written."""


class Hooks:
    """The callbacks of a run."""

    def __init__(self, run: Run, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"expected mopd_train.Callback objects in callbacks, got {callback!r}")
        self.run, self.callbacks, self.stopped = run, callbacks, False

    def __call__(self, hook: str, step: int, **what: Any) -> None:
        event = Event(self.run, step, **what)
        for callback in self.callbacks:
            getattr(callback, hook)(event)
        self.stopped = self.stopped or event.stopped
