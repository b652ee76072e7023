"""Precision, recomputation, adapters, trackers and the upload: what they compute, save, and refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from mopd_kernels import LMHead
from mopd_train import adapters, checkpoint, engine, setup, trackers, train
from mopd_train.config import Config, TrainingConfig, validate
from mopd_train.models import load_model
from mopd_train.objectives import settle
from mopd_train.scoring import completion_hidden
from tests.train.test_evaluate import write_rows


def run_of(model: Path, folder: Path, rows: Path, **changes: object) -> setup.Run:
    """Keys are sections and names joined by two underscores."""
    config = Config()
    config.model.model_name_or_path = str(model)
    config.data.task, config.data.train_dataset = "tests.train.rewards.parity", str(rows)
    config.rollout.num_prompts, config.rollout.num_generations, config.rollout.max_completion_length = 2, 4, 5
    config.training.output_dir, config.training.report_to = str(folder), []
    config.training.learning_rate, config.training.warmup_steps = 0.01, 0
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return setup.set_up(config)


def gradients_after(run: setup.Run) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics of a step, and its gradients before they are scaled."""
    seen: dict[str, torch.Tensor] = {}
    reduce = run.engine.reduce_and_clip

    def watched(max_norm: float) -> float:
        seen.update({name: p.grad.clone() for name, p in run.student.named_parameters() if p.grad is not None})
        return reduce(max_norm)

    run.engine.reduce_and_clip = watched  # type: ignore[method-assign]
    return train.train_step(run, 1), seen


@pytest.mark.parametrize("tree", [True, False])
def test_recomputed_layers_give_the_same_step(tiny_model, tmp_path, tree):
    """And are recomputed: each layer starts once more, in the student's backward only."""
    results, calls = [], []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        run = run_of(
            tiny_model, folder, write_rows(tmp_path), model__gradient_checkpointing=checkpointing, training__tree=tree
        )
        count = [0]
        for layer in run.student.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        results.append(gradients_after(run))
        calls.append(count[0])
        assert not any(module.training for module in run.student.modules())
    assert calls[1] == calls[0] + len(run.student.model.layers)
    (metrics, grads), (recomputed_metrics, recomputed) = results
    assert recomputed_metrics["loss"] == metrics["loss"]
    assert grads.keys() == recomputed.keys()
    assert all(torch.equal(grads[name], recomputed[name]) for name in grads)


def test_recomputing_a_model_that_drops_out_is_refused(tiny_model):
    model = load_model(str(tiny_model))
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"this model has \{'attention_dropout': 0.1\}: set it to false"):
        engine.enable_checkpointing(model)


def test_bfloat16_computes_near_float32_and_keeps_weights_wide(tiny_model, tmp_path):
    rows = write_rows(tmp_path)
    wide = run_of(tiny_model, tmp_path / "wide", rows)
    narrow = run_of(tiny_model, tmp_path / "narrow", rows, training__mixed_precision="bf16")
    hidden = []
    for run in (wide, narrow):
        states, _ = run.engine.through(
            run.student, lambda run=run: completion_hidden(run.student, [[1, 5, 6]], [[11, 12, 13]], 2, True)
        )
        assert run.engine.head(run.student).weight.dtype == states.dtype
        hidden.append(states)
    assert hidden[1].dtype == torch.bfloat16
    assert not torch.equal(hidden[1].float(), hidden[0])
    torch.testing.assert_close(hidden[1].float(), hidden[0], rtol=0.05, atol=0.05)
    metrics, grads = gradients_after(narrow)
    assert metrics["loss"] > 0
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert {p.dtype for p in narrow.student.parameters()} == {torch.float32}
    assert {value.dtype for state in narrow.optimizer.state.values() for value in state.values()} == {torch.float32}


def hidden_of(run: setup.Run) -> torch.Tensor:
    return run.student.get_decoder()(input_ids=torch.tensor([[1, 5, 6, 9]]), use_cache=False)[0]


