// The candidates of report.html: filters, thumbnails, details.
//
// Their facts are the JSON of #data (srum/views/report.py, _groups), their markup is in the page's <template>s. Facts enter
// the page as text and attributes alone, never as markup: prompts and replies may hold anything. The state is that of
// the form and the opened candidate; it is kept in location.hash, so that a view can be bookmarked and shared.
"use strict";

const PAGE = 60; // thumbnails that are made at a time

const byId = (id) => document.getElementById(id);
const clone = (id) => byId(id).content.firstElementChild.cloneNode(true);

const { scale, missing, groups } = JSON.parse(byId("data").textContent);
const candidates = groups.flatMap((group) =>
  group.candidates.map((candidate) => ({ ...group, ...candidate, key: `${group.round}/${candidate.id}` })),
);

const form = byId("filters");
const grid = byId("thumbnails");
const dialog = byId("details");
let matching = []; // the candidates that pass the filters, in the chosen order
let opened = null; // the candidate in the dialog

// --- words and colours

const words = (name) => name.replaceAll("_", " ");
const number = (value) => value.toFixed(2).replace("-", "−");
const signed = (score) => (score < 0 ? "" : "+") + number(score);

function paint(element, score) {
  element.style.setProperty("--colour", score == null ? missing : scale[Math.round(100 * (score + 1))]);
  element.style.setProperty("--on-colour", Math.abs(score) > 0.75 ? "#fff" : "#000"); // the scale is pale in the middle
}

function fill(root, texts) {
  for (const [selector, text] of Object.entries(texts)) root.querySelector(selector).textContent = text;
}

function facts(candidate) {
  const { id, round, category, outcomes, score, layout, alpha, mapping, spread } = candidate;
  return [
    id,
    round,
    words(category),
    words(outcomes.join(", ")),
    score != null && `score ${signed(score)}`,
    layout != null && `layout ${signed(layout)}`,
    alpha != null && `alpha ${number(alpha)}, ${mapping}`,
    spread != null && `spread within the prompt ${number(spread)}`,
  ].filter(Boolean).join(" · ");
}

// --- filters

const passes = {
  text: (candidate, value) => {
    const searched = `${candidate.prompt} ${candidate.id}`.toLowerCase();
    return value.toLowerCase().split(/\s+/).every((word) => searched.includes(word));
  },
  round: (candidate, value) => candidate.round === value,
  category: (candidate, value) => candidate.category === value,
  outcome: (candidate, value) => candidate.outcomes.includes(value),
  from: (candidate, value) => candidate.score != null && candidate.score >= value,
  to: (candidate, value) => candidate.score != null && candidate.score <= value,
};

/** The controls that say something, as [name, value]. */
const settings = () => [...new FormData(form)].filter(([, value]) => value.trim());

/** In the order of `sort`, a key of the candidates, after a minus the highest first; those without a value last. */
function inOrder(list, sort) {
  if (!sort) return list;
  const key = sort.replace("-", "");
  const sign = sort === key ? 1 : -1;
  return list.sort((a, b) => (a[key] == null) - (b[key] == null) || sign * (a[key] - b[key]));
}

function update() {
  const conditions = settings().filter(([name]) => name in passes);
  const kept = candidates.filter((candidate) => conditions.every(([name, value]) => passes[name](candidate, value)));
  matching = inOrder(kept, form.elements.sort.value);
  byId("count").textContent = `${matching.length} of ${candidates.length} candidates match`;
  ahead.disconnect();
  grid.replaceChildren();
  more();
}

// --- thumbnails, a page at a time: the last one that comes near the window brings the next page

const ahead = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && more(), {
  rootMargin: "1000px",
});

function more() {
  const start = grid.childElementCount;
  if (start >= matching.length) return;
  grid.append(...matching.slice(start, start + PAGE).map(thumbnail));
  ahead.disconnect();
  ahead.observe(grid.lastElementChild);
}

function thumbnail(candidate) {
  const element = clone("thumbnail");
  const { score, prompt, image, pixelated, width, height, outcomes } = candidate;
  const sorted = form.elements.sort.value.replace("-", "");
  const value = ["layout", "spread"].includes(sorted) && candidate[sorted] != null;
  fill(element, {
    ".score": score == null ? words(outcomes.join(", ")) : signed(score),
    ".value": value ? `${sorted} ${number(candidate[sorted])}` : "",
    ".prompt": prompt,
  });
  paint(element.querySelector(".swatch"), score);
  const picture = element.querySelector("img");
  Object.assign(picture, { src: image, width, height });
  picture.classList.toggle("pixelated", pixelated);
  return element;
}

// --- details

