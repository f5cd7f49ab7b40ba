"use strict";
/* Level 3: one episode, its segments in order; each token and each denoising step with what the update did to it. */

const LOOK = { tokens: "push", map: null, base: "x0", opacity: 0.75 };

const TOKEN_COLOURS = [
  ["push", "push", "Advantage times the change of log-probability: above 0 the update did what the reward asked"],
  ["change", "change", "Log-probability after the step minus before: blue became likelier"],
  ["log_ratio", "log-ratio", "New minus old log-probability, as the last update saw it"],
  ["entropy", "entropy", "Nats of the distribution that the token was drawn from"],
  ["loss", "loss share", "Share of the loss"],
  ["rollout", "surprise", "Minus the log-probability at sampling"],
];
const MAPS = [
  ["after_log_ratio", "log-ratio, after the step"], ["update_log_ratio", "log-ratio, last update"],
  ["after_velocity_change", "velocity change, after the step"], ["update_velocity_change", "velocity change, last update"], ["advantage", "advantage"],
];
const isSigned = (name) => !/velocity|entropy|rollout/.test(name);

const column = (segment, name) => segment.columns[name] || null;

/** What colours a token: a column, or one made of columns. */
function tokenValues(segment, name) {
  if (name === "push") {
    const change = column(segment, "change"), advantage = column(segment, "advantage");
    return change && advantage && change.map((v, k) => (v === null || advantage[k] === null ? null : v * advantage[k]));
  }
  if (name === "rollout") return column(segment, "rollout").map((v) => (v === null ? null : -v));
  return column(segment, name);
}

function unpacked(map, positions, k) {
  const bytes = Uint8Array.from(atob(map.levels), (c) => c.charCodeAt(0));
  const levels = new Int16Array(bytes.buffer, 2 * positions * k, positions);
  return Array.from(levels, (level) => level * map.scale);
}

function levelEpisode(where, run, content) {
  const group = content.groups[where.group];
  const episode = group && group.episodes[where.member ?? 0];
  if (!episode) return h("p", { class: "note" }, "This step has no such episode: choose one from the step.");
  const side = h("aside", { class: "side card", id: "side", "aria-live": "polite", "aria-label": "Numbers of the chosen action" });
  const segments = episode.segments.map((segment, s) => segmentCard(where, content, episode, segment, s, side));
  fillSide(side, where, content, episode);
  return h("div", {},
    h("h1", { class: "prompt" }, visible(group.prompt)),
    h("p", { class: "soft" }, `${run.kind === "rollout" ? "" : `Step ${content.step} · `}group ${where.group} · member ${episode.member}`),
    episodeNav(where, content), rewardChips(content, episode, group),
    h("div", { class: "episode" }, h("div", {}, segments, reasons(episode)), side));
}

/** The episodes before and after one, group after group. */
function neighbours(where, content) {
  const all = content.groups.flatMap((group, g) => group.episodes.map((_, m) => ({ group: g, member: m })));
  const at = all.findIndex((e) => e.group === where.group && e.member === (where.member ?? 0));
  const clean = (e) => e && { ...where, ...e, segment: undefined, action: undefined, view: undefined };
  return [clean(all[at - 1]), clean(all[at + 1])];
}

function episodeNav(where, content) {
  const [before, after] = neighbours(where, content);
  const up = { ...where, group: undefined, member: undefined, segment: undefined, action: undefined, view: undefined };
  const arrow = (target, text) => h("a", { class: "button", href: target ? addressOf(target) : null, style: target ? null : "opacity: .35", "aria-disabled": !target && "true" }, text);
  return h("div", { class: "nav" }, h("a", { class: "button", href: addressOf(up) }, "↑ all groups"), arrow(before, "← previous"), arrow(after, "next →"));
}

function rewardChips(content, episode, group) {
  const parts = Object.entries(episode.rewards).map(([name, value]) => {
    const weight = content.weights[name];
    const inside = Object.entries(episode.components[name] || {}).map(([part, v]) => `${part} ${fmt(v, 3)}`).join(", ");
    return h("span", { class: "chip", title: visible(inside) || null }, h("span", { class: "soft" }, visible(name)), value === null ? "abstained" : num(value), weight !== undefined && weight !== 1 && h("span", { class: "faint" }, `× ${fmt(weight)}`));
  });
  return h("div", { class: "chips", style: "margin-bottom: 16px" }, h("span", { class: "chip" }, h("span", { class: "soft" }, "advantage"), badge(episode.advantage)), parts, h("span", { class: "chip" }, h("span", { class: "soft" }, "spread of the group"), num(group.spread, { digits: 3 })));
}

