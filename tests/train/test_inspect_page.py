"""The inspector in a real browser: what it shows, switches, filters and sorts, and that text stays text."""

from __future__ import annotations

import itertools

import pytest
import torch

from mopd_train.analysis.inspect_page import GroupData, render
from mopd_train.analysis.inspect_scores import score_group
from mopd_train.config import Config
from mopd_train.models import load_model
from tests.train.browser import Browser, start_browser
from tests.train.inspected import CONTEXTS, HOSTILE, write_page
from tests.train.test_contexts import group
from tests.train.test_inspect import jensen_shannon, log_softmax


@pytest.fixture(scope="module")
def browser():
    yield from start_browser()


@pytest.fixture(scope="module")
def page(tokenizer, tmp_path_factory):
    return write_page(tokenizer, tmp_path_factory.mktemp("pages"))


@pytest.fixture
def opened(browser, page):
    browser.open(page)
    yield browser
    assert browser.errors() == []


def tokens(browser, place=0):
    return browser.all(f"#tokens-{place} .token")


def values(browser, place=0):
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.dataset.value)"
    return browser.run(script, f"#tokens-{place} .token")


def numbers(browser):
    return [int(x) for x in browser.run("return [...document.querySelectorAll('.rollout')].map(e => e.dataset.number)")]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_tokens_have_the_colour_of_their_log_ratio(browser, page, theme):
    """In pixels: blue where the teacher likes a token more, orange where less, the page's ground at 0, and no less
    contrast than WCAG AA asks for; weaker values are nearer to the ground."""
    browser.open(page, theme)
    more, less, zero, some_more, some_less = (browser.ground(token) for token in tokens(browser)[:5])
    assert max(zero) - min(zero) < 12
    assert (min(zero) > 240) == (theme == "light")
    assert (max(zero) < 40) == (theme == "dark")
    for blue, orange in ((more, less), (some_more, some_less)):
        assert blue[2] > blue[0] + 20
        assert orange[0] > orange[2] + 20
    for strong, weak in ((more, some_more), (less, some_less)):
        away = [sum(abs(x - y) for x, y in zip(color, zero, strict=True)) for color in (strong, weak)]
        assert away[0] > 1.5 * away[1]
    contrasts = browser.run(
        """return painted.filter(([node]) => node.dataset.value !== "–").map(([node]) => {
             const [a, b] = ['color', 'backgroundColor'].map((name) =>
               luminance(getComputedStyle(node)[name].match(/[0-9]+/g).map(Number)));
             return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
           })"""
    )
    assert min(contrasts) >= 4.5
    assert browser.errors() == []


def as_seen_by(color, deficiency):
    """Linear RGB as dichromats see it (Viénot, Brettel and Mollon 1999)."""
    matrices = {
        "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
        "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
    }
    linear = (torch.tensor(color) / 255.0) ** 2.2
    return torch.tensor(matrices[deficiency]) @ linear


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_signs_differ_for_colour_blind_readers_and_without_colour(browser, page, theme):
    browser.open(page, theme)
    more, less, zero = (browser.ground(token) for token in tokens(browser)[:3])
    for deficiency in ("protan", "deutan"):
        for one, other in itertools.combinations((more, less, zero), 2):
            assert (as_seen_by(one, deficiency) - as_seen_by(other, deficiency)).abs().max() > 0.15
    lines = [
        browser.run(
            "const s = getComputedStyle(arguments[0]); return s.textDecorationLine + s.textDecorationStyle", token
        )
        for token in tokens(browser)[:4]
    ]
    assert lines == ["underlinesolid", "underlinewavy", "nonesolid", "nonesolid"]


def test_contexts_and_measures_change_colours_and_numbers(opened):
    assert values(opened)[:5] == ["+2.00", "−2.00", "0.00", "+0.90", "−0.90"]
    blue = opened.ground(tokens(opened)[0])
    opened.choose("context", "0")
    assert set(values(opened)) == {"0.00"}
    assert opened.ground(tokens(opened)[0]) == (255, 255, 255) != blue
    assert "Teacher prompt under none" in opened.text("#rollouts summary")
    opened.choose("context", "1")
    opened.choose("measure", "divergence")
    assert values(opened)[:5] == ["1.00", "1.00", "0.00", "0.45", "0.45"]
    purple = opened.ground(tokens(opened)[1])
    assert purple[0] > purple[1] < purple[2]
    opened.choose("range", "8")
    assert sum(opened.ground(tokens(opened)[1])) > sum(purple)  # paler


def test_differences_of_contexts(opened):
    opened.choose("context", "0")
    opened.choose("against", "1")
    assert values(opened)[:3] == ["−2.00", "+2.00", "0.00"]
    less = opened.ground(tokens(opened)[0])
    assert less[0] > less[2] + 20
    assert "under none minus that under 2s" in opened.text("#legend")
    assert values(opened, place=3) == ["–"] * len(tokens(opened, place=3))  # undefined on one side
    assert opened.texts("#panel thead")[1].endswith("studentnone2s")


