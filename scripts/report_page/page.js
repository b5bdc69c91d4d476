// Reads values off a chart: the nearest logged point of each run under the pointer. Everything is
// on the page without it.
"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";
const short = (value) => Number(value.toPrecision(6)).toLocaleString("en", { maximumSignificantDigits: 6 });

// Where a value lies between two borders of the drawing.
function place(value, limits, from, to, log) {
  const scale = log ? Math.log10 : (number) => number;
  const [low, high] = limits.map(scale);
  return from + ((scale(value) - low) / (high - low)) * (to - from);
}

function show(event) {
  const view = event.currentTarget, svg = view.querySelector("svg"), key = view.dataset.view;
  const chart = charts.list[view.parentElement.dataset.chart], where = chart.places[key];
  const [left, right, bottom, top] = where.box, frame = svg.getBoundingClientRect();
  const at = ((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
  svg.querySelectorAll(".dot").forEach((dot) => dot.remove());
  tip.replaceChildren();
  for (const line of chart.lines) {
    const xs = line.x[key];
    if (!xs || !xs.length) continue;
    const places = xs.map((x) => place(x, where.x, left, right, where.log_x));
    let best = 0;
    places.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(places[best] - at)) best = i; });
    const colour = `var(--run-${line.run % charts.colours})`;
    const row = document.createElement("div"), sign = document.createElement("i");
    sign.style.background = colour;
    row.append(sign, `${charts.names[line.run]}: ${short(line.y[best])} at ${short(xs[best])}`);
    tip.append(row);
    if (chart.bars) continue;
    const dot = document.createElementNS(SVG, "circle");
    dot.setAttribute("class", "dot");
    dot.setAttribute("cx", places[best]);
    dot.setAttribute("cy", place(line.y[best], where.y, bottom, top, where.log_y));
    dot.setAttribute("r", 3.5);
    dot.style.fill = colour;
    svg.append(dot);
  }
  tip.hidden = false;
  const wide = tip.offsetWidth, high = tip.offsetHeight;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - wide - 4))}px`;
  tip.style.top = `${event.clientY + 18 + high > innerHeight ? event.clientY - high - 12 : event.clientY + 18}px`;
}

for (const view of document.querySelectorAll(".view")) {
  view.addEventListener("pointermove", show);
  view.addEventListener("pointerdown", show);
  view.addEventListener("pointerleave", () => {
    tip.hidden = true;
    view.querySelectorAll(".dot").forEach((dot) => dot.remove());
  });
}