function segmentCard(where, content, episode, segment, s, side) {
  const card = (title, aside, ...body) => h("section", { class: "segment card", "data-segment": s }, h("div", { class: "heading" }, h("h2", {}, title), aside && h("span", { class: "soft" }, aside)), ...body);
  if (segment.kind === "given_text") return card("Given", segment.role, h("div", { class: "given" }, visible(segment.text)));
  if (segment.kind === "given_image") return card("Given", segment.role, h("img", { class: "pixels", style: "width: 160px; border-radius: 6px", src: segment.image, alt: visible(`Given picture, ${segment.role}`) }));
  const own = Object.entries(segment.rewards || {}).map(([name, v]) => `${name} ${fmt(v, 3)}`).join(", ");
  if (segment.kind === "text") {
    const cut = segment.finished ? "" : ", cut off by the budget";
    return card("Text", visible(`${segment.tokens.length} tokens${cut}${own ? ` · ${own}` : ""}`), tokenBlock(where, content, episode, segment, s, side));
  }
  return card("Image", visible(`${segment.steps.length} of ${segment.times.length - 1} steps are stochastic: ${segment.sde}, noise ${fmt(segment.noise_level)}${own ? ` · ${own}` : ""}`), imageBlock(where, content, episode, segment, s, side));
}

/* ---- text ---- */

function tokenBlock(where, content, episode, segment, s, side) {
  const measured = TOKEN_COLOURS.filter(([name]) => tokenValues(segment, name));
  const name = measured.some(([n]) => n === LOOK.tokens) ? LOOK.tokens : measured[0][0];
  const values = tokenValues(segment, name);
  const largest = largestOf(values);
  const paint = isSigned(name) ? pushed : sequential;
  const clipped = column(segment, "clipped");
  const chosen = where.segment === s ? where.action : undefined;
  const choose = (k) => { go({ ...where, segment: s, action: k }, true); show({ keep: true }); };
  const tokens = segment.tokens.map((token, k) => h("span", {
    class: `token${clipped && clipped[k] ? " clipped" : ""}`, role: "button", tabindex: k === (chosen ?? 0) ? 0 : -1, "data-action": k, "aria-pressed": String(k === chosen),
    "aria-label": visible(`token ${token.trim() || "(blank)"}, ${name} ${fmt(values[k])}`), style: `background: ${paint(values[k], largest)}`,
    mouseenter: () => fillSide(side, { ...where, segment: s, action: k }, content, episode), focus: () => fillSide(side, { ...where, segment: s, action: k }, content, episode),
    click: () => choose(k),
    keydown: (e) => {
      const next = { ArrowRight: k + 1, ArrowLeft: k - 1 }[e.key];
      if (e.key === "Enter" || e.key === " ") { e.preventDefault(); e.stopPropagation(); choose(k); focusAction(s, k); }
      else if (next !== undefined) { e.preventDefault(); e.stopPropagation(); focusAction(s, next); }
    },
  }, shownToken(token)));
  tokens.forEach((token) => token.addEventListener("mouseleave", () => fillSide(side, place(), content, episode)));
  const bound = fmt(largest, 3);
  return [h("div", { class: "tools" }, choice("Colour of tokens", measured, name, (value) => { LOOK.tokens = value; show({ keep: true }); }),
    isSigned(name) ? scale(`−${bound}`, `+${bound}`) : scale("0", bound, "sequential")),
  h("div", { class: "tokens mono" }, tokens),
  clipped && clipped.some(Boolean) && h("p", { class: "soft small", style: "margin-top: 10px" }, "Dashed: the clip cuts this token's gradient.")];
}

const shownToken = (token) => (token === "" ? "■" : visible(token).replace(/\n/g, "⏎\n"));

const tokenTitle = (segment, k) => (segment.tokens[k] === "" ? "■ end of the text" : `“${shownToken(segment.tokens[k])}”`);

function focusAction(segment, action) {
  const node = document.querySelector(`[data-segment="${segment}"] [data-action="${action}"]`);
  if (node) node.focus();
}

/* ---- image ---- */

