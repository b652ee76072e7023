"""The analysis as a whole: hand-made scores to figures, groups to scores, and the command with its interruptions."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from mopd_train.analysis import analyze
from mopd_train.analysis import scored as scored_module
from mopd_train.analysis.command import AnalyzeOptions, analyze_command, sampled_rollouts
from mopd_train.analysis.controls import MATCHED
from mopd_train.analysis.scored import ScoredGroup
from mopd_train.analysis.sides import load_teacher, teacher_name, tokenizer_of, warn_of_other_settings
from mopd_train.analysis.summary import summarise
from mopd_train.config import Config
from mopd_train.contexts import CONTEXTS
from mopd_train.data import step_seed
from mopd_train.evaluate import completion_records
from mopd_train.files import write_json, write_jsonl
from mopd_train.models import fingerprint, load_model
from tests.train.launch import mopd
from tests.train.test_analysis_scoring import plainly
from tests.train.test_contexts import group
from tests.train.test_evaluate import write_rows


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(str(tiny_model))


@pytest.fixture
def config(tiny_model):
    settings = Config()
    settings.model.model_name_or_path = str(tiny_model)
    settings.data.task = "tests.train.rewards.parity"
    settings.rollout.temperature = 0.7
    settings.rollout.num_generations = 6
    settings.rollout.max_completion_length = 4
    return settings


@pytest.fixture
def groups(tokenizer):
    """Two mixed, one uniform, one alone; texts are what the ids decode to."""
    made = [group(tokenizer, rewards) for rewards in ([1, 0, 1, 0, None], [0, 1, 1, 0], [0, 0, 0], [1])]
    for one in made:
        for i, rollout in enumerate(one.rollouts):
            rollout.text = ["seven", "it is 42", "no idea at all", "x", "41 or 43"][i]
            rollout.token_ids = tokenizer.encode(rollout.text)
    return made


def options(output, **changes):
    chosen = {"rollouts": [], "contexts": [], "num_prompts": 0, "controls": True, "resamples": 200, "reference": "none"}
    chosen |= {"skip_bad_lines": False, "other_model": False, "overwrite": False}
    return AnalyzeOptions(**(chosen | {"output": str(output)} | changes))


def hand_made(rewards, none, one, shown):
    lengths = [3, 2, 5, 5][: len(rewards)]
    peers = {"none": [[0, 0]] * len(rewards), "1s": shown}
    return ScoredGroup("k", "s", "q", rewards, lengths, {"none": none, "1s": one}, peers)


def test_paired_intersection_and_differences_by_hand():
    """The third group has one success, which `1s` cannot be scored on; the fourth has no two rewards."""
    shown = [[1, 0]] * 4
    scored = [
        hand_made([1, 0, 1, 0], [-1, -2, -3, -4], [-1, -3, -2, -4], shown),  # AUC 3/4, 1
        hand_made([1, 1, 0, 0], [-4, -3, -2, -1], [-1, -4, -3, -2], shown),  # AUC 0, 1/2
        hand_made([1, 0, 0, 0], [-1, -2, -3, -4], [None, -3, -2, -4], [None, *shown[:3]]),  # AUC 1, -
        ScoredGroup("k", "s", "q", [0, None, 0, 0], [1] * 4),
    ]
    analysis = summarise(scored, ["none", "1s"], 1.0, 500, seed=0)
    rows = {(row["context"], row["metric"]): row for row in analysis.rows}
    none, one = rows["none", "auc"], rows["1s", "auc"]
    assert (none["value"], one["value"], one["difference"]) == (3 / 8, 3 / 4, 3 / 8)
    assert none["unpaired_value"] == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert (none["prompts"], none["defined"], none["undefined"]) == (2, 3, 1)
    assert (one["prompts"], one["defined"], one["undefined"]) == (2, 2, 2)
    assert (one["low"], one["high"]) == (0.5, 1)  # four resamples of two prompts
    assert (one["difference_low"], one["difference_high"]) == (0.25, 0.5)
    assert none["difference"] is None
    assert rows["1s", "margin"]["value"] == pytest.approx(((-1.5 + 3.5) + (-2.5 + 2.5)) / 2)
    counts = analysis.counts
    assert (counts["groups"], counts["mixed_groups"], counts["uniform_groups"]) == (4, 3, 1)
    assert counts["unjudged_rollouts"] == 1
    assert counts["success_rate_of_mixed"] == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    # lengths 3, 2, 5, 5: pairs won by the shorter success, ties one half
    assert counts["shorter_first_auc"] == pytest.approx(((1 + 0.5) / 4 + 1 + 2 / 3) / 3)
    back = {(row["context"], row["metric"]): row for row in summarise(scored, ["none", "1s"], 1.0, 500, 0, "1s").rows}
    assert (back["none", "auc"]["difference"], back["1s", "auc"]["difference"]) == (-3 / 8, None)
    prompts = [row["auc"] for row in analysis.prompts if row["context"] == "1s"]
    assert prompts == [1, 0.5, None]


def test_control_of_counting_and_matching_by_hand():
    """`all` shows a success (1, 2) and a failure (2, 1): counting tells them apart; matched scores do not."""
    scored = []
    for flip in (1, -1):
        one = ScoredGroup("k", "s", "q", [1, 0, 1, 0], [1] * 4)
        one.scores.update({"none": [-1, -1, -1, -1], "all": [-1, -2, -1, -2], "all" + MATCHED: [0, 0, -1 * flip, -2]})
        one.shown.update({"none": [[0, 0]] * 4, "all": [[1, 2], [2, 1]] * 2, "all" + MATCHED: [[1, 1]] * 4})
        scored.append(one)
    [control] = summarise(scored, ["none", "all"], 1.0, 200, seed=0).controls
    assert (control["auc"], control["composition_auc"], control["none_auc"]) == (1, 1, 0.5)
    matched = [(0.5 + 1 + 0 + 1) / 4, (0.5 + 1 + 1 + 1) / 4]
    assert control["matched_auc"] == pytest.approx(np.mean(matched))
    assert control["matched_difference"] == pytest.approx(np.mean(matched) - 0.5)
    assert control["prompts"] == 2


def test_nothing_to_agree_with():
    with pytest.raises(ValueError, match="none of 1 groups holds a success and a failure"):
        summarise([ScoredGroup("k", "s", "q", [0, 0], [1, 1])], ["none"], 1.0, 100, 0)


def test_no_shared_prompt_is_said(caplog):
    lone = hand_made([1, 0, 0], [-1, -2, -3], [None, -1, -1], [None, [1, 0], [1, 0]])
    with caplog.at_level(logging.WARNING):
        analysis = summarise([lone], ["none", "1s"], 1.0, 100, 0)
    assert "no prompt defines the AUC of all contexts (1s does on 0 of 1 groups)" in caplog.text
    assert {row["value"] for row in analysis.rows if row["metric"] == "auc"} == {None}
    assert [row["unpaired_value"] for row in analysis.rows if row["metric"] == "auc"] == [1, None]


@pytest.mark.parametrize("tree", [True, False])
def test_scores_are_mean_logprobs_under_the_training_context(model, tokenizer, config, groups, tree):
    config.training.tree = tree
    config.training.per_device_train_batch_size = 5
    analysis = analyze(model, groups, config=config, tokenizer=tokenizer, resamples=100)
    assert {row["context"] for row in analysis.rows} == set(CONTEXTS)
    assert [bool(one.scores) for one in analysis.groups] == [True, True, False, False]
    for place, one in enumerate(groups[:2]):
        for context in CONTEXTS:
            expected = plainly(model, tokenizer, one, context, config, step_seed(0, 0) + place)
            found = analysis.groups[place].scores[context]
            assert found == pytest.approx([float(tokens.mean()) for tokens in expected], abs=1e-4)
    by_rollout = {(row["context"], row["source"], row["rollout"]): row for row in analysis.rollouts}
    assert by_rollout["2s", "0", 1]["successes_shown"] == 2
    assert by_rollout["2s", "0", 0]["successes_shown"] == by_rollout["2s" + MATCHED, "0", 1]["successes_shown"] == 1
    assert json.loads(json.dumps(analysis.to_dict()))["counts"]["groups_of_one"] == 1


def test_context_choice(model, tokenizer, groups):
    analysis = analyze(model, groups, ["1s", "none"], tokenizer=tokenizer, controls=False, resamples=50)
    assert (list(analysis.values), analysis.controls) == (["1s", "none"], [])
    with pytest.raises(ValueError, match=r"expected contexts out of \['none', .* got \['3s'\]"):
        analyze(model, groups, ["3s"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"expected the reference among the contexts \['none'\], got '1s'"):
        analyze(model, groups, ["none"], tokenizer=tokenizer, reference="1s")


def saved(path, groups, **origin):
    write_jsonl(path, completion_records(groups, **origin))
    return str(path)


def test_an_interrupted_analysis_goes_on(config, tokenizer, groups, tmp_path, monkeypatch):
    """After a kill within the second line, only what is missing is scored, and the result is the same."""
    names = [saved(tmp_path / "step.jsonl", groups)]
    whole = analyze_command(config, options(tmp_path / "out", rollouts=names))
    lines = (tmp_path / "out" / "scored.jsonl").read_text().splitlines()
    (tmp_path / "out" / "scored.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    calls, score = [], scored_module._score
    monkeypatch.setattr(scored_module, "_score", lambda *given: calls.append(given[-1]) or score(*given))
    again = analyze_command(config, options(tmp_path / "out", rollouts=names))
    assert [source.rsplit(":", 1)[1] for source in calls] == ["6", "10", "13"]
    assert [one.scores for one in again.groups] == [one.scores for one in whole.groups]
    assert again.rows == whole.rows
    assert len((tmp_path / "out" / "scored.jsonl").read_text().splitlines()) == 4
    for name in ("auc.png", "margins.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match=r"other settings \(contexts\)"):
        analyze_command(config, options(tmp_path / "out", rollouts=names, contexts=["none"]))
    replaced = analyze_command(config, options(tmp_path / "out", rollouts=names, contexts=["none"], overwrite=True))
    assert list(replaced.values) == ["none"]
    with pytest.raises(FileExistsError, match="holds no analysis"):
        analyze_command(config, options(tmp_path, rollouts=names))


def test_bad_input_is_named(config, tokenizer, groups, model, tmp_path):
    other = saved(tmp_path / "other.jsonl", groups, **(fingerprint(model, tokenizer) | {"model": "llama 80x8192"}))
    with pytest.raises(ValueError, match=r"other.jsonl:1 was sampled with model 'llama 80x8192'.*--other-model"):
        analyze_command(config, options(tmp_path / "a", rollouts=[other]))
    few = {"contexts": ["none"], "controls": False}
    assert (
        analyze_command(config, options(tmp_path / "b", rollouts=[other], other_model=True, **few)).counts["groups"]
        == 4
    )
    with open(other, "a", encoding="utf-8") as handle:
        handle.write('{"prompt": "cut sho')
    with pytest.raises(ValueError, match=r"other.jsonl:14 is no rollout: .*--skip-bad-lines"):
        analyze_command(config, options(tmp_path / "c", rollouts=[other], other_model=True, **few))
    kept = options(tmp_path / "d", rollouts=[other], other_model=True, skip_bad_lines=True, **few)
    assert analyze_command(config, kept).counts["groups"] == 4
    assert json.loads((tmp_path / "d" / "analysis.json").read_text())["bad_lines"]["count"] == 1
    config.data.train_dataset = str(write_rows(tmp_path))
    with pytest.raises(ValueError, match="has 5 prompts, --num-prompts asks for 9"):
        analyze_command(config, options(tmp_path / "f", num_prompts=9))
    with pytest.raises(ValueError, match="got -1 and 200"):
        analyze_command(config, options(tmp_path / "e", num_prompts=-1))


def test_the_command_samples_judges_and_scores(config, tmp_path):
    """From the command line, with the settings of a run, over prompts it samples itself."""
    config.data.train_dataset = str(write_rows(tmp_path))
    write_json(tmp_path / "run.json", config.as_dict())
    done = mopd(
        *("analyze", "--config", str(tmp_path / "run.json"), "--num-prompts", "4", "--output", str(tmp_path / "out")),
        *("--contexts", "none", "2s", "all", "--resamples", "100"),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "analysis.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == record["counts"]["rollouts"] == 24
    assert [one["rewards"] for one in record["groups"]] == [
        [line["reward"] for line in lines[i : i + 6]] for i in range(0, 24, 6)
    ]
    assert {row["context"] for row in record["controls"]} == {"2s", "all"}
    assert all(row["composition_auc"] == 1 for row in record["controls"] if row["context"] == "all" and row["prompts"])
    assert "counting" in done.stdout


def test_sampled_rollouts_are_judged_by_the_reward_functions_of_the_run(config, tokenizer, tmp_path):
    config.data.train_dataset = str(write_rows(tmp_path))
    config.data.reward_functions = ["tests.train.rewards.right", "tests.train.rewards.parity"]
    config.data.reward_weights = [2.0, 0.5]
    path = sampled_rollouts(config, tokenizer, tmp_path, 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["reward"] for row in rows] == [2.0 + 0.5 * (row["completion_ids"][0] % 2 == 0) for row in rows]


def test_the_teacher_is_the_one_that_was_trained_with(tiny_model, tokenizer, tmp_path, caplog):
    checkpoint = tmp_path / "run" / "checkpoint-3"
    model = load_model(str(tiny_model))
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    config = Config()
    config.model.model_name_or_path = str(checkpoint)
    assert teacher_name(config) == str(checkpoint)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(checkpoint / "teacher")
    assert teacher_name(config) == str(checkpoint / "teacher")
    assert load_teacher(config, tokenizer).lm_head.weight.abs().sum() == 0
    assert tokenizer_of(str(checkpoint / "teacher")).get_vocab() == tokenizer.get_vocab()
    config.distillation.teacher_regularization = "frozen"
    config.distillation.teacher_model_name_or_path = str(tiny_model)
    assert load_teacher(config, tokenizer).lm_head.weight.abs().sum() > 0

    trained = Config()
    trained.context.instruction_template = "\n\nAnswer."
    trained.rollout.temperature = 0.5
    write_json(tmp_path / "run" / "run.json", trained.as_dict())
    with caplog.at_level(logging.WARNING):
        warn_of_other_settings(config, [checkpoint / "teacher"])
    assert [record.args[:2] for record in caplog.records] == [
        ("context", "instruction_template"),
        ("rollout", "temperature"),
        ("distillation", "teacher_regularization"),
        ("distillation", "teacher_model_name_or_path"),
    ]
    assert "run.json takes its settings" in caplog.text
