"use strict";
// The page reads /v1/fleet and /v1/history of its own service, and nothing else.
const $ = (id) => document.getElementById(id);
const EVERY = 2000;
const MOST_BLOCKS = 256; // cells of a prompt; longer ones share cells

const COLUMNS = [
  ["pod", "pod"], ["state", "state"], ["model", "model"], ["blocks", "blocks", 1], ["lag", "lag ms", 1], ["requests", "requests", 1],
  ["waiting", "prefill tokens", 1], ["restarts", "restarts", 1], ["lost", "lost", 1], ["errors", "errors", 1], ["reason", "reason"],
];
const MOST_ROWS = 32; // pods that a prompt's answer shows
const WORST = { stale: 0, degraded: 1, exact: 2 };
let fleet = { rows: [], now: {} };
let samples = [];
let sorted = ["state", 1];
let timer = 0;
let edited = false; // until then, the prompt box has the demo's example
const kept = new Map(); // lines of the table by pod, with the row that each shows

function make(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text; // never as HTML: names and reasons come from the network
  if (kind) made.className = kind;
  return made;
}
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const brief = (value) => (value >= 1e6 ? short.format(value) : number(value));
const number = (value) => (value === null || value === undefined ? "" : value.toLocaleString("en"));

async function call(path, body) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = "Bearer " + token;
  const answer = await fetch(path, body ? { method: "POST", body: JSON.stringify(body), headers } : { headers });
  $("login").hidden = answer.status !== 401;
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error);
  return said;
}

function value(row, key) {
  if (key === "state") return WORST[row.state];
  return row[key] ?? -1;
}

function table() {
  const wanted = $("filter").value.toLowerCase();
  const state = $("state").value;
  const [key, way] = sorted;
  const rows = fleet.rows.filter(
    (row) => (!state || row.state === state) && (row.pod + " " + row.model + " " + row.reason).toLowerCase().includes(wanted),
  );
  rows.sort((a, b) => {
    const [x, y] = [value(a, key), value(b, key)];
    return (x < y ? -way : x > y ? way : 0) || a.pod.localeCompare(b.pod, "en", { numeric: true });
  });
  $("shown").textContent = rows.length === fleet.rows.length ? "" : rows.length + " of " + fleet.rows.length;
  $("pods").tBodies[0].replaceChildren(...rows.map(lineOf));
}

// Most rows of a large fleet are the same as two seconds ago.
function lineOf(row) {
  const said = JSON.stringify(row);
  const known = kept.get(row.pod);
  if (known && known.said === said) return known.line;
  const line = document.createElement("tr");
  for (const [name, , numeric] of COLUMNS) {
    const shown = name === "lag" ? (row.lag === null ? "" : number(Math.round(row.lag * 1000))) : numeric ? number(row[name]) : row[name];
    const kind = name === "state" ? row.state : name + (numeric ? " number" : "") + (shown === "0" ? " zero" : "");
    line.append(make("td", shown, kind));
  }
  kept.set(row.pod, { said, line });
  return line;
}

function map() {
  const most = Math.max(...fleet.rows.map((row) => row.blocks), 1);
  const rows = [...fleet.rows].sort((a, b) => a.pod.localeCompare(b.pod, "en", { numeric: true }));
  const cells = $("map");
  cells.className = rows.length > 60 ? "many" : "";
  while (cells.children.length > rows.length) cells.lastChild.remove();
  while (cells.children.length < rows.length) cells.append(make("button"));
  rows.forEach((row, i) => {
    const cell = cells.children[i];
    const said = row.pod + ": " + row.state + ", " + number(row.blocks) + " blocks" + (row.reason ? "; " + row.reason : "");
    if (cell.title === said) return;
    cell.title = said;
    cell.ariaLabel = said;
    cell.className = row.state;
    cell.dataset.pod = row.pod;
    cell.style.opacity = row.state === "stale" ? 1 : 0.3 + (0.7 * row.blocks) / most;
  });
}

