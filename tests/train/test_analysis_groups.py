"""Saved rollouts read back: what comes out is what was written, and what is wrong is named by file and line."""

from __future__ import annotations

import json
import tracemalloc
from itertools import islice

import pytest

from mopd_train.analysis.groups import RolloutFiles, rollout_paths
from mopd_train.evaluate import completion_records
from mopd_train.files import write_jsonl
from mopd_train.models import fingerprint, load_model
from tests.train.test_contexts import group


@pytest.fixture
def saved(tokenizer, tmp_path):
    """Two groups of three with the same prompt, so that only their number parts them."""
    groups = [group(tokenizer, [1, 0, None]), group(tokenizer, [0, 0.5, 1])]
    for i, one in enumerate(groups):
        one.prompt.row = {"prompt": "asked", "answer": f"answer {i}"}
        for rollout in one.rollouts:
            rollout.text = tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
            rollout.feedback = f"feedback {i}"
    path = tmp_path / "step-000007.jsonl"
    write_jsonl(path, completion_records(groups, step=7, model="llama 2x16", tokenizer="abc"))
    return path, groups


def test_round_trip(saved, tokenizer):
    path, groups = saved
    read = list(RolloutFiles([path], tokenizer))
    assert [one.group.rollouts for one in read] == [one.rollouts for one in groups]
    assert [one.group.prompt.token_ids for one in read] == [one.prompt.token_ids for one in groups]
    assert [one.group.prompt.row["answer"] for one in read] == ["answer 0", "answer 1"]
    assert [(one.step, one.line, one.path) for one in read] == [(7, 1, path), (7, 4, path)]


def test_without_numbers_prompts_part_groups(saved, tokenizer, tmp_path):
    path, _ = saved
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["group"], record["finished"], record["feedback"], record["step"]
    for record in records[2:]:
        record["prompt"] = "another question"
    write_jsonl(tmp_path / "other.jsonl", records)
    read = list(RolloutFiles([tmp_path / "other.jsonl", path], tokenizer))
    assert [len(one.group.rollouts) for one in read] == [2, 4, 3, 3]
    assert read[1].group.prompt.messages == [{"role": "user", "content": "another question"}]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"prompt": "a", "comp', "Invalid control character"),
        ("[1, 2]", "expected an object, got list"),
        ({"reward": ...}, "has no 'reward' .null stands for"),
        ({"completion_ids": ...}, "has no 'completion_ids'"),
        ({"completion_ids": []}, "expected a list of token ids"),
        ({"completion_ids": [1.5]}, "expected a list of token ids"),
        ({"completion_ids": [10**7]}, "the tokenizer has 49152 tokens"),
        ({"completion_ids": [1000, 1001]}, "the rollout is of another tokenizer"),
        ({"reward": float("nan")}, "expected a finite number or null as reward, got nan"),
        ({"reward": "1"}, "expected a finite number or null"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "messages with a user turn"),
        ({"completion": None}, "expected a string as completion"),
    ],
)
def test_bad_lines(saved, tokenizer, broken, message):
    path, groups = saved
    lines = path.read_text().splitlines()
    if isinstance(broken, dict):
        record = json.loads(lines[1]) | broken
        broken = json.dumps({key: value for key, value in record.items() if value is not ...})
    path.write_text("\n".join([lines[0], broken, *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=rf"step-000007.jsonl:2 is no rollout: .*({message})"):
        list(RolloutFiles([path], tokenizer))
    files = RolloutFiles([path], tokenizer, skip_bad_lines=True)
    kept = list(files)
    assert [one.group.rollouts for one in kept] == [groups[0].rollouts[::2], groups[1].rollouts]
    assert files.bad_lines == 1
    assert "step-000007.jsonl:2" in files.named[0]


def test_another_model(saved, tokenizer):
    path, _ = saved
    ours = {"model": "llama 2x16", "tokenizer": "abc"}
    assert len(list(RolloutFiles([path], tokenizer, expected=ours))) == 2
    larger = {**ours, "model": "llama 30x576"}
    with pytest.raises(ValueError, match=r":1 was sampled with model 'llama 2x16', the scoring model has 'llama 30x5"):
        list(RolloutFiles([path], tokenizer, expected=larger))
    assert len(list(RolloutFiles([path], tokenizer, expected=larger, other_model=True))) == 2
    with pytest.raises(ValueError, match="sampled with tokenizer 'abc'"):
        list(RolloutFiles([path], tokenizer, expected={**ours, "tokenizer": "def"}, other_model=True))


def test_fingerprint_tells_models_apart(tiny_model, tokenizer):
    ours = fingerprint(load_model(str(tiny_model)), tokenizer)
    assert ours["model"] == "llama 2x16"
    smaller = type("Fewer", (), {"get_vocab": lambda self: {"a": 0, "b": 1}})()
    assert fingerprint(load_model(str(tiny_model)), smaller)["tokenizer"] != ours["tokenizer"]


def test_memory_does_not_grow_with_the_file(saved, tokenizer, tmp_path):
    """100 times the groups, the same peak: groups are yielded as they complete."""
    path, _ = saved
    lines = path.read_text().splitlines()
    large = tmp_path / "large.jsonl"
    large.write_text("\n".join(lines * 100) + "\n")

    def peak(name):
        tracemalloc.start()
        count = sum(1 for _ in RolloutFiles([name], tokenizer))
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return count, memory

    peak(path)  # caches of the tokenizer
    (few, small), (many, big) = peak(path), peak(large)
    assert (few, many) == (2, 200)
    assert big < 2 * small + 20_000 < large.stat().st_size
    first = next(islice(iter(RolloutFiles([large], tokenizer)), 1))
    assert len(first.group.rollouts) == 3


def test_paths(tmp_path, saved):
    path, _ = saved
    run = tmp_path / "run"
    (run / "completions").mkdir(parents=True)
    for step in (2, 1):
        (run / "completions" / f"step-{step:06d}.jsonl").write_text("")
    assert [p.name for p in rollout_paths([str(run), str(path)])] == [
        "step-000001.jsonl", "step-000002.jsonl", "step-000007.jsonl",
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match="no such rollouts file"):
        rollout_paths([str(tmp_path / "absent.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no completions"):
        rollout_paths([str(tmp_path / "empty")])
