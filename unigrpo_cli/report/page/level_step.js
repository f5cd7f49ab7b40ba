"use strict";
/* Level 2: the traced groups of a step. */

const ORDER = { groups: "drawn", members: "drawn" };

const runOf = (where) => RUNS.content.runs.find((run) => run.name === where.run) || RUNS.content.runs.find((run) => run.traced.length) || RUNS.content.runs[0];

/** Links to all traced steps of a run, and to the runs that have any. */
function stepNav(where, run) {
  const others = RUNS.content.runs.filter((own) => own.traced.length);
  const at = run.traced.indexOf(where.step);
  const jump = (k) => (k >= 0 && k < run.traced.length ? { ...where, step: run.traced[k], segment: undefined, action: undefined, view: undefined } : null);
  const arrow = (target, text, label) => h(target ? "a" : "span", { class: "button", href: target && addressOf(target), "aria-label": label, "aria-disabled": !target && "true", style: target ? null : "opacity: .35" }, text);
  const list = run.traced.length <= 24
    ? h("span", { class: "ticks" }, run.traced.map((step, k) => h("a", { href: addressOf(jump(k)), "aria-current": step === where.step && "step" }, `${step}`)))
    : h("label", { class: "soft" }, h("input", { type: "range", min: 0, max: run.traced.length - 1, value: Math.max(0, at), style: "width: min(420px, 50vw)", "aria-label": "Traced step", change: (e) => go(jump(Number(e.target.value))) }), ` of ${run.traced.length} traced steps`);
  return h("div", { class: "nav" },
    others.length > 1 && h("select", { "aria-label": "Run", change: (e) => { const other = others[e.target.value]; go({ run: other.name, step: nearest(other.traced, where.step) }); } },
      others.map((own, k) => h("option", { value: k, selected: own === run }, visible(own.name)))),
    run.traced.length > 1 && [arrow(jump(at - 1), "←", "Previous traced step"), list, arrow(jump(at + 1), "→", "Next traced step")]);
}

const nearest = (steps, wanted) => steps.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best), steps[0]);

const totalOf = (episode, weights) => {
  const values = Object.entries(weights).filter(([, w]) => w).map(([name, w]) => (episode.rewards[name] === null || episode.rewards[name] === undefined ? NaN : episode.rewards[name] * w));
  return values.length ? values.reduce((sum, v) => sum + v, 0) : NaN;
};

const finalPicture = (episode) => [...episode.segments].reverse().find((s) => s.kind === "image");
const reasoningOf = (episode) => episode.segments.filter((s) => s.kind === "text").map((s) => s.text).join("\n\n");

function sortedGroups(content) {
  const rows = content.groups.map((group, k) => {
    const totals = group.episodes.map((e) => totalOf(e, content.weights)).filter((v) => !Number.isNaN(v));
    return { group, k, best: Math.max(...totals, -Infinity), worst: Math.min(...totals, Infinity), spread: group.spread ?? -1 };
  });
  const by = { drawn: (r) => r.k, spread: (r) => -r.spread, best: (r) => -r.best, worst: (r) => r.worst }[ORDER.groups];
  return rows.sort((a, b) => by(a) - by(b) || a.k - b.k);
}

function levelStep(where, run, content) {
  const isRollout = run.kind === "rollout";
  const rows = sortedGroups(content);
  const set = (key) => (value) => { ORDER[key] = value; show(); };
  return h("div", {},
    h("h1", {}, isRollout ? visible(run.name) : `Step ${content.step}`),
    h("p", { class: "soft" }, visible(`${content.groups.length} groups of ${content.groups[0] ? content.groups[0].episodes.length : 0} episodes${isRollout ? "" : ` that this step learned from${RUNS.content.runs.length > 1 ? `, ${run.name}` : ""}`}`)),
    stepNav(where, run),
    content.skipped && h("p", { class: "note" }, visible(`The rest of this step's updates was skipped: ${content.skipped}`)),
    stepChips(run, content),
    h("div", { class: "tools" },
      h("span", { class: "soft small" }, "Groups by"), choice("Order of groups", [["drawn", "order drawn"], ["spread", "spread", "Standard deviation of the weighted reward"], ["best", "best", "Largest weighted reward of a member"], ["worst", "worst", "Least weighted reward of a member"]], ORDER.groups, set("groups")),
      h("span", { class: "soft small" }, "Members by"), choice("Order of members", [["drawn", "number"], ["advantage", "advantage"]], ORDER.members, set("members"))),
    rows.map(({ group, k }) => groupCard(where, run, content, group, k)));
}

