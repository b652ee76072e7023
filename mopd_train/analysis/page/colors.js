"use strict";

// Colours of values. Blue and orange stay apart for every common form of colour blindness; the single-hue ramp of
// sequential values is read by its lightness alone. Text on a colour is black or white, whichever contrasts more.

let poles = {};

function readColors() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ground", "more", "less", "much"]) {
    poles[name] = rgb(style.getPropertyValue(`--${name}`).trim());
  }
}

function rgb(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

function luminance(color) {
  const [r, g, b] = color.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// value / range in [-1, 1] from "less" over the page's ground to "more"; sequential ones go from 0 to "much".
function paint(node, value, range, sequential) {
  if (value === null) {
    node.style.backgroundColor = node.style.color = "";
    node.dataset.strength = "";
    return;
  }
  const share = Math.max(-1, Math.min(1, value / range));
  const pole = poles[sequential ? "much" : share < 0 ? "less" : "more"];
  const mixed = poles.ground.map((c, i) => Math.round(c + Math.abs(share) * (pole[i] - c)));
  const light = luminance(mixed);
  node.style.backgroundColor = `rgb(${mixed.join(", ")})`;
  node.style.color = (light + 0.05) / 0.05 > 1.05 / (light + 0.05) ? "#000" : "#fff";
  // Not by colour alone: strong values are underlined, with another line for either sign.
  node.dataset.strength = Math.abs(share) < 0.5 ? "" : sequential || share > 0 ? "more" : "less";
}

document.addEventListener("themechange", readColors);
readColors();
