// The curves: one chart a metric, drawn when it is scrolled to. A cursor, a zoom, a smoothing and an
// axis are the same in all of them. Runs of one arm (seeds) are thin lines under their mean.
"use strict";

const COLOURS = ["#1867c0", "#d65d0e", "#2a9d5c", "#803caa", "#b3261e", "#0e8a9a", "#8a6d00", "#57606a"];
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const css = (name) => style(`--${name}`);

/** The mean of the neighbours of each point, over `width` points, fewer at the ends. */
function smooth(values, width) {
  const half = (width - 1) / 2;
  return values.map((_, i) => {
    const part = values.slice(Math.max(0, i - half), i + half + 1);
    return part.reduce((sum, v) => sum + v, 0) / part.length;
  });
}

/** The mean of several curves at each step that all have, with its 95% interval where t, the
    quantile for so many curves, is known. */
function together(curves, t) {
  const maps = curves.map(([steps, values]) => new Map(steps.map((s, i) => [s, values[i]])));
  const steps = curves[0][0].filter((s) => maps.every((m) => m.has(s)));
  const columns = steps.map((s) => maps.map((m) => m.get(s)));
  const n = curves.length;
  const mean = columns.map((c) => c.reduce((sum, v) => sum + v, 0) / n);
  if (!t) return { steps, mean };
  const half = columns.map((c, i) => t * Math.sqrt(c.reduce((sum, v) => sum + (v - mean[i]) ** 2, 0) / (n - 1) / n));
  return { steps, mean, low: mean.map((m, i) => m - half[i]), high: mean.map((m, i) => m + half[i]) };
}

class Curves {
  constructor(root, data, viewer) {
    this.data = data;
    this.viewer = viewer;
    this.charts = [];
    this.range = null;
    this.seen = new IntersectionObserver((entries) => this.appear(entries), { rootMargin: "300px" });
    this.build(root);
    const redraw = () => this.redraw();
    for (const id of ["smooth", "logarithmic", "difference"]) at(id)?.addEventListener("input", redraw);
    at("whole").addEventListener("click", () => this.zoom(null));
    at("smooth").closest("form").addEventListener("submit", (event) => event.preventDefault());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  }

  get arms() {
    return this.data.arms.map((name, i) => ({ name, colour: COLOURS[i % COLOURS.length], runs: this.data.runs.filter((run) => run.arm === name) }));
  }

  build(root) {
    const names = [...new Set(this.data.runs.flatMap((run) => Object.keys(run.series)))].filter((name) => !/_(low|high)$/.test(name) || !names_have(this.data, name));
    const docOf = (name) => this.data.metrics.find((doc) => new RegExp(doc.pattern).test(name));
    const sections = new Map();
    for (const doc of this.data.metrics) sections.set(doc.section, []);
    for (const name of names) {
      const section = docOf(name)?.section || "Others";
      if (!sections.has(section)) sections.set(section, []);
      sections.get(section).push(name);
    }
    const rest = "Every kind of run";
    const order = [...sections.keys()].filter((name) => name !== rest).concat(rest);
    if (this.data.runs.length > 1) root.append(this.legend());
    for (const section of order) {
      const inside = sections.get(section) || [];
      if (!inside.length) continue;
      root.append(element("h3", { text: section }));
      const grid = element("div", { class: "charts" });
      for (const name of inside) grid.append(this.chart(name, docOf(name)));
      root.append(grid);
    }
    if (!names.length) root.append(element("p", { text: "Nothing has been logged yet." }));
    this.maps(at("group-charts"), "groups", "No groups.jsonl: how many samples of each group were right is not logged.");
    this.maps(at("layer-charts"), "layers", "The updates of single layers are not logged.");
  }

  legend() {
    const legend = element("div", { class: "legend" });
    for (const { name, colour, runs } of this.arms) {
      const line = element("i");
      line.style.background = colour;
      legend.append(element("span", {}, line, `${name} (n = ${runs.length})`));
    }
    const banded = this.arms.some(({ runs }) => this.data.t[runs.length]);
    if (this.data.arms.length < this.data.runs.length) legend.append(element("span", { text: `thin: a seed, thick: the mean${banded ? ", band: its 95% t interval over seeds" : ""}` }));
    return legend;
  }

  chart(name, doc) {
    const value = element("output");
    const title = element("div", { class: "name", title: doc ? `${doc.what}. ${doc.expect ? `Expect: ${doc.expect}` : ""}` : name }, element("span", { text: name }), value);
    const plot = element("div", { class: "plot" });
    const cursor = element("div", { class: "cursor" });
    const box = element("div", { class: "chart", "data-metric": name }, title, plot, cursor);
    const chart = { name, box, plot, cursor, value, draw: () => this.drawCurve(chart) };
    return this.add(chart);
  }

