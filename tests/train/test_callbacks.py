"""The Python API on a tiny model: reward functions, hooks in their order, and stopping."""

from __future__ import annotations

import json

import pytest

from mopd_train import Callback, Config, train
from mopd_train.checkpoint import checkpoints, step_of
from tests.train.test_evaluate import write_rows


def tiny(model, folder, **training):
    config = Config()
    config.model.model_name_or_path = str(model)
    config.data.train_dataset = config.data.eval_dataset = str(write_rows(folder))
    config.rollout.num_prompts, config.rollout.num_generations, config.rollout.max_completion_length = 2, 4, 5
    config.evaluation.k = 2
    config.training.output_dir, config.training.report_to = str(folder / "run"), []
    config.training.max_steps, config.training.save_steps = 3, 2
    for key, value in training.items():
        setattr(config.training, key, value)
    return config


def even(completion_ids, **_):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


class Recorder(Callback):
    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def on_train_begin(self, event):
        self.seen.append(("begin", event.step))

    def on_step_begin(self, event):
        self.seen.append(("step", event.step))

    def on_rollouts(self, event):
        assert all(r.reward == float(r.token_ids[0] % 2 == 0) for g in event.groups for r in g.rollouts)
        self.seen.append(("rollouts", len(event.groups)))

    def on_step_end(self, event):
        event.metrics["mine"] = 10 * event.step
        self.seen.append(("end", event.metrics["step"]))
        if event.step == self.stop_at:
            event.stop()

    def on_save(self, event):
        assert step_of(event.checkpoint) == event.step
        self.seen.append(("save", event.step))

    def on_evaluate(self, event):
        assert 0 <= event.scores.mean_at_k <= 1
        self.seen.append(("evaluate", event.step))

    def on_train_end(self, event):
        assert (event.run.folder / "training.png").is_file()
        self.seen.append(("done", event.step))


def step(number):
    return [("step", number), ("rollouts", 2), ("end", number)]


def test_five_lines_and_hooks_in_order(tiny_model, tmp_path):
    config = tiny(tiny_model, tmp_path)
    recorder = Recorder()
    folder = train(config, reward_fns=[even], callbacks=[recorder])
    assert recorder.seen == [("begin", 0), ("evaluate", 0), *step(1), *step(2), ("save", 2), *step(3), ("save", 3),
                             ("evaluate", 3), ("done", 3)]  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["mine"] for row in rows] == [10, 20, 30]
    import mopd_train.train

    assert callable(mopd_train.train)
    assert mopd_train.train.train_step


def test_a_callback_stops_the_run_with_a_checkpoint(tiny_model, tmp_path):
    recorder = Recorder(stop_at=1)
    train(tiny(tiny_model, tmp_path), reward_fns=[even], callbacks=[recorder])
    assert recorder.seen == [("begin", 0), ("evaluate", 0), *step(1), ("save", 1), ("evaluate", 1), ("done", 1)]
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [1]


def test_what_is_no_callback_is_refused(tiny_model, tmp_path):
    with pytest.raises(TypeError, match=r"expected mopd_train.Callback objects in callbacks"):
        train(tiny(tiny_model, tmp_path), reward_fns=[even], callbacks=[print])
    assert not list(tmp_path.glob("run/checkpoint-*"))