function show(candidate) {
  opened = candidate;
  const { prompt, lines, plan, image, pixelated, width, height, reward, grid: cells } = candidate;
  const place = matching.indexOf(candidate) + 1;
  fill(dialog, {
    "h3": prompt,
    ".facts": facts(candidate),
    ".place": place ? `${place} of ${matching.length}` : "",
    ".plan": plan ? `plan: ${plan}` : "",
  });
  byId("lines").replaceChildren(...lines.map(lineOf));
  for (const picture of dialog.querySelectorAll(".image")) {
    Object.assign(picture, { src: image, width, height });
    picture.classList.toggle("pixelated", pixelated);
  }
  for (const boxes of dialog.querySelectorAll(".boxes")) boxes.replaceChildren(...boxesOf(candidate));
  for (const box of dialog.querySelectorAll(".map .box")) box.tabIndex = -1; // once is enough for the keyboard
  dialog.querySelector(".map").hidden = !reward;
  dialog.querySelector(".unmapped").hidden = Boolean(reward);
  if (reward) {
    dialog.querySelector(".reward").src = reward;
    dialog.querySelector(".cells").style.backgroundSize = `${100 / cells[1]}% ${100 / cells[0]}%`;
  }
  if (!dialog.open) dialog.showModal();
  remember();
}

function lineOf({ name, score, text, reply, region, box }) {
  const element = clone("line");
  fill(element, { b: name, ".score": score == null ? "" : ` ${signed(score)}`, ".text": text && `: ${text}` });
  paint(element.querySelector(".swatch"), score);
  element.classList.toggle("blamed", score != null && score < 0);
  if (reply) fill(element, { ".reply": `the judge's reply: ${reply}` });
  if (box) Object.assign(element, { tabIndex: 0 }).dataset.region = region;
  return element;
}

/** The boxes of the regions, the largest first, so that the smaller ones lie above them and can be pointed at. */
function boxesOf({ lines, width, height }) {
  const area = ({ box: [x0, y0, x1, y1] }) => (x1 - x0) * (y1 - y0);
  return lines.filter((line) => line.box).sort((a, b) => area(b) - area(a)).map(({ name, score, region, box }) => {
    const [x0, y0, x1, y1] = box;
    const element = clone("box");
    element.dataset.region = region;
    element.ariaLabel = score == null ? name : `${name} ${signed(score)}`;
    element.classList.toggle("whole", region === 0);
    element.classList.toggle("blamed", score != null && score < 0);
    Object.assign(element.style, {
      left: `${(100 * x0) / width}%`,
      top: `${(100 * y0) / height}%`,
      width: `${(100 * (x1 - x0)) / width}%`,
      height: `${(100 * (y1 - y0)) / height}%`,
    });
    fill(element, { ".tag": region || "" });
    element.querySelector(".tag").hidden = region === 0;
    element.querySelector(".tag").classList.toggle("inside", y0 < height / 10); // above it would leave the picture
    paint(element, score);
    return element;
  });
}

/** Light up the region under the pointer or the focus wherever it is shown. */
function light({ target }) {
  const region = target.closest("[data-region]")?.dataset.region;
  for (const element of dialog.querySelectorAll("[data-region]")) {
    element.classList.toggle("lit", element.dataset.region === region);
  }
}

function step(by) {
  if (matching.length) show(matching.at((matching.indexOf(opened) + by) % matching.length));
}

// --- the state in the address

function remember() {
  const state = new URLSearchParams(settings());
  if (opened) state.set("show", opened.key);
  history.replaceState(null, "", `#${state}`);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  form.reset();
  for (const [name, value] of state) {
    const control = form.elements.namedItem(name);
    if (control) control.value = value;
  }
  update();
  const wanted = candidates.find((candidate) => candidate.key === state.get("show"));
  if (wanted) show(wanted);
  else dialog.close();
}

// --- what people do

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", () => {
  update();
  remember();
});
byId("clear").addEventListener("click", () => {
  form.reset();
  update();
  remember();
});
grid.addEventListener("click", ({ target }) => {
  const index = [...grid.children].indexOf(target.closest(".thumbnail"));
  if (index >= 0) show(matching[index]);
});
dialog.addEventListener("click", ({ target }) => {
  if (target === dialog || target.matches(".close")) dialog.close(); // the dialog itself is all around its article
  if (target.dataset.step) step(Number(target.dataset.step));
});
dialog.addEventListener("close", () => {
  opened = null;
  remember();
});
dialog.addEventListener("pointerover", light);
dialog.addEventListener("focusin", light);
document.addEventListener("keydown", (event) => {
  if (dialog.open && event.key === "ArrowLeft") step(-1);
  if (dialog.open && event.key === "ArrowRight") step(1);
  if (event.key !== "/" || dialog.open || event.target.matches("input, select")) return;
  event.preventDefault();
  form.elements.text.focus();
});
addEventListener("hashchange", () => location.hash.includes("=") && recall()); // without it, a link within the page

form.hidden = false;
recall();
const again = performance.getEntriesByType("navigation")[0]?.type === "reload"; // the browser keeps the place then
if (location.hash.includes("=") && !again) byId("candidates").scrollIntoView();
