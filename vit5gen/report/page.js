"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const number = (value, digits) => value.toLocaleString("en", { maximumSignificantDigits: digits });
const nearest = (values, x) => values.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(values[best] - x) ? i : best), 0);
for (const part of document.querySelectorAll(".slider, .code button, #theme")) part.hidden = false;

// Light or dark: the system's choice until the reader makes another.
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = getComputedStyle(root).colorScheme.includes("light dark")
    ? matchMedia("(prefers-color-scheme: dark)").matches : root.dataset.theme === "dark";
  root.dataset.theme = dark ? "light" : "dark";
});

// Charts: the values nearest to the pointer, or to where the arrow keys have moved.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = data.charts[figure.dataset.chart], svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const [left, right, top, foot] = chart.box, [x0, x1] = chart.x, [y0, y1] = chart.y;
  const steps = [...new Set(chart.curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
  let at = steps.length - 1;
  const show = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const across = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
    const points = chart.curves.map((curve) => curve.points[nearest(curve.points.map((point) => point[0]), steps[at])]);
    const dots = points.map(([x, y], i) => {
      const height = Math.max(top, foot - ((y - y0) / (y1 - y0)) * (foot - top));
      return `<circle class="c${chart.curves[i].colour}" cx="${across(x)}" cy="${height}" r="3.5"/>`;
    });
    cursor.innerHTML = `<path d="M${across(steps[at])} ${top}V${foot}"/>${dots.join("")}`;
    const told = points.map(([x, y], i) => `${chart.curves[i].name} ${number(y, 6)}${x === steps[at] ? "" : ` (at ${number(x)})`}`);
    const text = [`step ${number(steps[at])}`, ...told].join(" · ");
    figure.querySelector(":scope > output").textContent = text;
    for (const [name, value] of [["now", steps[at]], ["text", text]]) svg.setAttribute(`aria-value${name}`, value);
  };
  for (const [name, value] of [["role", "slider"], ["aria-valuemin", x0], ["aria-valuemax", x1]]) svg.setAttribute(name, value);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show(nearest(steps, x0 + ((x - left) / (right - left)) * (x1 - x0)));
  });
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, PageDown: at - 10, PageUp: at + 10, Home: 0, End: steps.length - 1 };
    if (event.key in moves) { event.preventDefault(); show(moves[event.key]); }
  });
  svg.addEventListener("focus", () => show(at));
}

// Samples: of each run the newest ones at the step of the slider.
const slider = document.querySelector(".slider");
if (slider) {
  const input = slider.querySelector("input"), button = slider.querySelector("button");
  const figures = [...document.querySelectorAll(".picture")].filter((figure) => figure.querySelector("[data-step]"));
  const show = () => {
    const step = data.steps[input.value];
    for (const figure of figures) {
      const images = [...figure.querySelectorAll("[data-step]")];
      const now = images.filter((image) => Number(image.dataset.step) <= step).pop() || images[0];
      for (const image of images) image.hidden = image !== now;
      figure.querySelector(".at").textContent = figures.length > 1 ? now.dataset.caption : "";
      slider.querySelector("output").textContent = figures.length > 1 ? `step ${number(step)}` : now.dataset.caption;
    }
    input.setAttribute("aria-valuetext", slider.querySelector("output").textContent);
  };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "play"; };
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (input.value === input.max) input.value = 0;
    button.textContent = "stop";
    timer = setInterval(() => { input.value = Number(input.value) + 1; show(); if (input.value === input.max) stop(); }, 400);
    show();
  });
  input.addEventListener("input", () => { stop(); show(); });
  show();
}

// Commands and settings to copy; where the browser forbids it, they are selected.
for (const button of document.querySelectorAll(".code button")) {
  button.addEventListener("click", async () => {
    const text = button.previousElementSibling;
    try { await navigator.clipboard.writeText(text.textContent); button.textContent = "copied"; }
    catch { getSelection().selectAllChildren(text); }
  });
}