  add(chart) {
    chart.box.chart = chart;
    this.charts.push(chart);
    this.seen.observe(chart.box);
    return chart.box;
  }

  appear(entries) {
    for (const { isIntersecting, target } of entries) {
      target.chart.visible = isIntersecting;
      if (isIntersecting && !target.chart.drawn) target.chart.draw();
    }
  }

  redraw() {
    const width = Number(at("smooth").value);
    at("smoothed").textContent = width === 1 ? "1 step" : `${width} steps`;
    for (const chart of this.charts) {
      chart.drawn = false;
      if (chart.visible) chart.draw();
    }
  }

  traces(name) {
    const width = Number(at("smooth").value);
    const drawn = [];
    const base = at("difference")?.checked ? this.curveOf(this.arms[0], name) : null;
    for (const arm of this.arms) {
      const curve = this.curveOf(arm, name);
      if (!curve) continue;
      const { steps, mean, low, high } = base ? minus(curve, base) : curve;
      const colour = arm.colour;
      if (arm.runs.length > 1 && !base) {
        if (low) drawn.push({ x: [...steps, ...[...steps].reverse()], y: [...high, ...[...low].reverse()], fill: "toself", fillcolor: colour + "22", line: { width: 0 }, hoverinfo: "skip", mode: "lines" });
        for (const run of arm.runs) if (run.series[name]) drawn.push({ x: run.series[name][0], y: run.series[name][1], line: { width: 0.7, color: colour }, opacity: 0.5, hoverinfo: "skip", mode: "lines" });
      }
      const few = steps.length < 30;
      if (width > 1 && !few) drawn.push({ x: steps, y: mean, line: { width: 1, color: colour }, opacity: 0.3, hoverinfo: "skip", mode: "lines" });
      const trace = { x: steps, y: few ? mean : smooth(mean, width), name: arm.name, mode: few ? "lines+markers" : "lines", line: { width: arm.runs.length > 1 ? 2.5 : 1.8, color: colour }, marker: { size: 5 } };
      const error = arm.runs.length === 1 && !base ? interval(arm.runs[0], name) : null;
      if (error) trace.error_y = { type: "data", symmetric: false, thickness: 1, width: 2, ...error };
      drawn.push(trace);
    }
    return drawn;
  }

  curveOf(arm, name) {
    const curves = arm.runs.filter((run) => run.series[name]).map((run) => run.series[name]);
    return curves.length ? together(curves, this.data.t[curves.length]) : null;
  }

  layout(extra = {}) {
    const axis = { gridcolor: css("line"), zerolinecolor: css("line"), linecolor: css("line") };
    return {
      margin: { l: 48, r: 8, t: 6, b: 24 }, showlegend: false, hovermode: "x", dragmode: "zoom",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { size: 11, color: css("faint") },
      xaxis: { ...axis, ...(this.range ? { range: this.range } : {}) }, yaxis: { ...axis, fixedrange: true }, ...extra,
    };
  }

  drawCurve(chart) {
    const traces = this.traces(chart.name);
    const layout = this.layout();
    const positive = traces.every((t) => t.y.every((y) => y >= 0));
    const share = positive && traces.every((t) => t.y.every((y) => y <= 1));
    if (at("logarithmic").checked && positive) layout.yaxis.type = "log";
    else if (share) layout.yaxis.rangemode = "tozero";
    this.plot(chart, traces, layout);
  }

  plot(chart, traces, layout) {
    Plotly.react(chart.plot, traces, layout, { displayModeBar: false, responsive: true });
    chart.drawn = true;
    if (chart.listens) return;
    chart.listens = true;
    chart.plot.on("plotly_hover", (event) => this.point(event.points[0].x));
    chart.plot.on("plotly_unhover", () => this.point(null));
    chart.plot.on("plotly_click", (event) => this.viewer.go({ step: Math.round(event.points[0].x), problem: 0, sample: null }));
    chart.plot.on("plotly_click", () => at("rollouts").scrollIntoView());
    chart.plot.on("plotly_relayout", (change) => this.relaid(change));
  }

  relaid(change) {
    if ("xaxis.range[0]" in change) this.zoom([change["xaxis.range[0]"], change["xaxis.range[1]"]]);
    else if (change["xaxis.autorange"]) this.zoom(null);
  }

  zoom(range) {
    if (JSON.stringify(range) === JSON.stringify(this.range)) return;
    this.range = range;
    this.redraw();
  }

