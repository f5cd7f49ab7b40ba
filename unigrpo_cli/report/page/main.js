"use strict";
/* The four levels by address, keys, themes, and following a run that still trains. */

const FOLLOW_MS = 4000;
const main = document.getElementById("main");

/** Draw the level of the present address. `keep` leaves scroll position and focus. */
async function show({ keep = false } = {}) {
  const where = place();
  const level = levelOf(where);
  const run = runOf(where);
  drawLevels(level, where, run);
  let body;
  if (level === "runs") body = levelRuns();
  else {
    if (!run.traced.includes(where.step) && run.traced.length) { go({ ...where, step: nearest(run.traced, where.step) }, true); return show({ keep }); }
    let content = null, missing = run.traced.length ? `Step ${where.step} is not in this page.` : `${run.name} has no traces: train with train.trace_every above 0.`;
    try { content = await loadStep(run, where.step); } catch (error) { missing = error.message; }
    if (!content) body = h("p", { class: "note" }, visible(missing));
    else body = { step: levelStep, episode: levelEpisode, formula: levelFormula }[level](where, run, content);
  }
  if (addressOf(where) !== addressOf(place())) return undefined; // the address changed while a step was read
  const { scrollX, scrollY } = window;
  main.replaceChildren(body);
  main.dataset.level = level;
  RUNS.drawn = RUNS.text;
  performance.mark("drawn");
  if (keep) window.scrollTo(scrollX, scrollY);
  else { window.scrollTo(0, 0); main.focus({ preventScroll: true }); }
  return undefined;
}

function drawLevels(level, where, run) {
  const having = RUNS.content.runs.some((own) => own.traced.length);
  const step = where.step ?? (having ? run.traced[run.traced.length - 1] : undefined);
  const base = { ...named(run), step };
  const episode = { ...base, group: where.group ?? 0, member: where.member ?? 0 };
  const links = [
    ["runs", "Runs", {}], ["step", where.step === undefined ? "Step" : run.kind === "rollout" ? "Groups" : `Step ${where.step}`, base],
    ["episode", where.group === undefined ? "Episode" : `Episode ${where.group}·${where.member ?? 0}`, episode],
    ["formula", "Formula", { ...episode, segment: where.segment, action: where.action, view: "formula" }],
  ];
  document.getElementById("levels").replaceChildren(...links.map(([name, text, target]) => {
    const off = name !== "runs" && !having;
    return h("a", { href: off ? null : addressOf(target), "aria-current": name === level ? "page" : null, "aria-disabled": off ? "true" : null, title: off ? "No traces: train with train.trace_every above 0" : null }, text);
  }));
}

/* ---- keys ---- */

const KEYS = [
  ["← →", "step: previous and next traced step; episode: previous and next episode; formula: previous and next action"],
  ["Shift ← →", "the same episode at the previous and next traced step"],
  ["Enter", "one level down"], ["Esc", "one level up"], ["/", "search metrics"], ["t", "light or dark"], ["?", "these keys"],
];

async function step(direction, shift) {
  const where = place(), level = levelOf(where), run = runOf(where);
  if (level === "runs") return;
  const at = run.traced.indexOf(where.step) + direction;
  if (level === "step" || shift) {
    if (run.traced[at] !== undefined) go({ ...where, step: run.traced[at], segment: undefined, action: undefined });
    return;
  }
  const content = await loadStep(run, where.step).catch(() => null);
  if (!content) return;
  if (level === "episode") {
    const target = neighbours(where, content)[direction < 0 ? 0 : 1];
    if (target) go(target);
    return;
  }
  const episode = content.groups[where.group].episodes[where.member ?? 0];
  const chosen = where.segment === undefined ? { ...where, ...defaultAction(episode) } : where;
  const segment = episode.segments[chosen.segment];
  const next = (chosen.action ?? 0) + direction;
  if (next >= 0 && next < (segment.kind === "text" ? segment.tokens : segment.steps).length) go({ ...chosen, action: next });
}

function up() {
  const { run, step: at, group, member, segment, action } = place();
  const level = levelOf(place());
  if (level === "formula") go({ run, step: at, group, member, segment, action });
  else if (level === "episode") go({ run, step: at });
  else if (level === "step") go({});
}

function down() {
  const where = place(), level = levelOf(where), run = runOf(where);
  if (level === "runs" && run.traced.length) go({ ...named(run), step: run.traced[run.traced.length - 1] });
  else if (level === "step") go({ ...where, group: 0, member: 0 });
  else if (level === "episode") go({ ...where, view: "formula" });
}

document.addEventListener("keydown", (event) => {
  const typing = /^(input|select|textarea)$/i.test(event.target.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey || (typing && event.key !== "Escape")) return;
  const interactive = /^(a|button|summary)$/i.test(event.target.tagName) || event.target.getAttribute("role") === "button";
  const actions = {
    ArrowLeft: () => step(-1, event.shiftKey), ArrowRight: () => step(1, event.shiftKey), Escape: up, t: toggleTheme, "?": help,
    "/": () => { const box = document.getElementById("search"); if (box) box.focus(); }, Enter: interactive ? null : down,
  };
  if (document.getElementById("help").open) return;
  const action = actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

function help() {
  const dialog = document.getElementById("help");
  dialog.replaceChildren(h("h2", {}, "Keys"), h("dl", { class: "numbers", style: "grid-template-columns: auto 1fr" }, KEYS.map(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", { style: "text-align: left" }, what)])),
    h("p", { class: "soft small", style: "margin-top: 12px" }, "On a token: ← → move along the text, Enter keeps it."), h("form", { method: "dialog" }, h("button", { class: "button" }, "Close")));
  dialog.showModal();
}

/* ---- themes ---- */

function stored(value) {
  try {
    if (value !== undefined) localStorage.setItem("unigrpo-theme", value);
    return localStorage.getItem("unigrpo-theme");
  } catch { // a browser may refuse storage to files
    return null;
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = theme === "dark" ? "☀" : "☾";
  button.setAttribute("aria-label", theme === "dark" ? "Light colours" : "Dark colours");
}

function toggleTheme() {
  const theme = isDark() ? "light" : "dark";
  stored(theme);
  setTheme(theme);
  show({ keep: true });
}

/* ---- start ---- */

/** Read the runs again and draw what changed; the footer says why that could not be. */
async function follow() {
  let footer;
  try {
    await loadRuns();
    if (RUNS.text !== RUNS.drawn && document.activeElement !== document.getElementById("search")) await show({ keep: true });
    footer = RUNS.content.footer;
  } catch (error) { footer = error.message; }
  document.getElementById("footer").textContent = visible(footer);
}

async function start() {
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  setTheme(stored() || (preferred.matches ? "dark" : "light"));
  preferred.addEventListener("change", () => { if (!stored()) { setTheme(preferred.matches ? "dark" : "light"); show({ keep: true }); } });
  try { await loadRuns(); } catch (error) { main.replaceChildren(h("p", { class: "note" }, visible(error.message))); return; }
  document.getElementById("footer").textContent = RUNS.content.footer;
  document.getElementById("theme").addEventListener("click", toggleTheme);
  document.getElementById("keys").addEventListener("click", help);
  document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
  window.addEventListener("hashchange", () => show());
  await show();
  if (SERVED) setInterval(follow, FOLLOW_MS);
}

start();
