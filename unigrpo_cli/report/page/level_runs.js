"use strict";
/* Level 1: runs, their held-out scores, curves, warnings and differences. */

const VIEW = { search: "", smoothing: 0, log: false, axis: "steps", bands: true, hidden: new Set(), open: null };
const SECTIONS = [
  ["Rewards and held-out scores", (m) => /^(reward\/[^/]+|eval\/.+)$/.test(m), true],
  ["Text", (m) => /^text\/(?!.*\/step_)/.test(m), true],
  ["Image", (m) => /^image\/(?!.*\/step_)/.test(m), true],
  ["Advantage and loss", (m) => /^(advantage\/.+|loss|grad_clipped)$/.test(m), true],
  ["Parts of rewards", (m) => m.startsWith("reward/"), false],
  ["By denoising step", (m) => m.includes("/step_"), false],
  ["Seconds and memory", (m) => /^(seconds|memory)\//.test(m), false],
  ["Others", () => true, false],
];

function prepared() {
  const runs = RUNS.content.runs;
  const settings = RUNS.content.settings;
  runs.forEach((run, k) => {
    run.shown = !VIEW.hidden.has(run.name);
    run.colour = colourOf(VIEW.bands ? settings.indexOf(run.setting) : k);
  });
  return runs;
}

function levelRuns() {
  const runs = prepared();
  const words = `${runs.length} ${runs.length === 1 ? "run" : "runs"}` + (runs.length > 1 ? `, ${RUNS.content.settings.length} ${RUNS.content.settings.length === 1 ? "setting" : "settings"}` : "");
  return h("div", {},
    h("h1", {}, runs.length === 1 ? visible(runs[0].name) : words),
    h("p", { class: "soft" }, visible(runs.length === 1 ? summaryOf(runs[0]) : "Curves overlay all chosen runs; seeds of one setting are one line, their mean, with a band from the least to the largest.")),
    RUNS.content.notes.map((note) => h("p", { class: "note" }, visible(note))),
    runsTable(runs), scoresSection(runs), curvesSection(runs), warningsSection(runs), differencesSection(runs), progressSection(runs));
}

function summaryOf(run) {
  const s = run.settings;
  const parts = [s.model && `model ${s.model}`, s["reward.names"] && `rewards ${[].concat(s["reward.names"]).join(", ")}`, s["train.finetune"] && `${s["train.finetune"]} fine-tuning`, s.seed !== undefined && `seed ${s.seed}`, run.state];
  return parts.filter(Boolean).join(" · ");
}

function tracedLink(run) {
  if (!run.traced.length) return h("span", { class: "faint" }, "none");
  const label = run.kind === "rollout" ? "episodes" : run.traced.length === 1 ? "1 step" : `${run.traced.length} steps`;
  return h("a", { href: addressOf({ ...named(run), step: run.traced[run.traced.length - 1] }) }, label);
}

/** The part of an address that names a run; nothing where there is one run. */
const named = (run) => (RUNS.content.runs.length > 1 ? { run: run.name } : {});

function runsTable(runs) {
  if (runs.length === 1 && runs[0].kind === "train") return null;
  const toggle = (run) => h("input", { type: "checkbox", checked: run.shown, "aria-label": visible(`show ${run.name}`), change: (event) => {
    if (event.target.checked) VIEW.hidden.delete(run.name);
    else VIEW.hidden.add(run.name);
    show();
  } });
  const rows = runs.map((run) => h("tr", {}, h("td", {}, toggle(run)), h("td", { class: "name" }, h("span", { class: "dot", style: `background: ${run.colour}` }), " ", visible(run.name)),
    h("td", {}, `${RUNS.content.settings.indexOf(run.setting) + 1}`), h("td", { class: "num" }, run.settings.seed ?? "–"), h("td", { class: "line" }, visible(run.state)), h("td", { class: "line" }, tracedLink(run))));
  return h("section", { id: "runs" }, h("div", { class: "card scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, ["", "run", "setting", "seed", "state", "traces"].map((t) => h("th", {}, t)))), h("tbody", {}, rows))));
}

/* ---- held-out scores ---- */

function whisker(rows, low, high) {
  const at = (v) => 4 + (92 * (v - low)) / (high - low || 1);
  const marks = rows.flatMap(([score, colour, hollow], k) => {
    const y = rows.length === 1 ? 13 : 7 + k * 12;
    return [h("line@svg", { x1: `${at(score.ci95[0])}%`, x2: `${at(score.ci95[1])}%`, y1: y, y2: y, stroke: colour, "stroke-width": 2.4, "stroke-linecap": "round", opacity: hollow ? 0.55 : 1 }),
      h("circle@svg", { cx: `${at(score.mean)}%`, cy: y, r: 4.2, fill: hollow ? "var(--card)" : colour, stroke: colour, "stroke-width": 2 })];
  });
  return h("svg@svg", { class: "whisker", role: "img", "aria-label": rows.map(([s]) => `${fmt(s.mean, 3)}, 95 % from ${fmt(s.ci95[0], 3)} to ${fmt(s.ci95[1], 3)}`).join("; ") }, marks);
}

const interval = (score) => h("span", { class: "num" }, fmt(score.mean, 3), h("span", { class: "faint small" }, ` ${fmt(score.ci95[0], 3)} to ${fmt(score.ci95[1], 3)}`));

function scoresSection(runs) {
  const shown = runs.filter((run) => run.shown && run.scores.length);
  if (!shown.length) return null;
  const rewards = [...new Set(shown.flatMap((run) => run.scores.flatMap((s) => Object.keys(s.scores))))];
  const blocks = rewards.map((reward) => {
    const entries = shown.flatMap((run) => run.scores.filter((s) => s.scores[reward]).map((s) => ({ run, evaluation: s, score: s.scores[reward] })));
    const all = entries.flatMap((e) => [...e.score.ci95, e.score.mean]);
    return scoreRows(reward, shown, Math.min(...all), Math.max(...all));
  });
  const head = ["reward", "run", "", "before", "after", "difference, paired"];
  const isEval = shown.every((run) => run.kind === "eval");
  return h("section", { id: "scores" }, h("div", { class: "heading" }, h("h2", {}, "Held-out scores"), h("span", { class: "soft" }, "Mean with 95 % interval" + (isEval ? "" : "; hollow: before training"))),
    h("div", { class: "card scroll" }, h("table", {}, h("thead", {}, h("tr", {}, (isEval ? ["reward", "model", "", "", "score", "difference, paired"] : head).map((t) => h("th", {}, t)))), h("tbody", {}, blocks))));
}

function scoreRows(reward, runs, low, high) {
  const rows = [];
  for (const run of runs) {
    const own = run.scores.filter((s) => s.scores[reward]);
    const pairs = run.kind === "eval" ? own.map((s) => [null, s]) : [[own.find((s) => s.label === "before"), own.find((s) => s.label === "after")]];
    pairs.filter(([before, after]) => before || after).forEach(([before, after], k) => {
      const colour = run.kind === "eval" ? colourOf(k) : run.colour;
      const marks = [before && [before.scores[reward], colour, true], after && [after.scores[reward], colour, false]].filter(Boolean);
      const difference = after && after.difference && after.difference[reward];
      rows.push(h("tr", { "data-reward": reward }, h("td", { class: "mono" }, rows.length ? "" : visible(reward)),
        h("td", { class: "name" }, h("span", { class: "dot", style: `background: ${colour}` }), " ", visible(run.kind === "eval" ? after.label : run.name)),
        h("td", { class: "wide" }, whisker(marks, low, high)), h("td", {}, before ? interval(before.scores[reward]) : "–"), h("td", {}, after ? interval(after.scores[reward]) : "–"),
        h("td", { class: "num" }, difference ? [h("b", {}, signed(difference.mean, 3)), h("span", { class: "faint small" }, ` ${signed(difference.ci95[0], 3)} to ${signed(difference.ci95[1], 3)}`)] : "–")));
    });
    const seeds = runs.filter((other) => other.setting === run.setting && other.kind === "train");
    if (VIEW.bands && seeds.length > 1 && seeds[seeds.length - 1] === run) rows.push(seedsRow(reward, seeds));
  }
  return rows;
}

/** The mean over seeds of one setting, and how far apart they are. */
function seedsRow(reward, runs) {
  const of = (read) => runs.map((run) => read(run)).filter((v) => v !== undefined && v !== null);
  const score = (run, label) => { const s = run.scores.find((own) => own.label === label); return s && s.scores[reward] && s.scores[reward].mean; };
  const cell = (values, sign) => h("td", { class: "num" }, values.length ? [h("b", {}, sign ? signed(meanOf(values), 3) : fmt(meanOf(values), 3)), h("span", { class: "faint small" }, ` ${fmt(Math.min(...values), 3)} … ${fmt(Math.max(...values), 3)}`)] : "–");
  return h("tr", { class: "together" }, h("td", {}), h("td", { class: "line" }, `mean of ${runs.length} seeds`), h("td", { class: "soft small" }, "least … largest"), cell(of((r) => score(r, "before"))), cell(of((r) => score(r, "after"))),
    cell(of((r) => { const s = r.scores.find((own) => own.difference); return s && s.difference[reward] && s.difference[reward].mean; }), true));
}

/* ---- curves ---- */

function curvesSection(runs) {
  const metrics = [...new Set(runs.flatMap((run) => Object.keys(run.curves.values || {})))];
  if (!metrics.length) return null;
  const holder = h("div", { id: "charts" });
  const fill = () => holder.replaceChildren(...chartBlocks(metrics, runs));
  const timed = runs.some((run) => run.curves.times.some((t) => t !== null));
  const seeds = RUNS.content.settings.length < runs.length;
  const tools = h("div", { class: "tools" },
    h("input", { type: "search", id: "search", placeholder: "Search metrics, e.g. clip or entropy", "aria-label": "Search metrics", value: VIEW.search, input: (e) => { VIEW.search = e.target.value; fill(); } }),
    h("label", {}, "smoothing ", h("input", { type: "range", id: "smoothing", min: 0, max: 0.98, step: 0.02, value: VIEW.smoothing, "aria-label": "Smoothing", change: (e) => { VIEW.smoothing = Number(e.target.value); fill(); } })),
    h("label", {}, h("input", { type: "checkbox", id: "log", checked: VIEW.log, change: (e) => { VIEW.log = e.target.checked; fill(); } }), "log axis"),
    seeds && h("label", {}, h("input", { type: "checkbox", id: "bands", checked: VIEW.bands, change: (e) => { VIEW.bands = e.target.checked; show(); } }), "seeds as mean and band"),
    timed && choice("Horizontal axis", [["steps", "steps"], ["hours", "hours"]], VIEW.axis, (axis) => { VIEW.axis = axis; show(); }));
  fill();
  return h("section", { id: "curves" }, h("div", { class: "heading" }, h("h2", {}, "Curves"), h("span", { class: "soft" }, "Click a chart to open the nearest traced step; drag to pan. Shaded: a warning holds.")), tools, legend(runs), holder);
}

function legend(runs) {
  const shown = runs.filter((run) => run.shown && run.curves.values);
  if (shown.length < 2) return null;
  const seen = new Map();
  for (const run of shown) {
    const members = shown.filter((other) => other.setting === run.setting);
    const together = VIEW.bands && members.length > 1;
    const key = together ? run.setting : run.name;
    if (!seen.has(key)) seen.set(key, [run.colour, together ? `setting ${RUNS.content.settings.indexOf(run.setting) + 1}: ${members.length} seeds` : run.name]);
  }
  return h("div", { class: "legend" }, [...seen.values()].map(([colour, text]) => h("span", {}, h("i", { class: "dot", style: `background: ${colour}` }), visible(text))));
}

function chartBlocks(metrics, runs) {
  const words = VIEW.search.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = metrics.filter((m) => words.every((w) => m.toLowerCase().includes(w)));
  if (!wanted.length) return [h("p", { class: "soft" }, "No metric has this in its name.")];
  VIEW.open ||= new Map(SECTIONS.map(([title, , open]) => [title, open]));
  const options = { runs, smoothing: VIEW.smoothing, log: VIEW.log, axis: VIEW.axis, bands: VIEW.bands };
  const left = new Set(wanted);
  return SECTIONS.map(([title, matches]) => {
    const own = [...left].filter(matches);
    own.forEach((m) => left.delete(m));
    if (!own.length) return null;
    const grid = h("div", { class: "charts" });
    const fill = () => { if (!grid.childElementCount) grid.append(...own.map((m) => chartCard(m, options, openNearest))); };
    const block = h("details", { class: "block", open: words.length > 0 || VIEW.open.get(title), toggle: (e) => { if (!words.length) VIEW.open.set(title, e.target.open); if (e.target.open) fill(); } },
      h("summary", {}, title, h("span", { class: "soft" }, `${own.length}`)), grid);
    if (block.open) fill();
    return block;
  }).filter(Boolean);
}

/** Open the traced step nearest to a step of a chart. */
function openNearest(step) {
  const choices = RUNS.content.runs.filter((run) => run.shown).flatMap((run) => run.traced.map((t) => [Math.abs(t - step), run, t]));
  if (!choices.length) return;
  const [, run, found] = choices.sort((a, b) => a[0] - b[0])[0];
  go({ ...named(run), step: found });
}

/* ---- warnings, differences, pictures ---- */

function warningsSection(runs) {
  const rows = runs.filter((run) => run.shown).flatMap((run) => [
    ...run.curves.warnings.map((w) => ({ run, first: w.first, last: w.last, text: w.text })),
    ...run.curves.skipped.map(([step, reason]) => ({ run, first: step, last: step, text: `skipped: ${reason}` })),
  ]).sort((a, b) => a.first - b.first);
  if (!rows.length) return null;
  const link = (run, step) => (run.traced.includes(step) ? h("a", { href: addressOf({ ...named(run), step }) }, `${step}`) : `${step}`);
  return h("section", { id: "warnings" }, h("div", { class: "heading" }, h("h2", {}, "Warnings"), h("span", { class: "soft" }, "From the monitor, with the steps at which they hold")),
    h("div", { class: "card scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["steps", "warning", runs.length > 1 ? "run" : ""].map((t) => h("th", {}, t)))),
      h("tbody", {}, rows.map((r) => h("tr", {}, h("td", { class: "num" }, link(r.run, r.first), r.last > r.first ? [" to ", link(r.run, r.last)] : null), h("td", {}, visible(r.text)),
        h("td", { class: "name" }, runs.length > 1 ? [h("span", { class: "dot", style: `background: ${r.run.colour}` }), " ", visible(r.run.name)] : null)))))));
}

function differencesSection(runs) {
  const keys = RUNS.content.differences;
  const shown = (value) => visible(value === undefined || value === null ? "none" : typeof value === "string" ? value : JSON.stringify(value));
  const differ = keys.length > 0 && h("div", { class: "card scroll" }, h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "setting"), runs.map((run) => h("th", {}, h("span", { class: "dot", style: `background: ${run.colour}` }), " ", visible(run.name))))),
    h("tbody", {}, keys.map((key) => h("tr", {}, h("td", { class: "mono" }, visible(key)), runs.map((run) => h("td", { class: "mono" }, shown(run.settings[key]))))))));
  const first = runs.find((run) => Object.keys(run.settings).length);
  const all = first && h("details", { class: "block" }, h("summary", {}, "All settings", h("span", { class: "soft" }, runs.length > 1 ? visible(`of ${first.name}`) : "")),
    h("div", { class: "card scroll" }, h("table", {}, h("tbody", {}, Object.entries(first.settings).map(([key, value]) => h("tr", {}, h("td", { class: "mono" }, visible(key)), h("td", { class: "mono" }, shown(value))))))));
  if (!differ && !all) return null;
  return h("section", { id: "differences" }, h("div", { class: "heading" }, h("h2", {}, "Settings"), runs.length > 1 && h("span", { class: "soft" }, keys.length ? "Those that differ" : "The runs have the same settings")), differ, all);
}

function progressSection(runs) {
  const having = runs.filter((run) => run.shown && run.progress);
  if (!having.length) return null;
  return h("section", { id: "progress" }, h("div", { class: "heading" }, h("h2", {}, "The same prompts over the run"), h("span", { class: "soft" }, "Held-out prompts on the same noise, a row for each")),
    having.map((run) => h("figure", { style: "margin: 0 0 14px" }, runs.length > 1 && h("figcaption", { class: "soft small" }, visible(run.name)),
      h("img", { class: "picture-wide", loading: "lazy", src: run.progress, alt: visible(`Held-out prompts of ${run.name}, a row per prompt, a column per step`) }))));
}