function imageBlock(where, content, episode, segment, s, side) {
  const chosen = where.segment === s ? where.action : undefined;
  const maps = MAPS.filter(([name]) => segment.maps[name]);
  const name = maps.some(([n]) => n === LOOK.map) ? LOOK.map : maps.length ? maps[0][0] : null;
  const ratios = column(segment, "after_log_ratio") || column(segment, "update_log_ratio");
  const changes = column(segment, "after_velocity_change") || column(segment, "update_velocity_change");
  const choose = (k) => { go({ ...where, segment: s, action: k }, true); show({ keep: true }); focusAction(s, k); };
  const frames = segment.steps.map((step, k) => h("button", { type: "button", class: "frame", "data-action": k, "aria-pressed": String(k === chosen), click: () => choose(k),
    mouseenter: () => fillSide(side, { ...where, segment: s, action: k }, content, episode), mouseleave: () => fillSide(side, place(), content, episode), focus: () => fillSide(side, { ...where, segment: s, action: k }, content, episode) },
  h("span", { class: "stack", style: "display: block" }, segment.x0 && h("img", { class: "pixels", src: segment.x0[k], alt: `Estimate of the picture before step ${step}, at time ${fmt(segment.columns.t[k], 3)}` }), name && heatMap(segment, name, k, 0.55)),
  h("span", { class: "row" }, h("b", {}, `step ${step}`), h("span", { class: "soft num" }, `t ${fmt(segment.columns.t[k], 3)}`)),
  ratios && h("span", { class: "row" }, h("span", { class: "soft", title: "log-ratio" }, "log r"), h("span", { class: `num ${ratios[k] > 0 ? "up" : "down"}` }, signed(ratios[k], 3))),
  changes && h("span", { class: "row" }, h("span", { class: "soft", title: "change of velocity" }, "Δ v"), h("span", { class: "num" }, fmt(changes[k], 3))),
  segment.columns.clipped && segment.columns.clipped[k] ? h("span", { class: "row" }, h("span", { class: "push", style: "background: var(--warn-paper); color: var(--warn)" }, segment.columns.clipped[k] > 0 ? "clipped above" : "clipped below")) : null));
  const final = h("div", { class: "frame final" }, h("span", { class: "stack", style: "display: block" }, h("img", { class: "pixels", src: segment.image, alt: visible(`Final picture, member ${episode.member}`) })), h("span", { class: "row" }, h("b", {}, "final")));
  return [h("div", { class: "strip" }, frames, final), chosen !== undefined && segment.steps[chosen] !== undefined && largeView(segment, s, chosen, maps, name)];
}