@pytest.mark.parametrize("teacher", ["ema", "frozen", "self"])
def test_an_adapter_learns_and_the_model_under_it_teaches(tiny_model, tmp_path, teacher):
    run = run_of(
        tiny_model, tmp_path / "run", write_rows(tmp_path), model__use_peft=True, model__lora_r=2, model__lora_alpha=4,
        distillation__teacher_regularization=teacher, distillation__teacher_update_rate=0.25,
    )  # fmt: skip
    base, before = hidden_of(run), copy.deepcopy(dict(run.student.named_parameters()))
    trained = {name for name, p in run.student.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)
    for step in (1, 2):  # the second factor starts at zero: the first one moves from the second step on
        assert train.train_step(run, step)["grad_norm"] > 0
    after = dict(run.student.named_parameters())
    assert {name for name in after if ".default." not in name and ".teacher." not in name and
            not torch.equal(after[name], before[name])} == set()  # fmt: skip
    assert all(not torch.equal(after[name], before[name]) for name in trained)
    assert {name for name, p in run.student.named_parameters() if p.requires_grad} == trained
    student = hidden_of(run)
    with torch.no_grad(), run.engine.as_teacher():
        taught = hidden_of(run)
    assert not torch.allclose(student, base, atol=1e-4)
    if teacher == "frozen":
        torch.testing.assert_close(taught, base)
    elif teacher == "self":
        torch.testing.assert_close(taught, student)
    else:
        name = next(name for name in trained if "lora_B" in name)
        assert 0 < after[name.replace(".default.", ".teacher.")].norm() < after[name].norm()
        assert not torch.allclose(taught, base, atol=1e-5)
    train.save(run, 2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2").eval()
    ids = torch.tensor([[1, 5, 6, 9]])
    torch.testing.assert_close(loaded(ids).logits, run.student(ids).logits)
    assert not (tmp_path / "run" / "checkpoint-2" / "model.safetensors").exists()


def test_a_resumed_adapter_is_bitwise_the_same(tiny_model, tmp_path):
    settings = dict(model__use_peft=True, model__lora_r=2)
    rows = write_rows(tmp_path)
    run = run_of(tiny_model, tmp_path / "run", rows, **settings)
    for step in (1, 2):
        train.train_step(run, step)
    train.save(run, 2)
    train.train_step(run, 3)
    again = run_of(tiny_model, tmp_path / "run", rows, training__resume_from_checkpoint="latest", **settings)
    assert again.first_step == 2
    train.train_step(again, 3)
    for (name, ours), theirs in zip(run.student.named_parameters(), again.student.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_an_adapter_is_trained_alike_by_two_sharded_processes(warm, halting_model, tmp_path):
    """EMA of the adapter included; compared by what is saved."""
    from safetensors.torch import load_file

    from tests.train.test_distributed import arguments

    more = ("--model.use_peft", "true", "--model.lora_r", "2", "--training.max_steps", "2")
    rows = write_rows(tmp_path)
    warm.run(*arguments(halting_model, tmp_path / "alone", rows, *more))
    warm.run_ranks(2, *arguments(halting_model, tmp_path / "sharded", rows, *more, "--model.sharding", "fsdp"))
    for name in (adapters.WEIGHTS, f"{checkpoint.TEACHER}/{adapters.WEIGHTS}"):
        ours, theirs = (load_file(tmp_path / run / "checkpoint-2" / name) for run in ("sharded", "alone"))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4)


def test_the_head_is_cut_into_rows_of_its_vocabulary():
    """The last member also holds the padding rows; together they tile it."""
    from mopd_train.distributed import Ranks

    head = LMHead(torch.arange(22.0).view(11, 2), bias=torch.arange(11.0))
    group = object()
    cut = [Ranks(rank, 6, vocab_parallel=3, group=group).rows_of(head, 10) for rank in (3, 4, 5)]  # type: ignore[arg-type]
    assert [part.shard.start for part in cut] == [0, 3, 6]
    assert [part.weight.size(0) for part in cut] == [3, 3, 5]
    assert torch.equal(torch.cat([part.weight for part in cut]), head.weight)
    assert torch.equal(torch.cat([part.bias for part in cut]), head.bias)
    assert {part.vocab_size for part in cut} == {10}


def test_settings_that_cannot_work_are_refused(monkeypatch):
    config = Config()
    config.model.use_peft = True
    config.distillation.teacher_regularization = "frozen"
    config.distillation.teacher_model_name_or_path = "some/model"
    with pytest.raises(ValueError, match=r"model\.use_peft takes the model itself as teacher"):
        settle(config)
    config = Config()
    config.training.hub_model_id = "me/mine"
    with pytest.raises(ValueError, match=r"is only read with training\.push_to_hub true"):
        validate(config)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="push_to_hub needs a token"):
        trackers.check(TrainingConfig(push_to_hub=True))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="report_to=trackio needs its package: pip install trackio"):
        trackers.check(TrainingConfig(report_to=["jsonl", "trackio"]))


def test_trackers_are_accelerates_and_jsonl_is_none(tmp_path):
    config = Config()
    config.training.output_dir, config.training.report_to = str(tmp_path), ["jsonl", "tensorboard"]
    built = trackers.build(config, first_step=3, run_id="mine-1")
    assert [tracker.name for tracker in built] == ["tensorboard"]
    assert built[0].init_kwargs == {"purge_step": 4}


def test_a_resumed_run_is_the_same_to_its_trackers(tmp_path, monkeypatch):
    name = trackers.identity(tmp_path)
    assert name == trackers.identity(tmp_path) != trackers.identity(tmp_path.parent)
    assert name.startswith(tmp_path.name)
    config = Config()
    config.training.output_dir, config.training.report_to = str(tmp_path), ["wandb", "trackio"]
    kinds = {kind: lambda project, **started: (project, started) for kind in config.training.report_to}
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", kinds)
    (_, wandb), (_, trackio) = trackers.build(config, 0, name)
    assert wandb.pop("config") == trackio.pop("config") == config.as_dict()
    assert wandb == {"id": name, "resume": "allow", "name": tmp_path.name, "dir": str(tmp_path)}
    assert trackio == {"name": name, "resume": "allow"}


def test_a_push_uploads_the_model_and_not_the_optimizer(tmp_path, monkeypatch):
    sent = {}

    class Hub:
        def create_repo(self, name, exist_ok):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **arguments):
            sent.update(arguments)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    trackers.push(TrainingConfig(output_dir=str(tmp_path / "mine"), push_to_hub=True), tmp_path / "checkpoint-4")
    assert sent["repo_id"] == "me/mine"
    assert sent["folder_path"] == tmp_path / "checkpoint-4"
    assert {"optimizer/*", "teacher/*"} <= set(sent["ignore_patterns"])
