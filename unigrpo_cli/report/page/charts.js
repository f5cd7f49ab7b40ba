"use strict";
/* Curves, drawn by BokehJS when they come into view. */

const CHARTS = { observer: null, bokeh: null, waiting: [], drawing: false };

/** BokehJS, made to run when the first chart needs it: the rest of the page opens without waiting. */
function bokeh() {
  if (CHARTS.bokeh === null) {
    for (const held of document.querySelectorAll("script[data-later]")) {
      document.head.append(h("script", {}, held.textContent));
      held.remove();
    }
    Bokeh.set_log_level("error");
    CHARTS.bokeh = Bokeh;
  }
  return CHARTS.bokeh;
}

/** Exponential moving average without the pull of its start; null stays null. */
function smoothed(values, weight) {
  if (!weight) return values;
  let mean = 0, mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

/** The points of a run's metric: x, y and the unsmoothed values. */
function series(run, metric, options) {
  const all = run.curves.values[metric];
  const xs = options.axis === "hours" ? run.curves.times.map((t) => (t === null ? null : t / 3600)) : run.curves.steps;
  const kept = all.map((y, k) => k).filter((k) => all[k] !== null && xs[k] !== null && (!options.log || all[k] > 0));
  const raw = kept.map((k) => all[k]);
  return { x: kept.map((k) => xs[k]), steps: kept.map((k) => run.curves.steps[k]), raw, y: smoothed(raw, options.smoothing) };
}

/** Mean, least and largest of several runs at the steps that all of them have. */
function band(members) {
  const tables = members.map((own) => new Map(own.x.map((x, k) => [x, own.y[k]])));
  const x = members[0].x.filter((value) => tables.every((table) => table.has(value)));
  const rows = x.map((value) => tables.map((table) => table.get(value)));
  return {
    x,
    mean: rows.map((row) => row.reduce((sum, v) => sum + v, 0) / row.length),
    low: rows.map((row) => Math.min(...row)),
    high: rows.map((row) => Math.max(...row)),
  };
}

/** What one chart shows: lines with names and colours, and bands. */
function traces(metric, options) {
  const having = options.runs.filter((run) => run.curves.values && run.curves.values[metric] && run.shown);
  const found = { lines: [], bands: [] };
  for (const setting of new Set(having.map((run) => run.setting))) {
    const members = having.filter((run) => run.setting === setting);
    const own = members.map((run) => series(run, metric, options)).map((s, k) => ({ ...s, run: members[k] })).filter((s) => s.x.length);
    if (own.length > 1 && options.bands && options.axis === "steps") {
      const area = band(own);
      if (area.x.length) {
        const colour = colourOf(RUNS.content.settings.indexOf(setting));
        found.bands.push({ ...area, colour });
        found.lines.push({ x: area.x, y: area.mean, name: `mean of ${own.length} seeds`, colour });
        continue;
      }
    }
    for (const s of own) {
      if (options.smoothing) found.lines.push({ x: s.x, y: s.raw, name: null, colour: s.run.colour, faint: true });
      found.lines.push({ x: s.x, y: s.y, name: s.run.name, colour: s.run.colour });
    }
  }
  return found;
}

/** Warnings that are about a metric: their subject is a part of its name. */
function warningsOf(metric, runs) {
  const parts = metric.split("/");
  return runs.filter((run) => run.shown).flatMap((run) => run.curves.warnings.filter((w) => parts.includes(w.text.split(" ").pop())));
}

async function draw(element, metric, options, tap) {
  const B = bokeh();
  const css = getComputedStyle(document.documentElement);
  const ink = css.getPropertyValue("--soft").trim(), line = css.getPropertyValue("--line").trim();
  const found = traces(metric, options);
  const figure = B.Plotting.figure({
    height: 190, sizing_mode: "stretch_width", tools: [], toolbar_location: null, min_border: 2,
    y_axis_type: options.log ? "log" : "linear", background_fill_color: null, border_fill_color: null, outline_line_color: null,
    output_backend: "canvas",
  });
  for (const area of found.bands) {
    figure.varea(area.x, area.low, area.high, { fill_color: area.colour, fill_alpha: isDark() ? 0.28 : 0.18 });
  }
  const readable = [];
  for (const own of found.lines) {
    const source = new B.ColumnDataSource({ data: { x: own.x, y: own.y, name: own.x.map(() => own.name || "") } });
    const style = { source, line_color: own.colour, line_alpha: own.faint ? 0.25 : 1, line_width: own.faint ? 1 : 1.8 };
    const glyph = figure.line({ field: "x" }, { field: "y" }, style);
    if (!own.faint) readable.push(glyph);
    if (own.x.length < 12 && !own.faint) figure.scatter({ field: "x" }, { field: "y" }, { source, size: 5, fill_color: own.colour, line_color: null });
  }
  if (options.axis === "steps") {
    for (const warning of warningsOf(metric, options.runs)) {
      figure.add_layout(new B.BoxAnnotation({ left: warning.first - 0.5, right: warning.last + 0.5, fill_color: "#e69f00", fill_alpha: 0.14, line_color: null }));
    }
  }
  figure.add_tools(
    new B.HoverTool({ renderers: readable, mode: "vline", tooltips: [[options.axis === "steps" ? "step" : "hour", "@x{0.[000]}"], ["@name", "@y{0.[000000]e+0}"]].slice(0, 2), line_policy: "nearest" }),
    new B.PanTool({ dimensions: "width" }), new B.BoxZoomTool({ dimensions: "width" }), new B.ResetTool({}),
  );
  for (const axis of [...figure.xaxes, ...figure.yaxes]) {
    Object.assign(axis, { axis_line_color: line, major_tick_line_color: line, minor_tick_line_color: null, major_label_text_color: ink, major_label_text_font_size: "11px" });
  }
  for (const grid of figure.center.filter((part) => part.type === "Grid")) Object.assign(grid, { grid_line_color: line, grid_line_alpha: 0.7 });
  figure.x_range.range_padding = 0.02;
  if (tap && options.axis === "steps") figure.on_event("tap", (event) => tap(event.x));
  element.replaceChildren();
  return B.Plotting.show(figure, element);
}

/** A card that draws its chart once it is on the screen. */
function chartCard(metric, options, tap) {
  const plot = h("div", { class: "plot", role: "img", "aria-label": describe(metric, options) });
  const last = latest(metric, options);
  const card = h("article", { class: "card chart", "data-metric": metric }, h("h3", {}, h("span", {}, visible(metric)), h("span", { class: "num" }, last)), plot);
  plot.draw = () => draw(plot, metric, options, tap).catch((error) => plot.replaceChildren(`no chart: ${error.message}`));
  CHARTS.observer ||= new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      CHARTS.observer.unobserve(entry.target);
      CHARTS.waiting.push(entry.target);
    }
    drawWaiting();
  }, { rootMargin: "120px" });
  CHARTS.observer.observe(plot);
  return card;
}

/** Draw charts one after the other, each in a task of its own: the page answers in between. */
async function drawWaiting() {
  if (CHARTS.drawing) return;
  CHARTS.drawing = true;
  while (CHARTS.waiting.length) {
    await new Promise((resolve) => { setTimeout(resolve, 20); });
    const plot = CHARTS.waiting.shift();
    if (plot.isConnected) await plot.draw();
  }
  CHARTS.drawing = false;
}

function latest(metric, options) {
  const ends = options.runs.filter((run) => run.shown && run.curves.values && run.curves.values[metric])
    .map((run) => run.curves.values[metric].filter((v) => v !== null).pop()).filter((v) => v !== undefined);
  if (!ends.length) return "";
  return ends.length === 1 ? fmt(ends[0]) : `${fmt(Math.min(...ends))} … ${fmt(Math.max(...ends))}`;
}

function describe(metric, options) {
  const words = options.runs.filter((run) => run.shown && run.curves.values && run.curves.values[metric]).map((run) => {
    const values = run.curves.values[metric].filter((v) => v !== null);
    return `${run.name} from ${fmt(values[0])} to ${fmt(values[values.length - 1])}`;
  });
  return visible(`Curve of ${metric}: ${words.join("; ")}`);
}
