"use strict";
/* Level 4: the objective as configured, with the numbers of one token or denoising step put in. */

/* MathML from short words: mi("x"), mn(3), row(...), frac(a, b), sub(a, b). */
const m = (tag, attributes, ...children) => h(`${tag}@math`, attributes, ...children);
const mi = (text) => m("mi", {}, text);
const mo = (text) => m("mo", { stretchy: "false" }, text);
const gap = () => m("mspace", { width: "0.25em" });
const mn = (value, digits = 5) => {
  const text = fmt(value, digits);
  if (!text.includes("e")) return m("mn", {}, text);
  const [mantissa, power] = text.split("e");
  return row(m("mn", {}, mantissa), mo("·"), m("msup", {}, m("mn", {}, "10"), m("mn", {}, power)));
};
const words = (text) => m("mtext", {}, text);
const row = (...children) => m("mrow", {}, ...children);
const frac = (a, b) => m("mfrac", {}, a, b);
const sub = (a, b) => m("msub", {}, a, b);
const paren = (...children) => row(mo("("), ...children, mo(")"));
const bracket = (value) => (value < 0 ? paren(mn(value)) : mn(value));

/** An equation: its left side, then each of its right sides on a line of its own. */
function equation(label, left, ...rights) {
  const lines = rights.map((right, k) => m("mtr", {}, m("mtd", {}, k ? null : left), m("mtd", {}, mo("=")), m("mtd", { displaystyle: "true" }, row(...[right].flat()))));
  return h("div", { class: "formula", role: "group", "aria-label": label }, m("math", { display: "block" }, m("mtable", {}, lines)));
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const sum = (values) => values.reduce((total, v) => total + v, 0);

/** The default action: the token with the largest push, or largest log-probability where none was measured; else the first action. */
function defaultAction(episode) {
  let best = null;
  episode.segments.forEach((segment, s) => {
    if (!segment.columns) return;
    const shares = tokenOrStepPush(segment) || [];
    shares.forEach((v, k) => { if (best === null || Math.abs(v ?? 0) > best.size) best = { segment: s, action: k, size: Math.abs(v ?? 0) }; });
  });
  return best || { segment: episode.segments.findIndex((s) => s.columns), action: 0 };
}

const tokenOrStepPush = (segment) => (segment.kind === "text" ? tokenValues(segment, "push") || segment.columns.rollout : null);

function levelFormula(where, run, content) {
  const group = content.groups[where.group];
  const episode = group && group.episodes[where.member ?? 0];
  if (!episode) return h("p", { class: "note" }, "This step has no such episode: choose one from the step.");
  const chosen = where.segment === undefined ? { ...where, ...defaultAction(episode) } : where;
  const segment = episode.segments[chosen.segment];
  if (!segment || !segment.columns) return h("p", { class: "note" }, "Choose a token or a denoising step in the episode.");
  const k = Math.min(chosen.action ?? 0, (segment.kind === "text" ? segment.tokens : segment.steps).length - 1);
  const isText = segment.kind === "text";
  const title = isText ? `Token ${tokenTitle(segment, k)}` : `Denoising step ${segment.steps[k]}`;
  const back = { ...chosen, view: undefined };
  const count = (isText ? segment.tokens : segment.steps).length;
  const step = (j) => (j >= 0 && j < count ? addressOf({ ...chosen, action: j, view: "formula" }) : null);
  return h("div", {},
    h("h1", {}, title),
    h("p", { class: "soft" }, visible(`${run.kind === "rollout" ? "" : `Step ${content.step} · `}group ${where.group} · member ${episode.member} · ${isText ? `token ${k} of ${count}` : `time ${fmt(segment.columns.t[k], 3)} to ${fmt(segment.columns.t_next[k], 3)}`}`)),
    h("div", { class: "nav" }, h("a", { class: "button", href: addressOf(back) }, "↑ the episode"), h("a", { class: "button", href: step(k - 1), style: step(k - 1) ? null : "opacity: .35" }, "← previous action"), h("a", { class: "button", href: step(k + 1), style: step(k + 1) ? null : "opacity: .35" }, "next action →")),
    content.objective ? [objectiveCard(run, content), advantageCard(run, content, group, episode), isText ? textCard(content, episode, segment, k) : imageCard(content, episode, segment, k)]
      : h("p", { class: "note" }, "These episodes were drawn without an update, so there is nothing to put into the formula."));
}

const card = (title, note, ...body) => h("section", { class: "card" }, h("div", { class: "heading" }, h("h2", {}, title), note && h("span", { class: "soft" }, note)), ...body);

function objectiveCard(run, content) {
  const o = content.objective;
  const kind = run.settings["objective.image"] || "transition"; // else the final latent is noised to drawn times
  const [k, clip] = kind === "fpo" ? ["pictures", run.settings["objective.fpo_clip"]] : [kind === "nft" ? "drawn times of a picture" : "stochastic denoising steps", o.image_clip];
  const terms = [];
  const advantage = () => sub(mi("A"), mi("b"));
  const surrogate = (letter, clip) => {
    const ratio = () => sub(mi("r"), row(mi("b"), mi(letter)));
    return row(mi("min"), paren(ratio(), advantage(), mo(","), gap(), mi("clip"), paren(ratio(), mo(","), m("mn", {}, "1"), mo("±"), mn(clip)), gap(), advantage()));
  };
  const mean = (letter) => row(m("munder", {}, words("mean"), row(mi("b"), mo(","), mi(letter))), gap());
  if (o.text_weight) terms.push(row(mo("−"), o.text_weight === 1 ? null : mn(o.text_weight), mean("l"), surrogate("l", o.text_clip)));
  if (o.text_weight && o.text_kl) terms.push(row(mo("+"), mn(o.text_weight * o.text_kl), words(" KL")));
  if (o.image_weight) terms.push(row(mo(kind === "nft" ? "+" : "−"), o.image_weight === 1 ? null : mn(o.image_weight), mean("k"), kind === "nft" ? words("NFT loss (docs/algorithm.md)") : surrogate("k", clip)));
  if (o.image_weight && o.penalty !== "none") terms.push(row(mo("+"), mn(o.image_weight * o.penalty_weight), gap(), mean("k"), o.penalty === "velocity-mse" ? velocityPenalty() : words("KL")));
  return card("The objective, as configured", `to be minimised; b: episodes, l: tokens, k: ${k}`, h("div", { class: "formula", role: "group", "aria-label": "Objective" }, m("math", { display: "block" }, m("mtable", {}, terms.map((term, k) => m("mtr", {}, m("mtd", {}, k ? null : row(mi("L"), mo("="))), m("mtd", { displaystyle: "true" }, term)))))));
}

const velocityPenalty = () => m("msup", {}, row(mo("‖"), mi("v"), mo("−"), sub(mi("v"), words("ref")), mo("‖")), m("mn", {}, "2"));

/** The advantage from the rewards of the group, where it is the scaled sum of them. */
function advantageCard(run, content, group, episode) {
  const totals = group.episodes.map((e) => totalOf(e, content.weights)).filter((v) => !Number.isNaN(v));
  const own = totalOf(episode, content.weights);
  const mean = sum(totals) / (totals.length || 1);
  const deviation = Math.sqrt(sum(totals.map((v) => (v - mean) ** 2)) / (totals.length || 1));
  const normalize = run.settings["advantage.normalize"];
  const found = normalize === "group" ? (own - mean) / (deviation + 1e-6) : own - mean;
  const matches = Math.abs(found - episode.advantage) <= 1e-3 * Math.max(1, Math.abs(found)) && normalize !== "batch";
  const weights = Object.entries(content.weights).filter(([, w]) => w).map(([name, w]) => `${w === 1 ? "" : `${fmt(w)} × `}${name}`).join(" + ");
  const scaled = (value, by) => (normalize === "group" ? frac(value, by()) : value);
  const numbers = [scaled(row(mi("R"), mo("−"), mi("μ")), () => mi("σ")), scaled(row(mn(own), mo("−"), bracket(mean)), () => mn(deviation)), mn(found)];
  return card("Advantage", visible(matches ? `R = ${weights}; μ, σ: mean and deviation over the group's ${totals.length} members` : `of all rewards (${weights}), combined as configured: ${run.settings["advantage.combine"] || "by a plugin"}`),
    equation("Advantage", mi("A"), ...(matches ? numbers : [mn(episode.advantage)])));
}

function surrogateLines(log_ratio, advantage, clip, letter) {
  const ratio = Math.exp(log_ratio);
  const d = Math.expm1(log_ratio);
  const free = d * advantage, bound = clamp(d, -clip, clip) * advantage;
  const gain = Math.min(free, bound);
  const excess = () => row(sub(mi("r"), mi(letter)), mo("−"), m("mn", {}, "1"));
  return { gain, clipped: bound < free, ratio, element: equation("Surrogate",
    mi("g"), [mi("min"), paren(paren(excess()), gap(), mi("A"), mo(","), gap(), mi("clip"), paren(excess(), mo(","), mo("±"), mn(clip)), gap(), mi("A"))],
    [mi("min"), paren(mn(free), mo(","), gap(), mn(bound))], [mn(gain), bound < free ? words("\u2003the clip binds: no gradient") : null]) };
}

function shareLines(parts, denominator, count, total, recorded, unit) {
  return [equation("Share of the loss", words("share"), frac(row(...parts), row(words("episodes"), gap(), mo("·"), gap(), words(unit))), frac(mn(total), row(mn(denominator), mo("·"), mn(count))), mn(total / (denominator * count))),
    h("p", { class: "small soft" }, "Share of the loss, recorded by the run: ", h("b", { id: "recorded", class: "num", title: String(recorded) }, fmt(recorded, 5)), ", from the numbers above: ", h("b", { id: "recomputed", class: "num", title: String(total / (denominator * count)) }, fmt(total / (denominator * count), 5)))];
}

function textCard(content, episode, segment, k) {
  const o = content.objective, c = segment.columns;
  if (!c.log_ratio || !c.advantage || !o.text_weight) return h("p", { class: "note" }, "This run does not train text: the objective has no term for a token.");
  const count = sum(episode.segments.filter((s) => s.kind === "text").map((s) => s.tokens.length));
  const surrogate = surrogateLines(c.log_ratio[k], c.advantage[k], o.text_clip, "l");
  const kl = o.text_kl && c.reference ? Math.expm1(c.reference[k] - c.new[k]) - (c.reference[k] - c.new[k]) : 0;
  const total = o.text_weight * (-surrogate.gain + o.text_kl * kl);
  const p = (which) => sub(mi("p"), words(which));
  return card("This token", "p: probability of the token at the sampling temperature",
    equation("Ratio", sub(mi("r"), mi("l")), frac(p("new"), p("old")), [mi("exp"), paren(mn(c.new[k]), mo("−"), bracket(c.old[k]))], mn(surrogate.ratio, 7)),
    surrogate.element,
    o.text_kl && c.reference ? equation("KL", words("KL"), [frac(p("ref"), p("new")), mo("−"), mi("log"), gap(), frac(p("ref"), p("new")), mo("−"), m("mn", {}, "1")], mn(kl)) : null,
    shareLines([mo("−"), o.text_weight === 1 ? null : mn(o.text_weight), mi("g"), o.text_kl ? row(mo("+"), mn(o.text_weight * o.text_kl), words(" KL")) : null], content.denominator, count, total, c.loss ? c.loss[k] : null, "tokens"),
    c.change ? equation("What happened", words("push"), [mi("A"), mo("·"), paren(mi("log"), gap(), p("after"), mo("−"), mi("log"), gap(), p("old"))], [bracket(c.advantage[k]), mo("·"), bracket(c.change[k])], mn(c.advantage[k] * c.change[k])) : null);
}

function imageCard(content, episode, segment, k) {
  const o = content.objective, c = segment.columns;
  if (!c.update_log_ratio || !c.advantage || !o.image_weight) return h("p", { class: "note" }, "This run does not train the image: the objective has no term for a denoising step.");
  const count = sum(episode.segments.filter((s) => s.kind === "image").map((s) => s.steps.length));
  const surrogate = surrogateLines(c.update_log_ratio[k], c.advantage[k], o.image_clip, "k");
  const penalty = o.penalty === "none" || !c.penalty ? 0 : c.penalty[k];
  const total = o.image_weight * (-surrogate.gain + o.penalty_weight * penalty);
  const [rows, columns] = segment.grid;
  const mean = meanOf(unpacked(segment.maps.update_log_ratio, rows * columns, k));
  const moved = row(sub(mi("μ"), words("new")), mo("−"), sub(mi("μ"), words("old")));
  const error = frac(row(mi("x"), mo("′"), mo("−"), sub(mi("μ"), words("old"))), mi("σ"));
  const form = o.trust_region === "ratio-norm" ? [error, paren(moved)] : [words("log "), frac(sub(mi("p"), words("new")), sub(mi("p"), words("old")))];
  return card("This denoising step", o.trust_region === "ratio-norm" ? "RatioNorm: the log-ratio per position, then its mean over positions and channels" : "the log-ratio, mean over positions and channels",
    equation("Log-ratio", row(mi("log"), gap(), sub(mi("r"), mi("k"))), [words("mean"), gap(), ...form], mn(c.update_log_ratio[k])),
    h("p", { class: "small soft" }, "mean of its map: ", h("b", { class: "num" }, fmt(mean, 5))),
    surrogate.element,
    penalty ? equation("Penalty", o.penalty === "velocity-mse" ? velocityPenalty() : words("KL"), mn(penalty)) : null,
    shareLines([o.image_weight === 1 ? null : mn(o.image_weight), mo("−"), mi("g"), penalty ? row(mo("+"), mn(o.penalty_weight), mo("·"), mn(penalty)) : null], content.denominator, count, total, c.loss ? c.loss[k] : null, "steps"),
    c.after_log_ratio ? equation("What happened", words("push"), [mi("A"), mo("·"), mi("log"), gap(), sub(mi("r"), words("after"))], [bracket(c.advantage[k]), mo("·"), bracket(c.after_log_ratio[k])], mn(c.advantage[k] * c.after_log_ratio[k])) : null);
}