def test_undefined_contexts_say_so(opened):
    card = opened.all(".rollout")[3]
    assert "nothing to show for this rollout" in card.text
    assert "Teacher prompt" not in card.text
    assert opened.ground(tokens(opened, place=3)[0]) == (255, 255, 255)


def test_cards_show_verdict_reward_and_feedback(opened):
    heads = opened.texts(".rollout h3")
    assert "Rollout 1 ✓ successreward 1 · " in heads[0]
    assert "✗ failurereward 0 · " in heads[1]
    assert "✗ failurereward 0.25" in heads[2]
    assert "? no verdictno reward" in heads[3]
    assert opened.texts(".feedback") == ["right", "wrong"]
    assert opened.texts("#groups li")[0].startswith("1. What is 6 * 7?1 of 4 right · divergence ")


def test_filters(opened):
    assert opened.text("#count") == "5 of 5 rollouts in 2 of 2 groups"
    opened.run("focusToken(2, 1)")
    opened.choose("verdict", "failure")
    assert numbers(opened) == [2, 3]
    assert opened.run("return current().number") == 3  # it was looked at before
    assert opened.text("#count") == "3 of 5 rollouts in 2 of 2 groups"
    opened.choose("verdict", "mixed")
    assert opened.text("#count") == "4 of 5 rollouts in 1 of 2 groups"
    opened.choose("verdict", "all")
    opened.choose("task", "words")
    assert opened.text("#rollouts h2") == "Group 2"
    assert opened.text("#count") == "1 of 5 rollouts in 1 of 2 groups"
    opened.choose("task", "")
    opened.one("#least").send_keys("0.45")  # means: above 0.45 for rollouts 1 and 3, 0.25 for 2, undefined for 4
    opened.one("#groups li").click()
    assert numbers(opened) == [1, 3]
    opened.one("#least").clear()
    opened.one("#query").send_keys("FORTY")
    assert numbers(opened) == [3]
    opened.one("#query").send_keys("never said")
    assert opened.text("#rollouts") == "No rollout matches the filters."


def test_orders(opened):
    order = {"file": [1, 2, 3, 4], "less": [3, 1, 2, 4], "more": [2, 1, 3, 4], "reward": [1, 3, 2, 4]}
    for name, expected in order.items():
        opened.choose("order", name)
        opened.one("#groups li").click()
        places = [i for i, text in enumerate(opened.texts("#groups li")) if text.startswith("1. ")]
        opened.all("#groups li")[places[0]].click()
        assert numbers(opened) == expected, name
    opened.choose("order", "divergence")
    assert [text[:2] for text in opened.texts("#groups li")] == ["2.", "1."]  # an undefined rollout comes last


def selected(browser):
    return browser.run(
        "const t = document.querySelector('.token[aria-selected=true]');"
        "return [document.activeElement.id, document.activeElement.getAttribute('aria-activedescendant'), t.id]"
    )


def test_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    opened.press("j")
    assert selected(opened) == ["tokens-1", "token-1-0", "token-1-0"]
    opened.press("k", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert selected(opened) == ["tokens-0", "token-0-1", "token-0-1"]
    assert opened.text("#panel h2").startswith(data_text(opened, 0, 1))
    opened.press(Keys.HOME)
    assert selected(opened)[2] == "token-0-0"
    opened.press(".")  # the next strong one is the second
    assert selected(opened)[2] == "token-0-1"
    opened.press(Keys.END)
    assert selected(opened)[2] == f"token-0-{len(tokens(opened)) - 1}"
    opened.press("j", "j", "j", "j")  # past the last rollout: the next group
    assert opened.text("#rollouts h2") == "Group 2"
    opened.press("k")
    assert (opened.text("#rollouts h2"), selected(opened)[0]) == ("Group 1", "tokens-3")
    opened.press("]")
    assert opened.text("#rollouts h2") == "Group 2"
    opened.press("[", "1")
    assert set(values(opened)) == {"0.00"}
    opened.press("c", "d", "m", "n", "p")
    state = opened.run("return state")
    assert (state["context"], state["against"], state["measure"], state["numbers"]) == (1, 0, "divergence", True)
    assert (
        opened.run("return getComputedStyle(document.querySelector('.tokens .token'), '::after').content") == '"+1.00"'
    )
    assert opened.text(".rollout details pre").startswith("peers prompt ")
    assert opened.text(".rollout details pre").endswith(HOSTILE)
    opened.press("1")  # the prompt stays open and is now the other context's
    assert opened.text(".rollout details pre").startswith("none prompt ")
    opened.press("t")
    assert opened.run("return document.documentElement.dataset.theme") == "dark"
    assert max(opened.ground(opened.one("#rollouts"))) < 40
    opened.press("?")
    assert opened.run("return document.getElementById('help').open")
    opened.press(Keys.ESCAPE)
    assert not opened.run("return document.getElementById('help').open")
    opened.press("/", "j")  # now a letter of the search
    assert opened.run("return [document.activeElement.id, state.query]") == ["query", "j"]


def data_text(browser, rollout, token):
    return browser.run(
        "const r = data.groups[0].rollouts[arguments[0]]; return data.vocabulary[r.tokens[arguments[1]]]",
        rollout,
        token,
    )


def test_hovering_shows_both_sides(opened):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(opened.driver).move_to_element(tokens(opened)[1]).perform()
    sides, likely = opened.texts("#panel table")
    assert "student5.0 %0.250" in sides
    assert "none5.0 %0.0000.00000.500" in sides
    assert "▸ 2s0.7 %−2.0001.00000.500" in sides
    assert likely.endswith("student2s481.9 %81.9 %● 25.0 %0.7 %")


def test_markup_stays_text(opened):
    opened.all("#groups li")[1].click()
    assert "".join(opened.texts(".tokens .token")).startswith(HOSTILE)
    assert opened.text(".feedback") == HOSTILE
    assert opened.text("#rollouts pre") == f"Say {HOSTILE}"
    assert opened.text(".columns") == f"answer {HOSTILE}"
    assert (opened.driver.title, opened.text("#about")) == (HOSTILE, HOSTILE)
    opened.one(".rollout summary").click()
    assert HOSTILE in opened.text(".rollout details pre")
    seen = opened.run(
        "return [window.hacked ?? null, window.alerted ?? null, document.images.length, document.scripts.length,"
        " performance.getEntriesByType('resource').length]"
    )
    assert seen == [None, None, 0, 2, 0]


def test_the_policy_stops_scripts_and_requests(browser, page):
    """Even if text were put into the page as markup, nothing would run or be fetched."""
    browser.open(page)
    browser.run(
        "document.body.insertAdjacentHTML('beforeend', arguments[0])", "<img src=x onerror='window.hacked = 1'>"
    )
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 2'; document.body.append(s)"
    )
    blocked = browser.driver.execute_async_script("fetch('page.html').catch(e => arguments[0](String(e)))")
    assert "TypeError" in blocked
    assert browser.run("return window.hacked ?? null") is None
    assert len(browser.errors()) >= 2