function heads() {
  const line = document.createElement("tr");
  for (const [key, title, numeric] of COLUMNS) {
    const head = make("th", title + (sorted[0] === key ? (sorted[1] > 0 ? " ▲" : " ▼") : ""), key + (numeric ? " number" : ""));
    head.addEventListener("click", () => {
      sorted = [key, sorted[0] === key ? -sorted[1] : numeric ? -1 : 1];
      heads();
      table();
    });
    line.append(head);
  }
  $("pods").tHead.replaceChildren(line);
}

function line(values, said) {
  const NS = "http://www.w3.org/2000/svg";
  const points = values.map((each, i) => [i, each]).filter(([, each]) => each !== null);
  const svg = document.createElementNS(NS, "svg");
  if (points.length < 2) return svg;
  const top = Math.max(...points.map(([, each]) => each), 1e-9);
  svg.setAttribute("viewBox", points[0][0] + " 0 " + (points.at(-1)[0] - points[0][0]) + " 1");
  svg.setAttribute("preserveAspectRatio", "none");
  const drawn = points.map(([i, each]) => i + "," + (0.98 - 0.9 * (each / top))).join(" ");
  for (const [tag, path] of [["polygon", points[0][0] + ",1 " + drawn + " " + points.at(-1)[0] + ",1"], ["polyline", drawn]]) {
    const shape = document.createElementNS(NS, tag);
    shape.setAttribute("points", path);
    svg.append(shape);
  }
  const title = document.createElementNS(NS, "title");
  title.textContent = "the last half hour, at most " + said(top);
  svg.append(title);
  return svg;
}

// Shares between two samples; null if there were no questions.
function shares(part, whole) {
  return samples.slice(1).map((to, i) => {
    const all = to[whole] - samples[i][whole];
    return all > 0 ? (to[part] - samples[i][part]) / all : null;
  });
}
const last = (values) => values.filter((each) => each !== null).at(-1);
const percent = (share) => (share === undefined ? "–" : (100 * share).toFixed(1) + " %");

const sum = (part, seconds) => {
  const from = samples.at(-1 - Math.round(seconds / 5)) || samples[0];
  return from ? samples.at(-1)[part] - from[part] : 0;
};

function figures() {
  const now = fleet.now;
  const hit = shares("held", "tokens");
  const wrong = shares("wrong", "expected");
  const steps = (part) => samples.slice(1).map((to, i) => to[part] - samples[i][part]);
  const minute = sum("tokens", 60) > 0 ? sum("held", 60) / sum("tokens", 60) : undefined;
  const cards = [
    ["hit rate", percent(minute), "in the last minute", hit, percent],
    ["tokens saved", brief(now.held), "since the start", steps("held"), (top) => brief(top) + " in 5 s"],
    ["questions", brief(now.questions), now.questions ? "since the start" : "to this service yet", steps("questions"), (top) => brief(top) + " in 5 s"],
    ["distinct blocks", brief(fleet.blocks), (fleet.bytes / 1e6).toFixed(1) + " MB", samples.map((each) => each.blocks), brief],
    ["exact pods", number(now.exact), "of " + number(fleet.rows.length), samples.map((each) => each.exact), number],
    ["prediction error", percent(last(wrong)), "of cached tokens", wrong, percent],
  ];
  $("figures").replaceChildren(
    ...cards.map(([title, shown, about, values, said]) => {
      const card = make("div");
      card.append(make("span", title), make("b", shown), make("small", about), line(values, said));
      return card;
    }),
  );
}

function choices() {
  const models = [...new Set(fleet.rows.map((row) => row.model))].sort();
  if ([...$("model").options].map((each) => each.value).join() !== models.join()) {
    $("model").replaceChildren(...models.map((model) => make("option", model)));
  }
  if (fleet.text && $("kind").options.length === 1) {
    for (const [kind, title] of [["text", "text"], ["messages", "a user's message"]]) {
      const option = make("option", title);
      option.value = kind;
      $("kind").append(option);
    }
    $("prompt").placeholder = "a prompt";
    $("kind").value = "text";
  }
}

// For a service that follows a log: its role and fleet, and why it is not current.
const told = (log) => (log ? "; " + log.role + " of fleet " + log.fleet + (log.trusted ? "" : ", not current: " + log.reason) : "");

