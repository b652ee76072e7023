"use strict";

// Line and stacked charts in SVG, with a readout for the step under the pointer or chosen by the arrow keys.
// Series differ by dash as well as by colour (Okabe and Ito).

const COLORS = ["--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "1 4", "12 4"];
const WIDTH = 460, HEIGHT = 200, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 24;

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * unit >= rough) * unit;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, i) => (first + i) * step);
}

function short(number) {
  if (number === null || number === undefined) return "–";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return number.toExponential(1);
  return String(Number(number.toPrecision(4)));
}

// series: [{name, values}] over steps; marks: [[step, value]]; stacked: values are added up, from the first series on.
function chart({title, steps, series, marks = [], stacked = false}) {
  const range = extent(steps, series, marks, stacked);
  const x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (step - range.first) / (range.last - range.first);
  const y = (number) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (number - range.low) / (range.high - range.low);
  const guide = el("line", {class: "guide", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9});
  const svg = el("svg",
    {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0, "aria-label": spoken(title, series)},
    axes(range, x, y),
    stacked ? bars(series, steps, x, y) : series.map((s, i) => curve(s, i, steps, x, y)),
    marks.map(([step, number]) => el("circle", {class: "mark", r: 4.5, cx: x(step), cy: y(number)})),
    guide);
  const at = el("span");
  const readouts = series.map(() => el("output"));
  const show = (place) => {
    guide.setAttribute("x1", x(steps[place]));
    guide.setAttribute("x2", x(steps[place]));
    at.textContent = `step ${steps[place]}`;
    readouts.forEach((node, i) => node.textContent = short(series[i].values[place]));
  };
  follow(svg, steps, x, show);
  const legend = series.map((s, i) => el("li", {}, key(i, stacked), ` ${s.name} `, readouts[i]));
  if (marks.length) legend.push(el("li", {}, dot(), " held-out mean"));
  return el("figure", {"data-title": title}, el("h3", {}, title), svg, el("figcaption", {}, at, el("ul", {}, legend)));
}

function extent(steps, series, marks, stacked) {
  const tops = steps.map((_, i) => series.reduce((sum, s) => sum + (s.values[i] ?? 0), 0));
  const numbers = [...(stacked ? tops : series.flatMap((s) => s.values)), ...marks.map(([, number]) => number)]
    .filter((number) => number !== null);
  const xs = [...steps, ...marks.map(([step]) => step)];
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const range = {low: Math.min(0, ...numbers), high: Math.max(...numbers), first, last};
  if (range.high === range.low) range.high = range.low + 1;
  if (range.last === range.first) range.last = range.first + 1;
  return range;
}

// Calls show(place of a step) as the pointer moves and at the arrow keys.
function follow(svg, steps, x, show) {
  let place = steps.length - 1;
  const go = (wanted) => show(place = Math.max(0, Math.min(steps.length - 1, wanted)));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * WIDTH;
    const away = steps.map((step) => Math.abs(x(step) - at));
    go(away.indexOf(Math.min(...away)));
  });
  svg.addEventListener("keydown", (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (move) go(place + move);
  });
  go(place);
}

function key(i, filled) {
  return el("svg", {viewBox: "0 0 22 8", class: "key", "aria-hidden": "true"},
    filled ? colored(el("rect", {width: 22, height: 8}), i, "fill") : line("M0 4H22", i));
}

function dot() {
  return el("svg", {viewBox: "0 0 10 10", class: "key dot", "aria-hidden": "true"},
    el("circle", {class: "mark", r: 4, cx: 5, cy: 5}));
}

function spoken(title, series) {
  const said = series.map((s) => {
    const known = s.values.filter((number) => number !== null);
    return `${s.name}: from ${short(known[0])} to ${short(known.at(-1))}, `
      + `lowest ${short(Math.min(...known))}, highest ${short(Math.max(...known))}`;
  });
  return `${title}. ${said.join("; ")}`;
}

function axes(range, x, y) {
  return el("g", {class: "axes"},
    ticks(range.low, range.high, 4).map((number) => [
      el("line", {x1: LEFT, x2: WIDTH - RIGHT, y1: y(number), y2: y(number)}),
      el("text", {x: LEFT - 6, y: y(number) + 4, "text-anchor": "end"}, short(number))]),
    ticks(range.first, range.last, 6).filter(Number.isInteger).map((step) =>
      el("text", {x: x(step), y: HEIGHT - 6, "text-anchor": "middle"}, String(step))));
}

function colored(node, i, property) {
  node.style[property] = `var(${COLORS[i % COLORS.length]})`;
  return node;
}

function line(d, i) {
  return colored(el("path", {d, class: "curve", "stroke-dasharray": DASHES[i % DASHES.length]}), i, "stroke");
}

// A line where steps follow each other, a gap where a step lacks the number, a dot where it stands alone.
function curve(series, i, steps, x, y) {
  let d = "", drawn = false;
  const dots = [];
  series.values.forEach((number, s) => {
    if (number !== null) {
      d += `${drawn ? "L" : "M"}${x(steps[s]).toFixed(1)} ${y(number).toFixed(1)}`;
      if (!drawn && (series.values[s + 1] ?? null) === null) {
        dots.push(colored(el("circle", {r: 2.5, cx: x(steps[s]), cy: y(number)}), i, "fill"));
      }
    }
    drawn = number !== null;
  });
  return [line(d, i), ...dots];
}

function bars(series, steps, x, y) {
  const floor = steps.map(() => 0);
  const width = Math.max(1, (WIDTH - LEFT - RIGHT) / Math.max(1, steps.length) - 1);
  return series.flatMap((s, i) => s.values.map((number, step) => {
    const bottom = floor[step];
    floor[step] += number ?? 0;
    return colored(el("rect", {class: "bar-part", x: (x(steps[step]) - width / 2).toFixed(1), width: width.toFixed(1),
      y: y(floor[step]).toFixed(1), height: (y(bottom) - y(floor[step])).toFixed(1)}), i, "fill");
  }));
}
