"use strict";

const KEYS = {
  j: ["next rollout", () => stepRollout(1)],
  k: ["previous rollout", () => stepRollout(-1)],
  "]": ["next group", () => stepGroup(1)],
  "[": ["previous group", () => stepGroup(-1)],
  ArrowRight: ["next token", () => stepToken(1)],
  ArrowLeft: ["previous token", () => stepToken(-1)],
  ArrowDown: ["next rollout", () => stepRollout(1)],
  ArrowUp: ["previous rollout", () => stepRollout(-1)],
  Home: ["first token", () => stepToken(-Infinity)],
  End: ["last token", () => stepToken(Infinity)],
  ".": ["next strongly coloured token", () => stepStrong(1)],
  ",": ["previous strongly coloured token", () => stepStrong(-1)],
  c: ["next context", () => setContext("context", (state.context + 1) % data.contexts.length)],
  d: ["difference: next context to subtract, then none",
    () => setContext("against", (state.against + 2) % (data.contexts.length + 1) - 1)],
  m: ["log-ratio or divergence", () => setMeasure(state.measure === "ratio" ? "divergence" : "ratio")],
  n: ["numbers below the tokens", toggleNumbers],
  p: ["open or close the teacher prompt", togglePrompt],
  t: ["dark or light", toggleTheme],
  "/": ["search", () => document.getElementById("query").focus()],
  "?": ["these keys", showHelp],
};

function togglePrompt() {
  const details = document.getElementById(`tokens-${state.rollout}`)?.parentElement.querySelector("details");
  if (details) details.open = !details.open;
}

function helpDialog() {
  return el("dialog", {id: "help", "aria-label": "Keys"},
    table("Keys", ["key", "does"],
      [...Object.entries(KEYS).map(([key, [text]]) => [el("kbd", {}, key), text]),
        [el("kbd", {}, `1 … ${Math.min(9, data.contexts.length)}`), "that context"]]),
    el("form", {method: "dialog"}, el("button", {}, "close")));
}

function showHelp() {
  if (!view.help.open) view.help.showModal();
}

const keys = Object.fromEntries(Object.entries(KEYS).map(([key, [, action]]) => [key, action]));
data.contexts.slice(0, 9).forEach((_, i) => keys[String(i + 1)] = () => setContext("context", i));

build();
drawLists();
bindKeys(keys);
document.addEventListener("themechange", repaint);
