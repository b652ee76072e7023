"use strict";

// What is looked at, and the numbers it gives. Stored integers: see inspect_page.py.
const LOGPROB = 1e-3, DIVERGENCE = 1e-4, LIKELY = 1e-3;

const MEASURES = {
  ratio: {
    label: "log-ratio, teacher − student",
    sequential: false,
    range: 2,
    of: (rollout, teacher, t) => (rollout.logprobs[t] - teacher.logprobs[t]) * LOGPROB,
  },
  divergence: {
    label: "divergence",
    sequential: true,
    range: 0.5,
    of: (rollout, teacher, t) => teacher.divergence[t] * DIVERGENCE,
  },
};

const ORDERS = {
  file: ["as in the file", null],
  divergence: ["divergence, high first", (rollout) => -(mean(rollout, "divergence", state.context) ?? -Infinity)],
  less: ["log-ratio, low first", (rollout) => mean(rollout, "ratio", state.context) ?? Infinity],
  more: ["log-ratio, high first", (rollout) => -(mean(rollout, "ratio", state.context) ?? -Infinity)],
  change: ["change between contexts, large first", (rollout) => -(change(rollout) ?? -Infinity)],
  reward: ["reward, high first", (rollout) => -(rollout.reward ?? -Infinity)],
  length: ["tokens, many first", (rollout) => -rollout.tokens.length],
};

const VERDICTS = {all: "all", success: "success", failure: "failure", none: "no verdict", mixed: "mixed groups"};

const state = {
  context: data.contexts.length - 1, against: -1, measure: "ratio", range: MEASURES.ratio.range, numbers: false,
  query: "", task: "", verdict: "all", least: 0, order: "file",
  group: 0, rollout: 0, token: 0,
};

function behind(rollout, context) {
  const index = rollout.contexts[context];
  return index === null ? null : rollout.teacher[index];
}

function measured(rollout, measure, context, t) {
  const teacher = behind(rollout, context);
  return teacher === null ? null : MEASURES[measure].of(rollout, teacher, t);
}

// The number a token is coloured by; null where a context has nothing to show for the rollout.
function value(rollout, t) {
  const here = measured(rollout, state.measure, state.context, t);
  if (here === null || state.against < 0) return here;
  const there = measured(rollout, state.measure, state.against, t);
  return there === null ? null : here - there;
}

function mean(rollout, measure, context) {
  if (behind(rollout, context) === null || !rollout.tokens.length) return null;
  return rollout.tokens.reduce((sum, _, t) => sum + measured(rollout, measure, context, t), 0) / rollout.tokens.length;
}

function change(rollout) {
  const [here, there] = [behind(rollout, state.context), behind(rollout, state.against)];
  if (state.against < 0 || !here || !there) return null;
  return rollout.tokens.reduce((sum, _, t) => sum + Math.abs(value(rollout, t)), 0) / rollout.tokens.length;
}

function isMixed(group) {
  const verdicts = new Set(group.rollouts.map((rollout) => rollout.verdict));
  return verdicts.has("success") && verdicts.has("failure");
}

function matches(group, rollout) {
  const query = state.query.toLowerCase();
  return (!state.task || group.task === state.task)
    && (state.verdict === "all" || (state.verdict === "mixed" ? isMixed(group) : rollout.verdict === state.verdict))
    && (!state.least || (mean(rollout, "divergence", state.context) ?? -1) >= state.least)
    && (!query || [group.prompt, rollout.text, rollout.feedback].some((text) => text?.toLowerCase().includes(query)));
}

// [[group, its rollouts that match, in order], ...], groups by the mean of what their rollouts are ordered by.
function shown() {
  const [, key] = ORDERS[state.order];
  const groups = data.groups
    .map((group) => [group, group.rollouts.filter((rollout) => matches(group, rollout))])
    .filter(([, rollouts]) => rollouts.length);
  if (key === null) return groups;
  const by = new Map();
  for (const [group, rollouts] of groups) {
    rollouts.forEach((rollout) => by.set(rollout, key(rollout)));
    by.set(group, rollouts.reduce((sum, rollout) => sum + by.get(rollout), 0) / rollouts.length);
    rollouts.sort((a, b) => compare(by.get(a), by.get(b)));
  }
  return groups.sort(([a], [b]) => compare(by.get(a), by.get(b)));
}

function compare(a, b) {  // infinite keys are equal to each other, where a difference would be NaN
  return a < b ? -1 : a > b ? 1 : 0;
}

function signed(number, digits = 2) {
  if (number === null) return "–";
  const text = Math.abs(number).toFixed(digits);
  return (Number(text) === 0 ? "" : number < 0 ? "−" : "+") + text;
}

function isSequential() {  // the number cannot be negative
  return MEASURES[state.measure].sequential && state.against < 0;
}

function written(number) {
  return isSequential() && number !== null ? number.toFixed(2) : signed(number);
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share >= 0.1) return `${share.toFixed(1)} %`;
  return `${share >= 1e-3 ? Number(share.toPrecision(1)) : share.toExponential(0).replace("-", "−")} %`;
}
