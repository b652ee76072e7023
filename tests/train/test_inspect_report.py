"""The report page of a run: what it reads from the folder, and what a browser shows of it."""

from __future__ import annotations

import json

import pytest

from mopd_train import cli
from mopd_train.analysis.inspect_report import report_data
from mopd_train.config import Config
from mopd_train.files import write_json, write_jsonl
from tests.train.browser import start_browser
from tests.train.inspected import HOSTILE


@pytest.fixture(scope="module")
def browser():
    yield from start_browser()


def record(group, number, reward):
    return {
        "prompt": [{"role": "user", "content": f"question {group} {HOSTILE}"}],
        "group": group,
        "completion": f"rollout {number} {HOSTILE}",
        "completion_ids": [1, 2, 3],
        "finished": number > 0,
        "reward": reward,
        "feedback": HOSTILE if reward == 0 else None,
        "answer": "42",
    }


@pytest.fixture
def run(tmp_path):
    """Four steps; the second lacks a metric, the third has one that is not finite."""
    folder = tmp_path / "a run"
    config = Config()
    config.rollout.num_generations = 3
    config.training.max_steps = 9
    written = config.as_dict()
    del written["distillation"]["grad_filter"]  # made by a version without it
    write_json(folder / "run.json", written)
    rows = [
        {
            "step": step,
            "reward": 0.25 * step,
            "loss": 1.0 / step,
            "time/rollout": 3.0,
            "time/student": 1.0 * step,
            "x": -step,
        }
        for step in (1, 2, 3, 4)
    ]
    del rows[1]["loss"]
    rows[2]["loss"] = float("nan")
    write_jsonl(folder / "metrics.jsonl", rows)
    for name, mean in (("before", 0.125), ("after", 0.875)):
        write_json(folder / f"evaluation-{name}.json", {"mean_at_k": mean, "pass_at_k": 1.0, "k": 8})
    for step in (1, 2, 3, 4):
        lines = [record(group, i, reward) for group in range(3) for i, reward in enumerate([1.0, 0.0, None])]
        write_jsonl(folder / "completions" / f"step-{step:06d}.jsonl", lines)
    return folder


def test_data_of_a_run(run):
    data = report_data(run, steps=3, groups=2)
    assert data["steps"] == [1, 2, 3, 4]
    assert data["metrics"]["reward"] == [0.25, 0.5, 0.75, 1.0]
    assert data["metrics"]["loss"] == [1.0, None, None, 0.25]
    assert [(e["name"], e["step"], e["mean_at_k"]) for e in data["evaluations"]] == [
        ("before", 0, 0.125),
        ("after", 4, 0.875),
    ]
    assert [sample["step"] for sample in data["samples"]] == [1, 3, 4]  # evenly spaced, with both ends
    assert [len(sample["groups"]) for sample in data["samples"]] == [2, 2, 2]
    first = data["samples"][0]["groups"][0]
    assert first["columns"] == {"answer": "42"}
    assert [rollout["verdict"] for rollout in first["rollouts"]] == ["success", "failure", "none"]
    changed = {name for name, _, is_default in data["settings"] if not is_default}
    assert changed == {"rollout.num_generations", "training.max_steps"}


def test_a_run_still_going_on(run):
    """No finished step, no evaluation, a completions file whose last line is not written yet."""
    for path in run.glob("evaluation-*"):
        path.unlink()
    write_jsonl(run / "metrics.jsonl", [])
    with open(run / "completions" / "step-000004.jsonl", "a") as handle:
        handle.write('{"prompt": [')
    data = report_data(run, steps=1, groups=9)
    assert (data["steps"], data["metrics"], data["evaluations"]) == ([], {}, [])
    assert [len(sample["groups"]) for sample in data["samples"]] == [3]


def test_feedback_may_be_anything_and_broken_lines_are_named(run):
    path = run / "completions" / "step-000004.jsonl"
    write_jsonl(path, [{**record(0, 0, 1.0), "feedback": {"tests": [1, 2]}}])
    [sample] = report_data(run, steps=1, groups=1)["samples"]
    assert sample["groups"][0]["rollouts"][0]["feedback"] == '{"tests": [1, 2]}'
    for line, message in (("{", r"000004.jsonl:2 is not valid JSON"), ("{}", r":2 is no rollout: it has no 'prompt'")):
        write_jsonl(path, [record(0, 0, 1.0)])
        with open(path, "a") as handle:
            handle.write(line + "\n")
        with pytest.raises(ValueError, match=message):
            report_data(run, steps=1, groups=1)