def test_every_field_and_list_has_a_name(opened):
    nameless = opened.run(
        """return [...document.querySelectorAll('select, input, button, [role=listbox], aside, nav')].filter((node) =>
             !node.labels?.length && !node.getAttribute('aria-label') && !node.textContent.trim()).length"""
    )
    assert nameless == 0
    assert opened.run("return document.querySelectorAll('[role=option]:not([aria-selected])').length") == 0
    assert opened.run("return document.documentElement.lang") == "en"


def test_values_on_the_page_equal_a_dense_computation(browser: Browser, tiny_model, tokenizer, tmp_path):
    """From the model to the pixels' text: a tiny float64 model, its teacher under 2s, one token after another."""
    config = Config()
    config.distillation.alpha, config.rollout.temperature = 0.3, 0.7
    model = load_model(str(tiny_model), "float64")
    mixed = group(tokenizer, [1, 0, 1, 1])
    data = GroupData(tokenizer, threshold=1.0)
    scored = score_group(model, model, tokenizer, mixed, CONTEXTS, config, seed=0)
    data.add(1, "tiny", mixed, scored)
    path = tmp_path / "tiny.html"
    text = render("inspect", "tiny", {"about": "", "contexts": CONTEXTS, **data.as_dict()})
    path.write_text(text, encoding="utf-8")
    browser.open(path)
    for place, (rollout, scores) in enumerate(zip(mixed.rollouts, scored, strict=True)):
        teacher_ids = scores.teacher[scores.contexts["2s"]].prompt.token_ids
        q = log_softmax(model, mixed.prompt.token_ids, rollout.token_ids, 0.7)
        p = log_softmax(model, teacher_ids, rollout.token_ids, 0.7)
        divergence = jensen_shannon(q, p, 0.3, None)
        for t, label in enumerate(rollout.token_ids):
            browser.run("focusToken(arguments[0], arguments[1])", place, t)
            ratio = float(p[t, label] - q[t, label])
            cells = browser.run("return [...document.querySelectorAll('#panel table')[0].rows].at(-1).innerText").split(
                "\t"
            )
            shown = [float(cell.replace("−", "-").rstrip(" %")) for cell in cells[1:]]
            entropy = float(-(p[t].exp() * p[t]).sum())
            expected = [100 * float(p[t, label].exp()), ratio, float(divergence[t]), entropy]
            # probabilities are shown to 3 digits or fewer of a log-prob kept to 1e-3
            assert shown[0] == pytest.approx(expected[0], rel=0.5, abs=0.05)
            assert shown[1:] == pytest.approx(expected[1:], abs=2e-3)
            own = float(values(browser, place)[t].replace("−", "-").lstrip("+"))
            assert own == pytest.approx(ratio, abs=6e-3)
            best = browser.run("return document.querySelectorAll('#panel table')[1].rows[1].cells[0].innerText")
            likeliest = int(torch.stack([q[t], p[t]]).amax(0).argmax())
            assert best.removeprefix("● ").strip() in (tokenizer.decode([likeliest]).strip(), "∅")
    assert browser.errors() == []