function heatMap(segment, name, k, opacity) {
  const [rows, columns] = segment.grid;
  const values = unpacked(segment.maps[name], rows * columns, k);
  const all = segment.steps.flatMap((_, j) => unpacked(segment.maps[name], rows * columns, j));
  const largest = largestOf(all);
  const canvas = h("canvas", { width: columns, height: rows, role: "img", style: `opacity: ${opacity}`, "aria-label": `Heat map, ${rows} by ${columns}: from ${fmt(Math.min(...values), 3)} to ${fmt(Math.max(...values), 3)}, mean ${fmt(meanOf(values), 3)}` });
  const css = getComputedStyle(document.documentElement);
  const rgb = (key) => css.getPropertyValue(key).split(",").map(Number);
  const picture = new ImageData(columns, rows);
  values.forEach((value, n) => {
    const colour = rgb(!isSigned(name) ? "--sequential" : value > 0 ? "--up" : "--down");
    picture.data.set([...colour, Math.round(255 * (largest ? Math.sqrt(Math.abs(value) / largest) : 0))], 4 * n);
  });
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

const meanOf = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;

function largeView(segment, s, k, maps, name) {
  const [rows, columns] = segment.grid;
  const base = LOOK.base === "x0" && segment.x0 ? segment.x0[k] : segment.image;
  const readout = h("span", { class: "num soft", id: "cell" }, "Point at a position to read it.");
  const stack = h("div", { class: "stack" }, h("img", { class: "pixels", src: base, alt: LOOK.base === "x0" ? `Estimate of the picture before step ${segment.steps[k]}` : "Final picture" }), name && heatMap(segment, name, k, LOOK.opacity));
  const values = name && unpacked(segment.maps[name], rows * columns, k);
  const largest = values && largestOf(segment.steps.flatMap((_, j) => unpacked(segment.maps[name], rows * columns, j)));
  stack.addEventListener("mousemove", (event) => {
    if (!values) return;
    const box = stack.getBoundingClientRect();
    const row = Math.min(rows - 1, Math.max(0, Math.floor((rows * (event.clientY - box.top)) / box.height)));
    const cell = Math.min(columns - 1, Math.max(0, Math.floor((columns * (event.clientX - box.left)) / box.width)));
    readout.textContent = `row ${row}, column ${cell}: ${isSigned(name) ? signed(values[row * columns + cell]) : fmt(values[row * columns + cell])}`;
  });
  const bound = fmt(largest, 3);
  return h("div", { class: "large", "data-large": k, "data-map": name }, stack, h("div", {},
    h("h3", {}, `Step ${segment.steps[k]}: time ${fmt(segment.columns.t[k], 3)} to ${fmt(segment.columns.t_next[k], 3)}`),
    name && [h("p", { style: "margin-top: 10px" }, h("select", { "aria-label": "Map", id: "map", change: (e) => { LOOK.map = e.target.value; show({ keep: true }); } }, maps.map(([value, text]) => h("option", { value, selected: value === name }, text)))),
      h("p", {}, isSigned(name) ? scale(`−${bound}`, `+${bound}`) : scale("0", bound, "sequential")),
      h("p", { class: "small" }, "mean over positions ", h("b", { class: "num", id: "map-mean", title: String(meanOf(values)) }, isSigned(name) ? signed(meanOf(values)) : fmt(meanOf(values)))),
      h("p", { class: "small" }, readout)],
    h("p", {}, choice("Picture", [["x0", "estimate of x₀"], ["final", "final picture"]].filter(([v]) => v === "final" || segment.x0), LOOK.base, (value) => { LOOK.base = value; show({ keep: true }); })),
    name && h("label", { class: "soft small" }, "map ", h("input", { type: "range", min: 0, max: 1, step: 0.05, value: LOOK.opacity, "aria-label": "Opacity of the map", input: (e) => { LOOK.opacity = Number(e.target.value); stack.querySelector("canvas").style.opacity = LOOK.opacity; } }))));
}

/* ---- numbers of an action ---- */

const TOKEN_NUMBERS = [
  ["advantage", "advantage", true], ["push", "push", true], ["change", "change of log-probability", true], ["rollout", "log-probability at sampling"], ["old", "before the step"], ["new", "at the last update"],
  ["after", "after the step"], ["reference", "of the reference"], ["ratio", "ratio"], ["log_ratio", "log-ratio", true], ["entropy", "entropy"], ["loss", "share of the loss", true],
];
const STEP_NUMBERS = [
  ["advantage", "advantage", true], ["after_log_ratio", "log-ratio after the step", true], ["update_log_ratio", "log-ratio, last update", true], ["after_mean_change", "change of the mean, after"],
  ["update_mean_change", "change of the mean, last update"], ["after_velocity_change", "change of velocity, after"], ["update_velocity_change", "change of velocity, last update"],
  ["penalty", "distance from the reference"], ["std", "deviation of the step"], ["rollout", "log-probability at sampling"], ["loss", "share of the loss", true],
];

function fillSide(side, where, content, episode) {
  const segment = episode.segments[where.segment];
  const k = where.action;
  if (!segment || !segment.columns || k === undefined) {
    side.replaceChildren(h("h3", {}, "An action"), h("p", { class: "soft small", style: "margin: 6px 0 0" }, "Point at a token or a denoising step to read its numbers; click it to keep it, then open its formula."));
    return;
  }
  const isText = segment.kind === "text";
  if (k >= (isText ? segment.tokens : segment.steps).length) return;
  const value = (name) => {
    if (name === "ratio") return column(segment, "log_ratio") && Math.exp(segment.columns.log_ratio[k]);
    const found = name === "push" ? tokenValues(segment, "push") : column(segment, name);
    return found && found[k];
  };
  const rows = (isText ? TOKEN_NUMBERS : STEP_NUMBERS).map(([name, label, sign]) => [name, label, sign, value(name)]).filter(([, , , v]) => v !== null && v !== undefined);
  const clip = segment.columns.clipped && segment.columns.clipped[k];
  side.replaceChildren(
    h("h3", { class: isText ? "mono" : "" }, isText ? tokenTitle(segment, k) : `Denoising step ${segment.steps[k]}`),
    h("p", { class: "faint small", style: "margin: 2px 0 0" }, isText ? `token ${k} of ${segment.tokens.length}, id ${segment.ids[k]}` : `time ${fmt(segment.columns.t[k], 3)} to ${fmt(segment.columns.t_next[k], 3)}`),
    h("dl", { class: "numbers" }, rows.map(([name, label, sign, v]) => [h("dt", {}, label), h("dd", { "data-number": name }, num(v, { digits: 5, sign }))]),
      clip !== null && clip !== undefined && [h("dt", {}, "clipped"), h("dd", {}, clip ? (clip > 0 ? "above" : "below") : "no")]),
    content.objective && h("p", { style: "margin: 12px 0 0" }, h("a", { class: "button", id: "to-formula", href: addressOf({ ...where, view: "formula" }) }, "Formula with these numbers")));
}

/** What judges and detectors said. */
function reasons(episode) {
  const names = Object.keys(episode.info || {});
  if (!names.length) return null;
  const asText = (value) => {
    if (Array.isArray(value)) return value.every((v) => typeof v !== "object" || v === null) ? visible(value.join("; ")) : value.map(asText);
    if (value && typeof value === "object") return h("dl", {}, Object.entries(value).map(([key, inner]) => [h("dt", {}, visible(key)), h("dd", {}, asText(inner))]));
    return visible(typeof value === "number" ? fmt(value) : value);
  };
  return h("section", { class: "segment card info" }, h("div", { class: "heading" }, h("h2", {}, "What the rewards say")), names.map((name) => [h("h3", { class: "mono" }, visible(name)), h("div", {}, asText(episode.info[name]))]));
}
