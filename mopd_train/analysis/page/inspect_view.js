"use strict";

const page = document.getElementById("page");
const view = {};  // the parts of the page that are drawn again
let visible = [];  // what shown() gave when the lists were drawn
let drawn = [];  // the rollouts on the page
let painted = [];  // [token element, rollout, t] of each of their tokens

const MARKS = {success: "✓ success", failure: "✗ failure", none: "? no verdict"};

function build() {
  const tasks = [...new Set(data.groups.map((group) => group.task))];
  const contexts = data.contexts.map((name, i) => [String(i), name]);
  const pick = (key, convert = (x) => x, redraw = drawLists) => (x) => {
    state[key] = convert(x);
    redraw();
  };
  view.groups = el("ul", {role: "listbox", "aria-label": "Groups", id: "groups", tabindex: 0});
  view.count = el("p", {id: "count", role: "status"});
  view.rollouts = el("main", {id: "rollouts", tabindex: -1});
  view.panel = el("aside", {id: "panel", "aria-label": "Token"});
  view.legend = el("p", {id: "legend"});
  view.controls = el("form", {id: "controls", "aria-label": "View", onsubmit: (event) => event.preventDefault()},
    select("context", "context", contexts, String(state.context), pick("context", Number)),
    select("minus", "against", [["-1", "nothing"], ...contexts], "-1", pick("against", Number)),
    select("colour", "measure", Object.entries(MEASURES).map(([key, m]) => [key, m.label]), state.measure, setMeasure),
    select("full at", "range", [0.1, 0.25, 0.5, 1, 2, 4, 8].map((r) => [String(r), `${r} nats`]), String(state.range),
      pick("range", Number, repaint)),
    el("label", {}, el("input", {type: "checkbox", id: "numbers", onchange: toggleNumbers}), " numbers"));
  const stay = (event) => event.preventDefault();
  view.filters = el("form", {id: "filters", "aria-label": "Filter and order", onsubmit: stay},
    el("label", {}, el("span", {}, "search"),
      el("input", {type: "search", id: "query", oninput: (event) => pick("query")(event.target.value)})),
    select("task", "task", [["", "all"], ...tasks.map((task) => [task, task])], "", pick("task")),
    select("verdict", "verdict", Object.entries(VERDICTS), "all", pick("verdict")),
    el("label", {}, el("span", {}, "divergence ≥"),
      el("input", {type: "number", id: "least", min: 0, step: "any", placeholder: "0",
        oninput: (event) => pick("least", Number)(event.target.value)})),
    select("order", "order", Object.entries(ORDERS).map(([key, [label]]) => [key, label]), "file", pick("order")));
  page.append(
    el("header", {}, el("h1", {}, data.title), el("p", {id: "about"}, data.about),
      el("div", {class: "buttons"},
        el("button", {type: "button", id: "theme", onclick: toggleTheme}, "dark / light"),
        el("button", {type: "button", id: "help-button", onclick: showHelp}, "? keys"))),
    view.controls, view.legend,
    el("div", {id: "columns"}, el("nav", {"aria-label": "Groups"}, view.filters, view.count, view.groups),
      view.rollouts, view.panel),
    view.help = helpDialog());
}

// After a change of filter, order or context: the rollout looked at stays, wherever it now stands.
function drawLists() {
  const before = current();
  visible = shown();
  const kept = visible.findIndex(([group]) => group === data.groups[state.group]);
  const place = kept < 0 ? -1 : visible[kept][1].indexOf(before);
  const total = data.groups.reduce((sum, group) => sum + group.rollouts.length, 0);
  const matched = visible.reduce((sum, [, rollouts]) => sum + rollouts.length, 0);
  view.count.textContent = `${matched} of ${total} rollouts in ${visible.length} of ${data.groups.length} groups`;
  view.groups.replaceChildren(...visible.map(([group, rollouts], place) => groupItem(group, rollouts, place)));
  view.groups.classList.toggle("empty", !visible.length);
  openGroup(Math.max(0, kept), Math.max(0, place), place < 0 ? 0 : state.token);
}

function groupItem(group, rollouts, place) {
  const right = group.rollouts.filter((rollout) => rollout.verdict === "success").length;
  const values = rollouts.map((rollout) => mean(rollout, "divergence", state.context)).filter((x) => x !== null);
  const average = values.length ? (values.reduce((a, b) => a + b) / values.length).toFixed(3) : "–";
  return el("li", {role: "option", id: `group-${place}`, "aria-selected": "false", onclick: () => openGroup(place)},
    el("strong", {}, `${group.number}. ${lastLine(group.prompt)}`),
    el("span", {}, `${right} of ${group.rollouts.length} right · divergence ${average} · ${group.task}`));
}

function lastLine(prompt) {
  const line = prompt.trim().split("\n").at(-1);
  return line.length > 90 ? `${line.slice(0, 89)}…` : line;
}