  /** The one cursor, in all charts that are drawn. */
  point(step) {
    for (const chart of this.charts) {
      const { plot, cursor, value } = chart;
      const layout = chart.drawn && plot._fullLayout;
      cursor.style.display = step === null || !layout ? "none" : "block";
      if (value) value.textContent = step === null ? "" : this.reading(chart.name, step);
      if (step === null || !layout) continue;
      const axis = layout.xaxis;
      cursor.style.left = `${plot.offsetLeft + axis._offset + axis.d2p(step)}px`;
      cursor.style.top = `${plot.offsetTop + layout.yaxis._offset}px`;
      cursor.style.height = `${layout.yaxis._length}px`;
    }
  }

  reading(name, step) {
    const words = this.data.runs.map((run) => {
      const [steps, values] = run.series[name] || [[], []];
      const index = steps.indexOf(step);
      return index < 0 ? "–" : Number(values[index].toPrecision(4)).toString();
    });
    return `step ${step}: ${words.join(" | ")}`;
  }

  /** Heat maps of each run: groups by how many samples were right, layers by their updates. */
  maps(root, what, nothing) {
    for (const run of this.data.runs) {
      const found = what === "groups" ? groupMap(run) : layerMaps(run);
      for (const map of found) {
        const title = element("div", { class: "name" }, element("span", { text: this.data.runs.length > 1 ? `${run.name}: ${map.title}` : map.title }), element("output"));
        const plot = element("div", { class: "plot" });
        plot.style.height = `${Math.max(200, 40 + 12 * map.y.length)}px`;
        const cursor = element("div", { class: "cursor" });
        const chart = { box: element("div", { class: "chart" }, title, plot, cursor), plot, cursor };
        chart.draw = () => this.plot(chart, [{ type: "heatmap", x: map.x, y: map.y, z: map.z, colorscale: "Viridis", hovertemplate: map.hover, colorbar: { thickness: 8, outlinewidth: 0 } }], this.layout({ margin: { l: 90, r: 8, t: 6, b: 24 }, hovermode: "closest" }));
        root.append(this.add(chart));
      }
    }
    if (!root.children.length) root.append(element("p", { class: "hint", text: nothing }));
  }
}

function names_have(data, name) {
  const plain = name.replace(/_(low|high)$/, "");
  return data.runs.some((run) => plain in run.series && `${plain}_low` in run.series);
}

function interval(run, name) {
  const low = run.series[`${name}_low`];
  const high = run.series[`${name}_high`];
  if (!low || !high) return null;
  const values = run.series[name][1];
  return { array: high[1].map((v, i) => v - values[i]), arrayminus: low[1].map((v, i) => values[i] - v) };
}

function minus(curve, base) {
  const other = new Map(base.steps.map((s, i) => [s, base.mean[i]]));
  const kept = curve.steps.map((s, i) => [s, curve.mean[i] - other.get(s)]).filter(([s]) => other.has(s));
  return { steps: kept.map((p) => p[0]), mean: kept.map((p) => p[1]) };
}

function groupMap(run) {
  const { samples, steps, counts } = run.groups;
  if (!steps) return [];
  return [{ title: `groups by how many of ${samples} samples were right`, x: steps, y: counts.map((_, k) => `${k} right`), z: counts, hover: "step %{x}, %{y}: %{z} groups<extra></extra>" }];
}

function layerMaps(run) {
  const titles = { update_ratio: "log10 of ‖change‖ / ‖weights‖", grad_norm: "log10 of ‖gradient‖" };
  return Object.entries(run.layers).map(([kind, { parts, steps, values }]) => ({
    title: titles[kind], x: steps, y: parts.map((part) => part.replace("layers.", "layer ")),
    z: values.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null))), hover: "step %{x}, %{y}: 10^%{z:.2f}<extra></extra>",
  }));
}

async function main() {
  const data = JSON.parse(await unpacked("bulk"));
  data.runs.forEach(openEpisodes);
  const viewer = new Viewer(at("viewer"), data.runs);
  await new Promise((done) => setTimeout(done)); // what is there is seen before plotly is read
  const nonce = document.currentScript?.nonce || document.querySelector("script[nonce]").nonce;
  const library = element("script");
  library.nonce = nonce;
  library.textContent = await unpacked("plotly");
  document.head.append(library);
  window.page = { viewer, curves: new Curves(at("charts"), data, viewer) };
  viewer.follow();
  if (/^#\w+$/.test(location.hash)) at(location.hash.slice(1))?.scrollIntoView(); // it has grown since
  document.documentElement.dataset.ready = "true";
}

main();