async function look() {
  clearTimeout(timer);
  try {
    const since = samples.length ? samples.at(-1).time : 0;
    const [seen, more] = await Promise.all([call("v1/fleet"), call("v1/history?since=" + since)]);
    fleet = seen;
    samples = samples.concat(more).slice(-360);
    const counts = ["exact", "degraded", "stale"].filter((state) => fleet.now[state]).map((state) => fleet.now[state] + " " + state);
    $("summary").textContent = fleet.rows.length + " pods: " + (counts.join(", ") || "none yet") + told(fleet.log);
    if (kept.size > 2 * fleet.rows.length) kept.clear();
    table();
    map();
    figures();
    choices();
    if (fleet.example && !edited) await example();
  } catch (error) {
    $("summary").textContent = "not up to date: " + error.message;
  }
  // A hidden tab sends no requests.
  if (document.hidden) document.addEventListener("visibilitychange", look, { once: true });
  else timer = setTimeout(look, EVERY);
}

// The demo's latest prompt, so that the page shows an answer before the user has typed anything.
async function example() {
  $("example").hidden = false;
  $("kind").value = "tokens";
  $("prompt").value = fleet.example.join(", ");
  show(await call("v1/match", { model: $("model").value, tokens: fleet.example }));
}

const tier = (medium) => (/^(GPU)?$/i.test(medium) ? "GPU" : /^CPU/i.test(medium) ? "CPU" : "DISK");

function blocks(match, pod) {
  const cells = Math.min(match.blocks, MOST_BLOCKS);
  const reach = Object.entries(Object.keys(pod.tiers).length ? pod.tiers : pod.media);
  const bar = make("div", undefined, cells > 64 ? "cells dense" : "cells");
  for (let cell = 0; cell < cells; cell++) {
    const end = Math.ceil(((cell + 1) * match.blocks) / cells) * match.block_size;
    const held = reach.filter(([, tokens]) => tokens >= end).map(([medium]) => tier(medium));
    bar.append(make("i", undefined, ["GPU", "CPU", "DISK"].find((each) => held.includes(each)) || "none"));
  }
  return bar;
}

function show(match) {
  const key = make("p", number(match.tokens) + " tokens, " + number(match.blocks) + " blocks of " + match.block_size + " ", "key");
  for (const name of ["GPU", "CPU", "DISK", "none"]) {
    const each = make("span");
    each.append(make("i", undefined, name), name);
    key.append(each, " ");
  }
  const pods = Object.entries(match.pods).sort((a, b) => b[1].held - a[1].held);
  const rows = pods.slice(0, MOST_ROWS).map(([name, pod]) => {
    const row = make("div", undefined, match.best && name === match.best.pod ? "row best" : "row");
    const shown = make("span", number(pod.tokens) + " tokens");
    shown.append(" ", make("span", pod.state, pod.state));
    row.append(make("span", name), blocks(match, pod), shown);
    return row;
  });
  if (pods.length > MOST_ROWS) rows.push(make("p", "and " + (pods.length - MOST_ROWS) + " pods that hold no more"));
  if (!rows.length) rows.push(make("p", "no pod holds a block of it"));
  const inexact = Object.keys(match.inexact).length;
  if (inexact) rows.push(make("p", (inexact === 1 ? "1 pod is" : inexact + " pods are") + " not exact, and may hold more or less"));
  $("answer").replaceChildren(key, ...rows);
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  const kind = $("kind").value;
  const asked = { model: $("model").value };
  if (kind === "text") asked.text = text;
  else if (kind === "messages") asked.messages = [{ role: "user", content: text }];
  else asked.tokens = text.split(/[\s,[\]]+/).filter(Boolean).map(Number);
  try {
    show(await call("v1/match", asked));
  } catch (error) {
    $("answer").replaceChildren(make("p", error.message, "stale"));
  }
});
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  samples = [];
  look();
});
$("prompt").addEventListener("input", () => {
  edited = true;
  $("example").hidden = true;
});
$("map").addEventListener("click", (event) => {
  const pod = event.target.dataset.pod;
  if (!pod) return;
  $("filter").value = $("filter").value === pod ? "" : pod;
  table();
});
$("filter").addEventListener("input", table);
$("state").addEventListener("change", table);
heads();
look();