function openGroup(place, rollout = 0, token = 0) {
  for (const [i, item] of [...view.groups.children].entries()) item.setAttribute("aria-selected", String(i === place));
  if (!visible.length) {
    [painted, drawn] = [[], []];
    view.rollouts.replaceChildren(el("p", {class: "note"}, "No rollout matches the filters."));
    view.panel.replaceChildren();
    drawLegend();
    return;
  }
  const [group, rollouts] = visible[place];
  view.groups.setAttribute("aria-activedescendant", `group-${place}`);
  view.groups.children[place].scrollIntoView({block: "nearest"});
  state.group = data.groups.indexOf(group);
  if (rollouts.length !== drawn.length || rollouts.some((one, i) => one !== drawn[i])) drawGroup(group, rollouts);
  repaint();
  focusToken(rollout, token, false);
}

function drawGroup(group, rollouts) {
  [painted, drawn] = [[], rollouts];
  const columns = Object.entries(group.columns).map(([key, x]) => el("li", {}, el("b", {}, key), ` ${x}`));
  view.rollouts.replaceChildren(
    el("section", {class: "prompt"}, el("h2", {}, `Group ${group.number}`), el("pre", {}, group.prompt),
      el("ul", {class: "columns"}, columns)),
    ...rollouts.map(rolloutCard));
}

function rolloutCard(rollout, place) {
  const tokens = rollout.tokens.map((id, t) => {
    const node = el("span", {role: "option", class: "token", id: `token-${place}-${t}`, "aria-selected": "false"},
      visibleText(data.vocabulary[id]));
    painted.push([node, rollout, t]);
    return node;
  });
  const point = (event) => {
    const node = event.target.closest(".token");
    if (node) focusToken(place, tokens.indexOf(node), event.type === "click");
  };
  return el("article", {class: `rollout ${rollout.verdict}`, "data-number": rollout.number},
    el("h3", {}, `Rollout ${rollout.number} `, el("span", {class: "verdict"}, MARKS[rollout.verdict]),
      el("span", {class: "facts"}, facts(rollout))),
    rollout.feedback ? el("p", {class: "feedback"}, rollout.feedback) : null,
    el("div", {class: "tokens", role: "listbox", tabindex: 0, id: `tokens-${place}`, onmouseover: point, onclick: point,
      onfocus: () => state.rollout === place || focusToken(place, 0, false),
      "aria-label": `Tokens of rollout ${rollout.number}`}, tokens),
    el("p", {class: "means"}),
    teacherPrompt(rollout));
}

function facts(rollout) {
  const reward = rollout.reward === null ? "no reward" : `reward ${rollout.reward}`;
  return `${reward} · ${rollout.tokens.length} tokens${rollout.finished ? "" : " · cut at the limit"}`;
}

function visibleText(text) {  // line breaks and tabs get a mark of their own
  return text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t") || "∅";
}

// Filled when it is opened: prompts are long, and most stay closed.
function teacherPrompt(rollout) {
  const fill = () => fillPrompt(details, rollout);
  const details = el("details", {class: "teacher-prompt", ontoggle: fill}, el("summary"));
  return details;
}

function fillPrompt(details, rollout) {
  const teacher = behind(rollout, state.context), name = data.contexts[state.context];
  details.hidden = teacher === null;
  if (teacher === null) return;
  const said = (label, list) => list.length ? ` · ${label}: rollout ${list.join(", ")}` : "";
  details.firstChild.textContent = `Teacher prompt under ${name}, ${teacher.length} tokens`
    + said("right", teacher.successes) + said("wrong", teacher.failures) + said("shown", teacher.attempts)
    + (teacher.feedback ? " · feedback" : "");
  details.querySelector("pre")?.remove();
  if (details.open) details.append(el("pre", {}, data.prompts[teacher.prompt]));
}

function repaint() {
  for (const [node, rollout, t] of painted) {
    const number = value(rollout, t);
    paint(node, number, state.range, isSequential());
    node.dataset.value = written(number);
    node.setAttribute("aria-label", `${data.vocabulary[rollout.tokens[t]]}, ${written(number)}`);
  }
  for (const [place, card] of [...view.rollouts.querySelectorAll(".rollout")].entries()) {
    card.querySelector(".means").textContent = means(drawn[place]);
    fillPrompt(card.querySelector(".teacher-prompt"), drawn[place]);
  }
  drawLegend();
  drawPanel();
}

function means(rollout) {
  const [ratio, divergence] = ["ratio", "divergence"].map((m) => mean(rollout, m, state.context));
  if (ratio === null) return `${data.contexts[state.context]} has nothing to show for this rollout: no loss here.`;
  const changed = change(rollout);
  return `mean log-ratio ${signed(ratio, 3)} · mean divergence ${divergence.toFixed(4)}`
    + (changed === null ? "" : ` · mean change against ${data.contexts[state.against]} ${changed.toFixed(3)}`);
}
