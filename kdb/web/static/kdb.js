// Draws charts at the width of the page, and makes tokens, copying and the SQL editor comfortable. Without this script,
// every page still shows all of its text and numbers.
"use strict";

const LIBRARY = ["/static/vendor/vega.min.js", "/static/vendor/vega-lite.min.js", "/static/vendor/vega-interpreter.js"];

function load(source) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = source;
    script.onload = resolve;
    script.onerror = () => reject(new Error(`${source} did not load`));
    document.head.append(script);
  });
}

// Charts ----------------------------------------------------------------------------------------------------------

const SHOWN_LINES = 3;

function lines(text) {
  return text === undefined ? [] : [].concat(text).map((line) => (Array.isArray(line) ? line.join(" ") : String(line)));
}

// The title of a figure becomes text of the page, which wraps, can be selected, and has the page's colours.
function takeTitle(spec, figure) {
  const title = spec.title;
  delete spec.title;
  if (!title || !figure) return;
  const marks = figure.querySelector(".marks");
  if (!marks || title.subtitle === undefined) return;
  const all = lines(title.subtitle);
  const further = all.slice(SHOWN_LINES);
  marks.textContent = all.slice(0, SHOWN_LINES).join("\n");
  if (!further.length) return;
  const folded = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "Notes";
  folded.append(summary, further.join("\n"));
  marks.append(folded);
}

function panels(facet) {
  const field = facet.field === undefined ? facet.column : facet;
  return field && Array.isArray(field.sort) ? field.sort.length : 1;
}

function divisors(n) {
  return Array.from({ length: n }, (_, i) => n - i).filter((d) => n % d === 0);
}

// Widens the panels of small multiples to the place that they have, and puts fewer in a row where there is less.
function fit(spec, width) {
  const inner = spec.spec || spec;
  if (typeof inner.width !== "number") return;
  const own = inner.width;
  const around = 75;
  const grid = spec.facet && spec.facet.field !== undefined;
  const all = spec.facet ? panels(spec.facet) : 1;
  let columns = grid ? Math.min(spec.columns || all, all) : all;
  if (grid) {
    const least = Math.min(own, 260) + around;
    const possible = columns > 3 ? divisors(columns) : [3, 2, 1].filter((n) => n <= columns);
    columns = possible.find((n) => n * least <= width) || 1;
    if (spec.columns === 1 && all > 1) columns = Math.min(all, Math.max(1, Math.floor(width / (Math.max(own, 300) + around))));
    spec.columns = columns;
  }
  const room = Math.floor((width - 20) / columns) - around;
  const most = columns === 1 ? 1080 : 640;
  const widened = Math.max(grid ? 180 : 120, Math.min(room, Math.max(own, most)));
  if (typeof inner.height === "number" && inner.height >= 100 && widened > own) {
    inner.height = Math.round(inner.height * Math.min(1.5, Math.sqrt(widened / own)));
  }
  inner.width = widened;
}

// Parts beside each other go below each other where they do not fit.
function stack(spec, width) {
  const widths = (spec.hconcat || []).map((part) => (typeof part.width === "number" ? part.width : 0));
  if (widths.reduce((sum, one) => sum + one, 0) > width) {
    spec.vconcat = spec.hconcat;
    delete spec.hconcat;
  }
}

function narrowLegend(spec, width) {
  spec.config = spec.config || {};
  const legend = (spec.config.legend = spec.config.legend || {});
  legend.columns = Math.max(1, Math.min(6, Math.floor(width / 190)));
}

async function rendered(spec) {
  const quiet = vega.logger(vega.Error);
  // With ast and the interpreter, because Vega otherwise compiles expressions by eval, which this site's policy forbids.
  const runtime = vega.parse(vegaLite.compile(spec, { logger: quiet }).spec, null, { ast: true });
  const canvas = document.createElement("div");
  const view = new vega.View(runtime, { expr: vega.expressionInterpreter, renderer: "svg", container: canvas, hover: true });
  await view.runAsync();
  return canvas;
}

// Takes away from the panels what long names beside them need, where that leaves enough.
function narrower(spec, over) {
  const inner = spec.spec || spec;
  if (typeof inner.width !== "number") return false;
  const width = inner.width - Math.ceil(over / (spec.columns || 1));
  if (width < 100) return false;
  inner.width = width;
  return true;
}

