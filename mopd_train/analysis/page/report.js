"use strict";

const page = document.getElementById("page");

const FAMILIES = [
  ["Reward", ["reward", "reward_std"]],
  ["Loss, nats per token", ["loss"]],
  ["Entropy, nats per token", ["entropy", "teacher_entropy"]],
  ["Completion length, tokens", ["completions/mean_length"]],
  ["Shares", ["completions/clipped_ratio", "frac_reward_zero_std", "self_distillation/success_group_fraction",
    "self_distillation/reprompt_sample_fraction", "top1_agreement"]],
  ["Gradient norm", ["grad_norm"]],
];

const MARKS = {success: "✓", failure: "✗", none: "?"};

function series(names) {
  return names.filter((name) => name in data.metrics).map((name) => ({name, values: data.metrics[name]}));
}

function curves() {
  const held = data.evaluations
    .filter((scores) => typeof scores.mean_at_k === "number")
    .map((scores) => [scores.step, scores.mean_at_k]);
  return FAMILIES.map(([title, names]) => [title, series(names)]).filter(([, found]) => found.length)
    .map(([title, found]) => chart({title, steps: data.steps, series: found, marks: title === "Reward" ? held : []}));
}

function phases() {
  const found = series(Object.keys(data.metrics).filter((name) => name.startsWith("time/")));
  if (!found.length) return null;
  const total = (s) => s.values.reduce((sum, number) => sum + (number ?? 0), 0);
  const all = found.reduce((sum, s) => sum + total(s), 0);
  const named = found.map((s) => ({...s, name: s.name.slice("time/".length)}));
  const rows = named.map((s) => [s.name, total(s).toFixed(1), `${(100 * total(s) / all).toFixed(1)} %`]);
  return el("section", {id: "phases"}, el("h2", {}, "Time"), el("div", {class: "grid"},
    chart({title: "Seconds a step, by phase", steps: data.steps, series: named, stacked: true}),
    table("Whole run", ["phase", "seconds", "share"], rows)));
}

function rest() {
  const drawn = new Set(FAMILIES.flatMap(([, names]) => names));
  const names = Object.keys(data.metrics).filter((name) => !drawn.has(name) && !name.startsWith("time/"));
  const details = el("details", {ontoggle: () => {
    if (!details.open || details.children.length > 1) return;
    const charts = names.map((name) => chart({title: name, steps: data.steps, series: series([name])}));
    details.append(el("div", {class: "grid"}, charts));
  }}, el("summary", {}, `${names.length} more metrics`));
  return names.length ? details : null;
}

function evaluations() {
  if (!data.evaluations.length) return el("p", {class: "note"}, "No evaluation in this run.");
  const keys = Object.keys(data.evaluations[0]).filter((key) => !["name", "step"].includes(key));
  return table("Held-out prompts", ["", "step", ...keys],
    data.evaluations.map((scores) => [scores.name, String(scores.step), ...keys.map((key) => short(scores[key]))]));
}

function samples() {
  if (!data.samples.length) return null;
  const shown = el("div", {id: "shown"});
  const open = (place) => shown.replaceChildren(...data.samples[place].groups.map(sampledGroup));
  const options = data.samples.map(({step}, i) => [String(i), `step ${step}`]);
  open(options.length - 1);
  return el("section", {id: "samples"}, el("h2", {}, "Samples"),
    select("rollouts of", "sample-step", options, String(options.length - 1), open), shown);
}

function sampledGroup(group) {
  const right = group.rollouts.filter((rollout) => rollout.verdict === "success").length;
  const columns = Object.entries(group.columns).map(([key, text]) => `${key} ${text}`).join(" · ");
  return el("details", {class: "group", open: true},
    el("summary", {}, `${right} of ${group.rollouts.length} right · ${columns}`), el("pre", {}, group.prompt),
    el("ol", {}, group.rollouts.map(sampledRollout)));
}

function sampledRollout(rollout) {
  const facts = [rollout.feedback, `${rollout.tokens} tokens`, rollout.finished ? null : "cut at the limit"];
  return el("li", {class: rollout.verdict},
    el("span", {class: "verdict"}, `${MARKS[rollout.verdict]} ${short(rollout.reward)}`),
    el("span", {class: "text"}, rollout.text),
    el("span", {class: "facts"}, facts.filter(Boolean).join(" · ")));
}

function settings() {
  const row = ([key, text, standard]) => [standard ? key : el("b", {}, key), el("code", {}, text)];
  return el("details", {id: "settings"}, el("summary", {}, "Settings; bold: other than the default"),
    table("", ["setting", "value"], data.settings.map(row)));
}

page.append(...[
  el("header", {}, el("h1", {}, data.title), el("p", {}, data.about),
    el("div", {class: "buttons"}, el("button", {type: "button", id: "theme", onclick: toggleTheme}, "dark / light"))),
  el("section", {id: "curves"}, el("h2", {}, "Curves"),
    data.steps.length ? el("div", {class: "grid"}, curves()) : el("p", {class: "note"}, "No step is finished yet.")),
  el("section", {id: "evaluations"}, el("h2", {}, "Scores"), evaluations()),
  data.steps.length ? phases() : null, rest(), samples(), settings(),
].filter(Boolean));
bindKeys({t: toggleTheme});