/** Metrics of this step, from metrics.jsonl. */
function stepChips(run, content) {
  const at = run.curves.steps.indexOf(content.step);
  if (at < 0) return null;
  const names = Object.keys(run.curves.values).filter((m) => /^reward\/[^/]+$|^advantage\/zero_groups$|^(text|image)\/clip_fraction$|^text\/entropy$|^image\/(velocity-mse|latent-kl)$/.test(m));
  return h("div", { class: "chips", style: "margin-bottom: 14px" }, names.filter((m) => run.curves.values[m][at] !== null).map((m) => h("span", { class: "chip" }, h("span", { class: "soft" }, visible(m)), num(run.curves.values[m][at]))));
}

function groupCard(where, run, content, group, k) {
  const members = group.episodes.map((episode, m) => [episode, m]);
  if (ORDER.members === "advantage") members.sort((a, b) => (b[0].advantage ?? -Infinity) - (a[0].advantage ?? -Infinity));
  return h("article", { class: "card group", "data-group": k },
    h("header", {}, h("span", { class: "faint small num" }, `group ${k}`), h("span", { class: "prompt" }, visible(group.prompt)),
      h("span", { class: "chip", title: "Standard deviation of the weighted reward over the group" }, h("span", { class: "soft" }, "spread"), num(group.spread, { digits: 3 })), decidedBy(group.decided)),
    h("div", { class: "members" }, members.map(([episode, m]) => memberCard({ ...where, group: k, member: m }, episode))));
}

/** Shares of the rewards in a group's advantages, as words and a bar. */
function decidedBy(shares) {
  const rows = Object.entries(shares).sort((a, b) => b[1] - a[1]);
  if (!rows.length) return null;
  if (rows.length === 1) return h("span", { class: "soft small" }, visible(`decided by ${rows[0][0]}`));
  const names = Object.keys(shares);
  const words = rows.map(([name, share]) => `${name} ${Math.round(100 * share)} %`).join(", ");
  const whole = rows.reduce((sum, [, share]) => sum + Math.max(0, share), 0) || 1;
  return [h("span", { class: "shares", role: "img", "aria-label": visible(`Shares in the advantage: ${words}`) }, rows.filter(([, s]) => s > 0).map(([name, s]) => h("i", { style: `width: ${(100 * s) / whole}%; background: ${colourOf(names.indexOf(name))}` }))),
    h("span", { class: "soft small", title: "Covariance of each weighted reward with the advantage, as a share of all" }, visible(`decided by ${words}`))];
}

function memberCard(where, episode) {
  const picture = finalPicture(episode);
  const reasoning = reasoningOf(episode);
  return h("a", { class: "member", href: addressOf({ ...where, segment: undefined, action: undefined, view: undefined }), "data-member": where.member },
    picture ? h("img", { class: "pixels", loading: "lazy", src: picture.image, alt: visible(`Picture of member ${episode.member}: ${reasoning.slice(0, 120)}`) }) : h("span", { class: "blank" }),
    h("div", {}, h("div", { class: "top" }, badge(episode.advantage, 2), h("span", { class: "faint small num" }, `#${episode.member}`)),
      h("dl", {}, Object.entries(episode.rewards).map(([name, value]) => [h("dt", { title: visible(name) }, visible(name)), h("dd", {}, value === null ? "–" : num(value, { digits: 2 }))]))),
    reasoning && h("p", { title: visible(reasoning) }, visible(reasoning)));
}
