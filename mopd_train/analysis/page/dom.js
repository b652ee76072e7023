"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

// Strings among the children become text nodes, so markup in rollouts is shown, never run.
function el(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG_TAGS.has(tag) ? SVG : XHTML, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";
const XHTML = "http://www.w3.org/1999/xhtml";
const SVG_TAGS = new Set(["svg", "g", "path", "line", "rect", "circle", "text", "polyline", "polygon"]);

function table(caption, head, rows) {
  return el("table", {},
    el("caption", {}, caption),
    el("thead", {}, el("tr", {}, head.map((cell) => el("th", {scope: "col"}, cell)))),
    el("tbody", {}, rows.map(([first, ...rest]) =>
      el("tr", {}, el("th", {scope: "row"}, first), rest.map((cell) => el("td", {}, cell))))));
}

function select(label, id, options, value, change) {
  const field = el("select", {id, onchange: (event) => change(event.target.value)},
    options.map(([key, text]) => el("option", {value: key, selected: key === value}, text)));
  return el("label", {}, el("span", {}, label), field);
}

const TYPED = new Set(["INPUT", "SELECT", "TEXTAREA"]);

// Calls keys[event.key] unless the user is typing, holds a modifier that belongs to the browser, or reads a dialog.
function bindKeys(keys) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape" && TYPED.has(event.target.tagName)) event.target.blur();
    if (TYPED.has(event.target.tagName) || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key](event);
  });
}

const dark = matchMedia("(prefers-color-scheme: dark)");

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  document.dispatchEvent(new Event("themechange"));
}

function toggleTheme() {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
}

setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