async function show(place, spec) {
  spec = structuredClone(spec);
  const width = place.clientWidth || 600;
  takeTitle(spec, place.closest("figure"));
  stack(spec, width);
  fit(spec, width);
  narrowLegend(spec, width);
  let canvas = await rendered(spec);
  const over = canvas.querySelector("svg").width.baseVal.value - width;
  if (over > 0 && narrower(spec, over)) canvas = await rendered(spec);
  // A panel without marks of some kind has an empty group, which Vega tells a screen reader is a picture.
  for (const group of canvas.querySelectorAll("g[role=graphics-symbol]:empty")) group.setAttribute("aria-hidden", "true");
  place.replaceChildren(canvas);
  place.drawn.width = width;
}

async function draw(place) {
  try {
    const response = await fetch(place.dataset.spec, { headers: { accept: "application/json" } });
    const spec = await response.json();
    if (!response.ok) throw new Error(spec.error);
    if (spec.nothing) {
      place.closest("figure").hidden = true;
      place.dataset.state = "hidden";
      return;
    }
    place.drawn = { spec };
    await show(place, spec);
    place.dataset.state = "drawn";
  } catch (error) {
    const told = document.createElement("p");
    told.className = "empty";
    told.textContent = error.message;
    place.replaceChildren(told);
    place.dataset.state = "empty";
  }
}

let library;

async function drawAll() {
  const places = document.querySelectorAll("[data-spec]:not([data-state])");
  if (!places.length) return;
  library ||= LIBRARY.reduce((before, source) => before.then(() => load(source)), Promise.resolve());
  await library;
  // One after the other, so that a page does not use all workers of the server.
  for (const place of places) if (!place.dataset.state) await draw(place);
}

let resizing;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(async () => {
    for (const place of document.querySelectorAll("[data-state=drawn]")) {
      if (Math.abs(place.clientWidth - place.drawn.width) > 40) await show(place, place.drawn.spec);
    }
  }, 250);
});

// Folded charts are drawn, and the numbers of a chart are asked for, when they are unfolded.
async function unfold(details) {
  if (!details.open) return;
  const later = details.querySelectorAll(":scope > figure [data-later]");
  if (later.length) {
    for (const place of later) {
      place.dataset.spec = place.dataset.later;
      delete place.dataset.later;
    }
    await drawAll();
  }
  const place = details.querySelector(":scope > [data-rows]");
  if (!place || place.dataset.loaded) return;
  place.dataset.loaded = "yes";
  const page = await (await fetch(place.dataset.rows)).text();
  const answer = new DOMParser().parseFromString(page, "text/html").querySelector("section[aria-label=Answer] .scroll");
  place.replaceChildren(answer || "No rows.");
}

for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", () => unfold(details));

// Copying ---------------------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("[data-copies]")) {
  button.hidden = !navigator.clipboard; // which browsers have at https addresses and on this machine only
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copies).textContent;
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

// Tokens of a prompt ----------------------------------------------------------------------------------------------

function pick(strip, token) {
  for (const other of strip.querySelectorAll(".tok")) other.setAttribute("aria-pressed", String(other === token));
  for (const line of document.querySelectorAll(".reads li")) line.classList.toggle("on", line.dataset.at === token.dataset.at);
}

function colour(strip, head) {
  for (const token of strip.querySelectorAll(".tok")) {
    const shades = JSON.parse(token.dataset.shades);
    token.className = `tok ${shades[head] || "s0"}`;
  }
}

for (const strip of document.querySelectorAll(".strip")) {
  document.body.classList.add("scripted");
  const tokens = [...strip.querySelectorAll(".tok")];
  for (const [index, token] of tokens.entries()) {
    for (const kind of ["mouseenter", "focus", "click"]) token.addEventListener(kind, () => pick(strip, token));
    token.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step && tokens[index + step]) tokens[index + step].focus();
    });
  }
  const best = tokens.reduce((a, b) => (Number(b.dataset.total) > Number(a.dataset.total) ? b : a), tokens[0]);
  if (best) pick(strip, best);
  const chips = document.querySelectorAll("button[data-head]");
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      for (const other of chips) other.setAttribute("aria-pressed", String(other === chip));
      colour(strip, chip.dataset.head);
    });
  }
}

// The SQL editor --------------------------------------------------------------------------------------------------

function edit(editor) {
  editor.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) editor.form.requestSubmit();
  });
  for (const button of document.querySelectorAll("[data-insert]")) {
    button.addEventListener("click", () => {
      editor.setRangeText(button.dataset.insert, editor.selectionStart, editor.selectionEnd, "end");
      editor.focus();
    });
  }
}

const editor = document.getElementById("sql");
if (editor) edit(editor);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    document.getElementById("search").focus();
  }
});
drawAll();
