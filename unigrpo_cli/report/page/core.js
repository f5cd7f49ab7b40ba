"use strict";
/* Elements, numbers, data and addresses. Text enters the page through textContent alone, never as HTML. */

/** An element with attributes and children. Strings become text nodes; functions become event listeners. */
function h(tag, attributes, ...children) {
  const space = { svg: "http://www.w3.org/2000/svg", math: "http://www.w3.org/1998/Math/MathML" };
  const [name, kind] = tag.split("@");
  const node = kind ? document.createElementNS(space[kind], name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(key, value);
    else if (key === "style") node.style.cssText = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** A text whose control characters and marks of writing direction can be seen. */
function visible(text) {
  return String(text)
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`)
    .replace(/[\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** A number in four digits, or a dash. */
function fmt(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size < 1e-3 || size >= 1e6 ? value.toExponential(digits - 1).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(digits)));
  return text.replace("-", "−").replace("e+", "e").replace("e-", "e−");
}

const signed = (value, digits) => (value > 0 ? "+" : "") + fmt(value, digits);

/** A number as an element; the title holds every digit. */
function num(value, { digits = 4, sign = false } = {}) {
  const title = value === null || value === undefined ? null : String(value);
  return h("span", { class: "num", title }, sign ? signed(value, digits) : fmt(value, digits));
}

/* ---- data: one JSON block for all runs, one for each traced step; a server gives the same by address ---- */

const RUNS = { text: null, content: null, drawn: null };
const SERVED = document.documentElement.dataset.served === "1" || Boolean(document.getElementById("data-served"));
const cache = new Map();

function blockOf(id) {
  const node = document.getElementById(id);
  return node ? node.textContent : null;
}

/** What the server answers; null where it has no such thing. An error holds the server's words. */
async function asked(address) {
  const answer = await fetch(address, { cache: "no-store" }).catch(() => { throw new Error("The server does not answer: the page shows its last state."); });
  if (answer.status === 404) return null;
  if (!answer.ok) throw new Error(await answer.text());
  return answer.text();
}

/** Read all runs. Where they are others than before, steps are read again too. */
async function loadRuns() {
  const text = SERVED ? await asked("runs.json") : blockOf("data-runs");
  if (text === RUNS.text) return;
  Object.assign(RUNS, { text, content: JSON.parse(text) });
  cache.clear();
}

/** The content of a traced step; null where it is not in this page. */
async function loadStep(run, step) {
  const key = `${step} ${run.name}`;
  if (!cache.has(key)) {
    if (cache.size > 24) cache.clear();
    const found = SERVED ? await asked(`step.json?run=${encodeURIComponent(run.name)}&step=${step}`) : blockOf(`data-step-${RUNS.content.runs.indexOf(run)}-${step}`);
    if (found === null) return null;
    cache.set(key, JSON.parse(found));
  }
  return cache.get(key);
}

/* ---- address: #run=NAME&step=20&group=3&member=1&segment=1&action=4&view=formula ---- */

const NUMBERS = ["step", "group", "member", "segment", "action"];

function place() {
  const found = {};
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    found[key] = NUMBERS.includes(key) ? Number.parseInt(value, 10) : value;
  }
  return found;
}

function addressOf(where) {
  const order = ["run", "step", "group", "member", "segment", "action", "view"];
  const parts = order.filter((key) => where[key] !== undefined && where[key] !== null).map((key) => `${key}=${encodeURIComponent(where[key])}`);
  return `#${parts.join("&")}`;
}

/** Change the address; `quiet` keeps the page and only records the place. */
function go(where, quiet = false) {
  if (quiet) history.replaceState(null, "", addressOf(where));
  else location.hash = addressOf(where);
}

function levelOf(where) {
  if (where.step === undefined || Number.isNaN(where.step)) return "runs";
  if (where.group === undefined) return "step";
  return where.view === "formula" ? "formula" : "episode";
}

/* ---- colours ---- */

const RUN_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6fd1", "#7f7f7f"];
const isDark = () => document.documentElement.dataset.theme === "dark";
const colourOf = (k) => RUN_COLOURS[k % RUN_COLOURS.length];

/** The background of a signed number: blue above 0, orange below, stronger towards `largest`. */
function pushed(value, largest) {
  if (value === null || value === undefined || !largest || value === 0) return "transparent";
  const strength = Math.min(1, Math.abs(value) / largest);
  return `rgba(var(--${value > 0 ? "up" : "down"}), ${(0.1 + 0.62 * Math.sqrt(strength)).toFixed(3)})`;
}

function sequential(value, largest) {
  if (!value || !largest) return "transparent";
  return `rgba(var(--sequential), ${(0.08 + 0.6 * Math.sqrt(Math.min(1, value / largest))).toFixed(3)})`;
}

const largestOf = (values) => values.reduce((most, v) => (v === null || v === undefined ? most : Math.max(most, Math.abs(v))), 0);

/** An advantage as a coloured badge. */
function badge(value, digits = 3) {
  const style = `background: ${pushed(value, 2.5)}`;
  return h("span", { class: "push", style, title: value === null ? "no advantage" : `advantage ${value}` }, value === null ? "–" : signed(value, digits));
}

/** Buttons of which one is pressed. */
function choice(label, options, current, choose) {
  return h("span", { class: "choice", role: "group", "aria-label": label },
    options.map(([value, text, title]) => h("button", { type: "button", title, "aria-pressed": String(value === current), click: () => choose(value) }, text)));
}

function scale(low, high, kind = "diverging") {
  const colours = kind === "diverging"
    ? "linear-gradient(90deg, rgba(var(--down), .72), rgba(var(--down), .1) 47%, transparent 50%, rgba(var(--up), .1) 53%, rgba(var(--up), .72))"
    : "linear-gradient(90deg, transparent, rgba(var(--sequential), .68))";
  return h("span", { class: "scale" }, h("span", {}, low), h("i", { style: `background: ${colours}`, "aria-hidden": "true" }), h("span", {}, high));
}
