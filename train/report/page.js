"use strict";
// Strings from run folders are inserted as text nodes only, never as markup.
const values = JSON.parse(document.getElementById("values").textContent);
const packs = JSON.parse(document.getElementById("packs").textContent);
const runs = values.runs;
const byId = (id) => document.getElementById(id);
const COLORS = ["#1f77b4", "#e4761a", "#2a9d57", "#b04fb5", "#8c6d31", "#555"];
const MOST = 12; // maximum number of edges in a list
const chosen = { run: 0, graph: 0, record: 0, node: 0 };

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function card(title, ...children) {
  return make("div", { class: "card" }, make("h3", { text: title }), ...children);
}

function table(head, rows) {
  const facts = head.every((text) => !text);
  const cells = (tag, row) => make("tr", {}, ...row.map((text) => make(tag, { text })));
  const body = make("tbody", {}, ...rows.map((row) => cells("td", row)));
  return make("div", { class: "scroll" }, make("table", facts ? { class: "facts" } : {}, ...(facts ? [] : [make("thead", {}, cells("th", head))]), body));
}

function short(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function plot(parent, title, data, layout = {}) {
  const place = make("div", { class: "plot" });
  parent.append(card(title, place));
  const axis = { gridcolor: color("--line"), zerolinecolor: color("--line"), automargin: true };
  Plotly.newPlot(
    place,
    data,
    {
      ...layout,
      margin: { l: 50, r: 10, t: data.length > 1 ? 12 + 20 * data.length : 8, b: 40 },
      showlegend: data.length > 1,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: color("--text"), size: 11 },
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
      legend: { x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    },
    { displayModeBar: false },
  ).then(() => new ResizeObserver(() => place.isConnected && Plotly.Plots.resize(place)).observe(place));
}

// --- arrays -----------------------------------------------------------------------------------
const TYPES = { uint32: Uint32Array, float32: Float32Array, uint8: Uint8Array };

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function loadPlotly() {
  const code = await inflate(JSON.parse(byId("plotly").textContent));
  document.head.append(make("script", { text: new TextDecoder().decode(code) }));
}

async function unpack(text) {
  const buffer = await inflate(text);
  const end = new Uint8Array(buffer).indexOf(10);
  const index = JSON.parse(new TextDecoder().decode(buffer.slice(0, end)));
  return (name) => {
    if (!(name in index)) return null;
    const [type, offset, size] = index[name];
    return new TYPES[type](buffer, end + 1 + offset, size);
  };
}

function summed(steps) {
  const ids = new Uint32Array(steps.length);
  let total = 0;
  for (let i = 0; i < steps.length; i++) ids[i] = total += steps[i];
  return ids;
}

let arrays = []; // for each run, a function from a name to an array
const graphOf = (run) => runs[run].graphs.find((g) => g.name === names()[chosen.graph]);
const names = () => [...new Set(runs.flatMap((run) => run.graphs.map((g) => g.name)))];

// --- training ---------------------------------------------------------------------------------
function showTraining() {
  byId("title").textContent = runs.map((run) => run.name).join(" and ");
  document.title = byId("title").textContent;
  for (const run of runs) {
    for (const note of run.notes) byId("notes").append(make("li", { text: `${run.name}, left out: ${note}` }));
  }
  const panels = [
    ["Top-1", { top1: "validation", train_top1: "training" }, {}],
    ["Loss", { loss: "validation", train_loss: "training" }, {}],
    ["Edges that became real", { edges_changed: "" }, { yaxis: { type: "log" } }],
  ];
  for (const [title, lines, layout] of panels) {
    const data = [];
    runs.forEach((run, i) => {
      Object.entries(lines).forEach(([key, label], j) => {
        if (!run.curves[key]) return;
        data.push({
          x: run.curves.epoch,
          y: run.curves[key],
          name: [runs.length > 1 ? run.name : "", label].filter(Boolean).join(", "),
          mode: run.curves.epoch.length > 1 ? "lines" : "markers",
          line: { color: COLORS[i % COLORS.length], dash: j ? "dot" : "solid" },
        });
      });
    });
    if (data.length) plot(byId("curves"), title, data, { xaxis: { title: { text: "epoch" } }, ...layout });
  }
  for (const run of runs) {
    const rows = [...run.cost, ...run.about];
    byId("about").append(card(run.name, table(["", ""], rows)));
  }
}

// --- wiring -----------------------------------------------------------------------------------
function epochsOf(run) {
  const graph = graphOf(run);
  return graph && graph.history ? graph.history.epochs : [];
}

// Epochs at which any run recorded the graph; the slider selects one of them.
const allEpochs = () => [...new Set(runs.flatMap((_, i) => epochsOf(i)))].sort((a, b) => a - b);

// Index of the last record of a run up to the chosen epoch, -1 if there is none.
function recordOf(run) {
  const now = allEpochs()[chosen.record];
  return epochsOf(run).findLastIndex((epoch) => epoch <= now);
}

function when(run) {
  const at = recordOf(run);
  return at < 0 ? "final" : `epoch ${short(epochsOf(run)[at])}`;
}

function label(block, i) {
  const size = block.past - block.first;
  return `${i} ${block.role}, ${size.toLocaleString("en")}`;
}

function showWiring() {
  const most = allEpochs().length;
  const slider = byId("record");
  slider.max = Math.max(most - 1, 0);
  slider.disabled = most < 2;
  chosen.record = Math.min(chosen.record, Math.max(most - 1, 0));
  slider.value = chosen.record;
  byId("measures").replaceChildren();
  byId("plots").replaceChildren();
  runs.forEach((run, i) => {
    const graph = graphOf(i);
    if (!graph) return;
    const rows = graph.statistics.map(([name, value, mean, z]) => [name, short(value), short(mean), short(z)]);
    byId("measures").append(
      card(
        `${run.name}, final: ${graph.nodes.toLocaleString("en")} nodes, ${graph.edges.toLocaleString("en")} edges`,
        table(["", "learned", "random", "z"], rows),
      ),
    );
    const dead = graph.dead;
    byId("measures").append(
      card(
        `${run.name}, final: nodes without effect`,
        table(
          ["", "nodes"],
          [
            ["dead: no real edge out", short(dead.no_edge_out)],
            ["unreachable: edges out, but no path to an output", short(dead.no_path_to_output)],
            ["constant: no edge in", short(dead.no_edge_in)],
            ["constant: edges in, but no path from an input", short(dead.no_path_from_input)],
          ],
        ),
        table(["shortest path from input to output, edges", "pairs"], graph.paths.map(([n, c]) => [n < 0 ? "no path" : String(n), short(c)])),
      ),
    );
  });
  const degrees = { in: [], out: [] };
  const weights = [];
  const moves = [];
  const ages = [];
  runs.forEach((run, i) => {
    const graph = graphOf(i);
    if (!graph) return;
    const line = { color: COLORS[i % COLORS.length] };
    for (const kind of ["in", "out"]) {
      const counts = graph.degrees[kind];
      let left = graph.nodes;
      const y = counts.map((n) => { const share = left / graph.nodes; left -= n; return share; });
      degrees[kind].push({ x: counts.map((_, d) => d), y, name: run.name, mode: "lines", line });
    }
    weights.push({ x: graph.weights[1], y: graph.weights[0], name: run.name, mode: "lines", line: { ...line, shape: "hvh" } });
    if (!graph.history) return;
    const h = graph.history;
    moves.push({ x: h.epochs.slice(1), y: h.births.slice(1), name: `${run.name}, births`, line });
    moves.push({ x: h.epochs.slice(1), y: h.deaths.slice(1), name: `${run.name}, deaths`, line: { ...line, dash: "dot" } });
    ages.push({ x: h.ages[1], y: h.ages[0], name: run.name, type: "bar", marker: line });
  });
  for (const kind of ["in", "out"]) {
    if (!degrees[kind].length) continue;
    plot(byId("plots"), `Share of nodes with at least that many edges ${kind}`, degrees[kind], {
      xaxis: { title: { text: `edges ${kind}` } },
      yaxis: { type: "log" },
    });
  }
  if (weights.length) plot(byId("plots"), "Weights of real edges", weights, { xaxis: { title: { text: "weight" } } });
  if (moves.length) {
    plot(byId("plots"), "Births and deaths of edges", moves, { xaxis: { title: { text: "epoch" } } });
    plot(byId("plots"), "Age of the final real edges", ages, { xaxis: { title: { text: "epochs" } } });
  }
  showRecord();
}

function showRecord() {
  const place = byId("blocks");
  place.replaceChildren();
  runs.forEach((run, i) => {
    const graph = graphOf(i);
    if (!graph) return;
    const at = recordOf(i);
    const expected = new Map(graph.pairs.map(([u, v, , , mean]) => [`${u} ${v}`, mean]));
    const final = new Map(graph.pairs.map(([u, v, , edges]) => [`${u} ${v}`, edges]));
    const labels = graph.blocks.map(label);
    const z = [];
    const text = [];
    for (let v = 0; v < graph.blocks.length; v++) {
      z.push([]);
      text.push([]);
      for (let u = 0; u < graph.blocks.length; u++) {
        const key = `${u} ${v}`;
        const edges = at < 0 ? final.get(key) : graph.history.pairs[at][u][v];
        const known = expected.has(key);
        z[v].push(known && edges ? Math.max(-2, Math.min(2, Math.log2(edges / expected.get(key)))) : known ? -2 : null);
        text[v].push(known ? edges.toLocaleString("en") : "");
      }
    }
    const scale = { tickvals: [-2, -1, 0, 1, 2], ticktext: ["¼", "½", "random", "2×", "4×"], thickness: 10 };
    plot(
      place,
      `${run.name}, ${when(i)}`,
      [{ type: "heatmap", x: labels, y: labels, z, text, texttemplate: "%{text}", hoverinfo: "x+y+text", zmin: -2, zmax: 2, colorscale: [[0, "#4393c3"], [0.5, "#e8e8e8"], [1, "#d6604d"]], colorbar: scale }],
      {
        xaxis: { title: { text: "from" }, type: "category" },
        yaxis: { title: { text: "into" }, type: "category", autorange: "reversed" },
      },
    );
  });
  const now = allEpochs()[chosen.record];
  byId("epoch").textContent = now === undefined ? "final" : `epoch ${short(now)}`;
  showNode();
}

// --- a node -----------------------------------------------------------------------------------
const caches = new Map();

function edgesAt(run, graph) {
  // Return the real edges at the chosen record; their weights are known only for the last one.
  const get = arrays[run];
  const last = epochsOf(run).length - 1;
  const at = recordOf(run);
  const key = `${run} ${graph.key} ${at}`;
  if (caches.has(key)) return caches.get(key);
  let edges;
  if (last < 0 || at === last) {
    const ins = get(`${graph.key}.in`);
    const source = get(`${graph.key}.source`);
    const target = new Uint32Array(source.length);
    for (let v = 0, e = 0; v < ins.length; v++) for (let n = ins[v]; n > 0; n--) target[e++] = v;
    edges = { source, target, weight: get(`${graph.key}.weight`) };
  } else {
    const everSource = get(`${graph.key}.ever.source`);
    const everTarget = summed(get(`${graph.key}.ever.target`));
    const real = new Uint8Array(everSource.length);
    for (let t = 0; t <= at; t++) {
      for (const e of summed(get(`${graph.key}.died.${t}`))) real[e] = 0;
      for (const e of summed(get(`${graph.key}.born.${t}`))) real[e] = 1;
    }
    const ids = [...real.keys()].filter((e) => real[e]);
    edges = { source: ids.map((e) => everSource[e]), target: ids.map((e) => everTarget[e]), weight: null };
  }
  caches.clear();
  caches.set(key, edges);
  return edges;
}

function edgeList(title, ends, total) {
  const list = make("ul", { class: "edges" });
  for (const [node, weight] of ends) {
    const go = make("button", { type: "button", text: `node ${node}`, onclick: () => choose(node) });
    list.append(make("li", {}, go, make("span", { text: weight === null ? "" : short(weight) })));
  }
  return card(`${title}: ${total.toLocaleString("en")}`, list);
}

function showNode() {
  const place = byId("details");
  place.replaceChildren();
  const graph = graphOf(chosen.run);
  if (!graph || !arrays.length) return;
  chosen.node = Math.max(0, Math.min(graph.nodes - 1, chosen.node));
  const node = chosen.node;
  byId("node").max = graph.nodes - 1;
  byId("node").value = node;
  const at = graph.blocks.findIndex((block) => node >= block.first && node < block.past);
  byId("block").value = at;
  const get = arrays[chosen.run];
  const edges = edgesAt(chosen.run, graph);
  const into = [];
  const out = [];
  for (let e = 0; e < edges.source.length; e++) {
    const weight = edges.weight ? edges.weight[e] : null;
    if (edges.target[e] === node) into.push([edges.source[e], weight]);
    if (edges.source[e] === node) out.push([edges.target[e], weight]);
  }
  const strongest = (list) => list.sort((a, b) => Math.abs(b[1] || 0) - Math.abs(a[1] || 0)).slice(0, MOST);
  const facts = [
    ["block", label(graph.blocks[at], at)],
    ["edges in", short(into.length)],
    ["edges out", short(out.length)],
    ["betweenness, final", short(get(`${graph.key}.betweenness`)[node])],
  ];
  place.append(card(`Node ${node} of ${graph.name}, ${when(chosen.run)}`, table(["", ""], facts)));
  const filters = graph.filters && get(graph.filters);
  if (filters) {
    const filter = [...filters.slice(9 * node, 9 * node + 9)];
    const largest = Math.max(...filter.map(Math.abs)) || 1;
    const rows = [0, 3, 6].map((i) =>
      make("tr", {}, ...filter.slice(i, i + 3).map((w) => {
        const cell = make("td", { text: w.toFixed(2) });
        const part = Math.round((100 * Math.abs(w)) / largest);
        cell.style.background = `color-mix(in srgb, ${w > 0 ? "#d6604d" : "#4393c3"} ${Math.round(part * 0.7)}%, transparent)`;
        return cell;
      })),
    );
    const none = filter.every((w) => w === 0);
    place.append(card("3x3 filter, final", none ? make("p", { class: "hint", text: "This node has none." }) : make("table", { class: "filter" }, make("tbody", {}, ...rows))));
  }
  const maps = graph.maps && get(graph.maps);
  const image = runs[chosen.run].image;
  if (maps) {
    const side = Math.round(Math.sqrt(maps.length / graph.nodes));
    const canvas = make("canvas", { width: side, height: side, role: "img", "aria-label": `Feature map of node ${node}` });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(side, side);
    for (let i = 0; i < side * side; i++) {
      const v = maps[node * side * side + i] - 128;
      const fade = 255 - Math.min(255, 2 * Math.abs(v));
      pixels.data.set(v > 0 ? [255, fade, fade, 255] : [fade, fade, 255, 255], 4 * i);
    }
    context.putImageData(pixels, 0, 0);
    const sample = make("img", { class: "sample", alt: `An image of class ${image.class}`, src: `data:image/png;base64,${image.png}` });
    place.append(card("Feature map of this image, final", canvas, " ", sample, make("p", { class: "hint", text: `Class: ${image.class}. Red is above 0, blue below.` })));
  }
  const title = edges.weight ? "Strongest edges" : "Edges (weights are known at the end only)";
  place.append(edgeList(`${title} in`, strongest(into), into.length));
  place.append(edgeList(`${title} out`, strongest(out), out.length));
}

function choose(node) {
  chosen.node = node;
  showNode();
}

// --- comparison -------------------------------------------------------------------------------
function showComparison() {
  if (!values.compared.length) return;
  byId("comparison").hidden = false;
  const rows = values.compared.map((row) => [row.name, ...[...row.jaccard, ...row.matched].map(short)]);
  byId("compared").append(table(["graph", "in both", "random", "z", "renumbered", "random", "z"], rows));
}

// --- controls ---------------------------------------------------------------------------------
function fillGraphs() {
  names().forEach((name, i) => byId("graph").append(make("option", { value: i, text: name })));
  runs.forEach((run, i) => byId("run").append(make("option", { value: i, text: run.name })));
}

function fillBlocks() {
  const graph = graphOf(chosen.run);
  byId("block").replaceChildren();
  if (graph) graph.blocks.forEach((b, i) => byId("block").append(make("option", { value: i, text: label(b, i) })));
}

function busiest() {
  const graph = graphOf(chosen.run);
  if (!graph) return 0;
  const { source, target } = edgesAt(chosen.run, graph);
  const counts = new Uint32Array(graph.nodes);
  for (let e = 0; e < source.length; e++) { counts[source[e]]++; counts[target[e]]++; }
  return counts.indexOf(Math.max(...counts));
}

function listen() {
  byId("graph").addEventListener("change", (event) => {
    chosen.graph = Number(event.target.value);
    chosen.record = Infinity;
    fillBlocks();
    showWiring();
  });
  byId("record").addEventListener("input", (event) => { chosen.record = Number(event.target.value); showRecord(); });
  byId("run").addEventListener("change", (event) => { chosen.run = Number(event.target.value); fillBlocks(); showNode(); });
  byId("block").addEventListener("change", (event) => choose(graphOf(chosen.run).blocks[event.target.value].first));
  byId("node").addEventListener("change", (event) => choose(Math.floor(Number(event.target.value)) || 0));
  byId("previous").addEventListener("click", () => choose(chosen.node - 1));
  byId("next").addEventListener("click", () => choose(chosen.node + 1));
  byId("hub").addEventListener("click", () => choose(busiest()));
}

async function start() {
  if (!("DecompressionStream" in window)) {
    byId("notes").append(make("li", { text: "This page requires a browser from 2023 or later." }));
    return;
  }
  await loadPlotly();
  showTraining();
  if (!names().length) {
    byId("wiring").hidden = byId("explorer").hidden = true;
    document.body.dataset.ready = "yes";
    return;
  }
  arrays = await Promise.all(packs.map(unpack));
  fillGraphs();
  fillBlocks();
  listen();
  showComparison();
  chosen.record = Infinity;
  showWiring();
  document.body.dataset.ready = "yes";
}

start();