@pytest.mark.parametrize(
    ("changes", "message"), [(["--steps", "-1"], "--steps >= 0, got -1"), ([], "is no run: it has")]
)
def test_what_report_refuses(tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path), *changes])
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_page(browser, run):
    cli.main(["report", str(run), "--steps", "2", "--groups", "1"])
    browser.open(run / "report.html")
    assert browser.text("h1") == "Run a run"
    assert "4 of 9 steps" in browser.text("header p")
    titles = browser.run("return [...document.querySelectorAll('figure')].map(e => e.dataset.title)")
    assert titles == ["Reward", "Loss, nats per token", "Seconds a step, by phase"]
    assert curve(browser, "Reward") == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert browser.text("figure[data-title=Reward] output") == "1"
    marks = browser.run(
        "return [...document.querySelectorAll('figure svg[role=img] .mark')].map(e => +e.getAttribute('cy'))"
    )
    assert marks[0] > marks[1]  # 0.125 is drawn below 0.875
    assert browser.run("return document.querySelectorAll('.bar-part').length") == 8
    assert browser.texts("#phases tbody tr") == ["rollout12.054.5 %", "student10.045.5 %"]
    assert browser.texts("#evaluations tbody tr") == ["before00.12518", "after40.87518"]
    browser.press("t")
    assert browser.run("return document.documentElement.dataset.theme") == "dark"
    assert max(browser.ground(browser.one("figure"))) < 40
    assert browser.errors() == []


def curve(browser, title):
    """(step, value) of a figure's only line, read back from the axes' labels and the drawn path."""
    path, xs, ys = browser.run(
        """const svg = document.querySelector(`figure[data-title="${arguments[0]}"] svg`);
           const labels = [...svg.querySelectorAll('.axes text')];
           const at = (name, side) => labels.filter((l) => (l.getAttribute('text-anchor') === 'end') === side)
             .map((l) => [+l.getAttribute(name), +l.textContent]);
           return [svg.querySelector('.curve').getAttribute('d'), at('x', false), at('y', true)];""",
        title,
    )
    points = [tuple(map(float, point.split())) for point in path[1:].split("L")]

    def convert(place, labels, shift):
        (a, first), (b, last) = labels[0], labels[-1]
        return first + (place + shift - a) / (b - a) * (last - first)

    return [(pytest.approx(convert(x, xs, 0), abs=0.01), pytest.approx(convert(y, ys, 4), abs=0.01)) for x, y in points]


def test_readouts_follow_pointer_and_keys(browser, run):
    from selenium.webdriver.common.keys import Keys

    cli.main(["report", str(run)])
    browser.open(run / "report.html")
    browser.one("figure[data-title=Reward] svg").click()  # the middle: step 2, with the evaluation at step 0
    assert browser.text("figure[data-title=Reward] figcaption > span") == "step 2"
    assert browser.text("figure[data-title=Reward] output") == "0.5"
    browser.run("document.querySelector('figure[data-title^=Loss] svg').focus()")
    browser.press(Keys.ARROW_LEFT)
    assert browser.text("figure[data-title^=Loss] output") == "–"  # step 3 has no number
    browser.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert browser.text("figure[data-title^=Loss] output") == "1"
    dots = browser.run("return document.querySelectorAll('figure[data-title^=Loss] circle').length")
    assert dots == 2  # both of its numbers stand alone
    browser.one("#page > details summary").click()
    assert browser.text("figure[data-title=x] output") == "-4"
    assert browser.errors() == []


def test_samples_and_settings(browser, run):
    cli.main(["report", str(run), "--steps", "2", "--groups", "2"])
    browser.open(run / "report.html")
    assert browser.texts("#sample-step option") == ["step 1", "step 4"]
    assert browser.run("return document.querySelector('#sample-step').value") == "1"
    assert browser.texts("#shown .group > pre") == [f"question {i} {HOSTILE}" for i in range(2)]
    assert browser.texts("#shown .group:first-child li") == [
        f"✓ 1rollout 0 {HOSTILE}3 tokens · cut at the limit",
        f"✗ 0rollout 1 {HOSTILE}{HOSTILE} · 3 tokens",
        f"? –rollout 2 {HOSTILE}3 tokens",
    ]
    browser.choose("sample-step", "0")
    assert len(browser.all("#shown .group")) == 2
    assert browser.run("return [window.hacked ?? null, document.images.length]") == [None, 0]
    rows = dict(
        browser.run(
            "return [...document.querySelectorAll('#settings tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
        )
    )
    assert json.loads(rows["rollout.num_generations"]) == 3
    assert browser.texts("#settings b") == ["rollout.num_generations", "training.max_steps"]
    assert browser.errors() == []


def test_the_page_of_a_run_without_steps(browser, run):
    write_jsonl(run / "metrics.jsonl", [])
    cli.main(["report", str(run)])
    browser.open(run / "report.html")
    assert browser.text("#curves .note") == "No step is finished yet."
    assert browser.errors() == []
