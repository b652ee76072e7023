"use strict";

// The legend, the panel of one token, and every way to move.

function drawLegend() {
  const sample = (share) => {
    const node = el("span", {class: "token"}, written(share * state.range));
    paint(node, share * state.range, state.range, isSequential());
    return node;
  };
  const [here, there] = [data.contexts[state.context], data.contexts[state.against]];
  const said = state.against >= 0
    ? `${MEASURES[state.measure].label} under ${here} minus that under ${there}`
    : isSequential() ? `divergence of teacher (${here}) and student, nats`
      : `log p of the teacher (${here}) − log q of the student, nats: blue, likelier to the teacher; orange, less`;
  view.legend.replaceChildren(...(isSequential() ? [0, 0.25, 0.5, 1] : [-1, -0.5, 0, 0.5, 1]).map(sample), ` ${said}`);
}

function focusToken(place, t, grab = true) {
  state.rollout = place;
  state.token = Math.max(0, Math.min(t, drawn[place].tokens.length - 1));
  view.rollouts.querySelector(".token[aria-selected=true]")?.setAttribute("aria-selected", "false");
  const list = document.getElementById(`tokens-${place}`);
  const node = document.getElementById(`token-${place}-${state.token}`);
  node?.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", node?.id ?? "");
  if (grab) {
    list.focus({preventScroll: true});
    node?.scrollIntoView({block: "nearest"});
  }
  drawPanel();
}

function current() {
  return drawn[state.rollout];
}

function drawPanel() {
  const rollout = current(), t = state.token;
  if (!rollout || t >= rollout.tokens.length) return view.panel.replaceChildren();
  const token = data.vocabulary[rollout.tokens[t]];
  view.panel.replaceChildren(
    el("h2", {}, el("code", {}, visibleText(token)), 
      ` token ${t + 1} of ${rollout.tokens.length}, id ${data.tokenIds[rollout.tokens[t]]}`),
    sides(rollout, t), others(rollout, t));
}

function sides(rollout, t) {
  const fixed = (stored, unit, digits) => (stored * unit).toFixed(digits);
  const rows = [["student", percent(-rollout.logprobs[t] * LOGPROB), "", "", fixed(rollout.entropy[t], LOGPROB, 3)]];
  data.contexts.forEach((name, context) => {
    const teacher = behind(rollout, context);
    const label = context === state.context ? el("b", {}, `▸ ${name}`) : name;
    rows.push(teacher === null ? [label, "–", "–", "–", "–"] : [
      label,
      percent(-teacher.logprobs[t] * LOGPROB),
      signed(measured(rollout, "ratio", context, t), 3),
      fixed(teacher.divergence[t], DIVERGENCE, 4),
      fixed(teacher.entropy[t], LOGPROB, 3),
    ]);
  });
  return table("Probability of this token; nats", ["", "prob.", "log-ratio", "diverg.", "entropy"], rows);
}

function others(rollout, t) {
  const columns = [["student", rollout]];
  for (const context of [state.context, state.against]) {
    const teacher = context < 0 ? null : behind(rollout, context);
    if (teacher) columns.push([data.contexts[context], teacher]);
  }
  const own = rollout.tokens[t];
  const rows = rollout.alternatives[t].map((id, a) => [id, columns.map(([, side]) => -side.likely[t][a] * LIKELY)]);
  if (!rollout.alternatives[t].includes(own)) rows.push([own, columns.map(([, side]) => -side.logprobs[t] * LOGPROB)]);
  rows.sort(([, a], [, b]) => Math.max(...b) - Math.max(...a));
  return table("Likeliest tokens; ● is the sampled one", ["", ...columns.map(([name]) => name)],
    rows.slice(0, 10).map(([id, logprobs]) => [
      el("span", {}, id === own ? "● " : "", el("code", {}, visibleText(data.vocabulary[id]))),
      ...logprobs.map(bar),
    ]));
}

function bar(logprob) {
  const filled = el("i", {class: "bar"});
  filled.style.width = `${100 * Math.exp(logprob)}%`;
  return el("span", {class: "share"}, percent(logprob), filled);
}

function setField(id, chosen) {
  document.getElementById(id).value = chosen;
}

function setMeasure(name) {
  state.measure = name;
  state.range = MEASURES[name].range;
  setField("measure", name);
  setField("range", String(state.range));
  repaint();
}

function setContext(key, context) {
  state[key] = context;
  setField(key, String(context));
  drawLists();
}

function toggleNumbers() {
  state.numbers = !state.numbers;
  document.getElementById("numbers").checked = state.numbers;
  page.classList.toggle("numbers", state.numbers);
}

function stepRollout(step) {
  const place = visible.findIndex(([group]) => group === data.groups[state.group]);
  if (place < 0) return;
  const next = state.rollout + step;
  if (next >= 0 && next < visible[place][1].length) {
    focusToken(next, 0);
    document.getElementById(`tokens-${next}`).closest("article").scrollIntoView({block: "nearest"});
  } else if (visible[place + step]) {
    openGroup(place + step, step > 0 ? 0 : visible[place + step][1].length - 1);
    focusToken(state.rollout, 0);
  }
}

function stepGroup(step) {
  const place = visible.findIndex(([group]) => group === data.groups[state.group]);
  if (!visible[place + step]) return;
  openGroup(place + step);
  focusToken(0, 0);
}

function stepToken(step) {
  if (current()) focusToken(state.rollout, state.token + step);
}

function stepStrong(step) {  // the next token underlined as strong
  const rollout = current();
  for (let t = state.token + step; rollout && t >= 0 && t < rollout.tokens.length; t += step) {
    if (Math.abs(value(rollout, t) ?? 0) >= state.range / 2) return focusToken(state.rollout, t);
  }
}
