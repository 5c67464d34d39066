// The explorer without a kernel. DATA, written by explorer.py, holds for each score and direction a table: a row a
// choice, what is said of it, and the first row that keeps each layer. Here a row is found, told and drawn; nothing
// is computed that isn't there.
const $ = id => document.getElementById(id);
const choice = { ...DATA.start };
const [UNIT, UNIT_NAME] = DATA.unit;
const STEPS = Number($("slider").max);
const score = () => DATA.scores[choice.score];
const table = () => score()[choice.direction];
const count = (values, test) => values.filter(test).length;

// --- finding a row ---------------------------------------------------------------------------------------
// A layer is kept when its score is at the threshold or beyond it; row 0 keeps none.
function row() {
  return count(table().cut, choice.direction === "high" ? v => v >= choice.threshold : v => v <= choice.threshold);
}
function choose(r) {
  choice.threshold = r > 0 ? table().cut[r - 1] : score().steps.at(choice.direction === "high" ? -1 : 0);
}
const sizeBounds = () => [table().bytes[0], table().bytes.at(-1)];
const sizeRow = bytes => Math.max(0, count(table().bytes, size => size <= bytes) - 1);

// --- telling it ------------------------------------------------------------------------------------------
function facts(r) {
  const known = Object.entries(table().facts).map(([name, values]) => [name, values[r]]);
  return { ...DATA.facts, ...Object.fromEntries(known.filter(([, value]) => value !== null)) };
}
// The parts of a sentence whose numbers are known, as explorer.py's `say`.
function say(what, known) {
  const whole = DATA.says[what].filter(part => [...part.matchAll(/{(\w+)}/g)].every(([, name]) => name in known));
  return whole.join("").replace(/{(\w+)}/g, (mark, name) => known[name]);
}
const short = value => Number(value).toPrecision(4).replace(/\.?0+(e|$)/, "$1");

function tell() {
  const known = facts(row());
  $("histogram-title").textContent = "Layers by " + score().axis;
  $("answer").textContent = say("line", known);
  $("standing").textContent = say("comparison", known);
  $("notes").textContent = [say("ties", known), DATA.notes].filter(Boolean).join(" ");
  $("parameters").textContent = parameters();
}
// The choice as notebook 02's parameters and as a command; the threshold in full: it may be a layer's own score.
const parameters = () => {
  const known = { ...choice, value: choice.threshold };
  return DATA.make.replace(/{(score|direction|value)}/g, (mark, name) => known[name]);
};
function nameSpectrum(place) {
  const spectrum = DATA.spectra && DATA.spectra[place];
  $("spectrum-title").textContent = spectrum ? spectrum.title
    : `${DATA.layers[place].name}: no spectrum in this file`;
}

// --- drawing it: chart -> named tables -> rows -----------------------------------------------------------
function tables() {
  const r = row(), { cut, bytes, kl, row: first } = table(), { bin, edges, values } = score();
  const layers = DATA.layers.map((layer, i) => {
    const state = layer.fixed ?? (first[i] > cut.length ? NO_SCORE : first[i] <= r ? "16-bit" : DATA.rest);
    const own = values[i] === null ? {} : { [score().short + " (the score)"]: values[i] };
    const tip = Object.entries(layer.tip).filter(([title]) => title !== score().short);
    return { label: layer.label, depth: layer.depth, place: i, state, left: edges[bin[i]], right: edges[bin[i] + 1],
             tip: { title: layer.name, "stored in": state, ...own, ...Object.fromEntries(tip) } };
  });
  return {
    histogram: { layers: layers.filter(layer => bin[layer.place] >= 0), cut: [{ threshold: choice.threshold }] },
    map: { layers },
    frontier: DATA.band && { band: DATA.band, point: [{ size: bytes[r] / UNIT, kl: kl[r] }],
                             curve: bytes.map((size, i) => ({ size: size / UNIT, kl: kl[i] })) },
  };
}
function spectrumTables(place) {
  const s = DATA.spectra && DATA.spectra[place];
  if (!s) return { bars: [], fit: [] };
  const bars = s.density.map((density, i) => ({ left: s.edges[i], right: s.edges[i + 1], density, floor: s.floor }));
  return { bars: bars.filter(bar => bar.density > 0), fit: s.fit };
}

const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const ink = dark ? "#d0d0d0" : "#444", lines = dark ? "#3a3f43" : "#e6e6e6", blue = dark ? "#56B4E9" : "#0072B2";
const KEPT = DATA.colours.kept, FAILED = "16-bit, analysis failed", NO_SCORE = `${DATA.rest}, no score`;
const COLOURS = { "16-bit": KEPT, [DATA.rest]: "#A9C6DA", [NO_SCORE]: "#8A8A8A", [FAILED]: "transparent" };
const CONFIG = {
  background: null, view: { stroke: null }, font: "system-ui, sans-serif",
  axis: { labelColor: ink, titleColor: ink, gridColor: lines, domainColor: ink, tickColor: ink, labelFontSize: 11,
          titleFontWeight: "normal" },
  legend: { labelColor: ink, titleColor: ink },
};
// Vega writes 0.000001; "1e−6" can be read.
const LABELS = "datum.label !== '' && datum.value !== 0 && (abs(datum.value) < 0.001 || abs(datum.value) >= 1e5)" +
  " ? replace(format(datum.value, '~e'), 'e-', 'e−') : datum.label";
const from = (name, rest) => ({ data: { name }, ...rest });
const field = (name, rest = {}) => ({ field: name, type: "quantitative", ...rest });
const coloured = (states, colour, rest) =>
  ({ field: "state", type: "nominal", scale: { domain: states, range: states.map(colour) }, ...rest });
const chart = (height, rest) => ({ width: "container", height, autosize: { type: "fit", contains: "padding" }, ...rest });

const CHARTS = {
  histogram() {
    const scale = { domain: score().domain, nice: false, type: score().scale, zero: false };
    const x = { title: null, scale, axis: { labelExpr: LABELS } };
    return chart(230, { layer: [
      from("layers", {
        transform: [
          { aggregate: [{ op: "count", as: "count" }], groupby: ["left", "right", "state"] },
          { stack: "count", groupby: ["left"], sort: [{ field: "state", order: "descending" }], as: ["low", "high"] },
        ],
        mark: "rect",
        encoding: {
          x: field("left", x), x2: { field: "right" }, y2: { field: "high" },
          y: field("low", { title: "layers", scale: { domain: [0, score().top] },
                            axis: { tickMinStep: 1, tickCount: 5 } }),
          color: coloured(["16-bit", DATA.rest], state => COLOURS[state], { legend: null }),
          tooltip: [field("count", { title: "layers" }), { field: "state", type: "nominal" }],
        },
      }),
      from("cut", { mark: { type: "rule", strokeWidth: 2, color: ink }, encoding: { x: field("threshold", x) } }),
    ] });
  },
  frontier() {
    const x = field("size", { title: `model size (${UNIT_NAME})`, scale: { zero: false, nice: false } });
    const y = (name, rest) => field(name, { title: "predicted KL (nats a token)", ...rest });
    const tooltip = [field("size", { format: ".3~r", title: UNIT_NAME }), y("kl", { format: ".4g", title: "KL" })];
    return chart(230, { layer: [
      from("band", { mark: { type: "area", color: "#9A9A9A", opacity: 0.45 },
                     encoding: { x, y: y("low", { scale: { domainMin: 0 } }), y2: { field: "high" } } }),
      from("band", { mark: { type: "line", strokeDash: [5, 4], strokeWidth: 1.8, color: ink },
                     encoding: { x, y: y("optimum") } }),
      from("curve", { mark: { type: "line", color: blue, strokeWidth: 2.2 }, encoding: { x, y: y("kl") } }),
      from("point", { mark: { type: "point", filled: true, size: 130, color: KEPT, opacity: 1 },
                      encoding: { x, y: y("kl"), tooltip } }),
    ] });
  },
  map() {
    const free = i => DATA.layers[i].fixed === null;
    const unscored = Object.values(DATA.scores).some(one => one.high.row.some((r, i) => r > one.high.cut.length && free(i)));
    const failed = DATA.layers.some(layer => layer.fixed === FAILED);
    const states = ["16-bit", DATA.rest, ...(unscored ? [NO_SCORE] : []), ...(failed ? [FAILED] : [])];
    const legend = { title: null, orient: "top" };  // one legend: fill and outline share field and title
    return chart(70 + 24 * new Set(DATA.layers.map(layer => layer.label)).size, from("layers", {
      mark: { type: "rect", cursor: "pointer", tooltip: { expr: "datum.tip" },
              strokeWidth: { expr: "indexof(datum.state, 'failed') < 0 ? 0.5 : 2.5" } },
      encoding: {
        x: { field: "depth", type: "ordinal", title: "depth (block)",
             axis: { labelOverlap: true, labelAngle: 0, ticks: false } },
        y: { field: "label", type: "nominal", title: null, sort: null, axis: { ticks: false, domain: false } },
        fill: coloured(states, state => COLOURS[state], { legend }),
        stroke: coloured(states, state => state === FAILED ? KEPT : "white", { legend }),
      },
    }));
  },
  spectrum() {
    const axis = { format: "~g", tickCount: 5, grid: false, labelExpr: LABELS };
    const log = (name, title) => field(name, { title, axis, scale: { type: "log", nice: false } });
    return chart(230, { layer: [
      from("bars", { mark: { type: "rect", color: DATA.colours.spectrum, opacity: 0.75 },
                     encoding: { x: log("left", "eigenvalue λ = σ²"), x2: { field: "right" },
                                 y: log("floor", "density"), y2: { field: "density" } } }),
      from("fit", { mark: { type: "line", color: DATA.colours.fit, strokeWidth: 2.5 },
                    encoding: { x: log("x", "eigenvalue λ = σ²"), y: log("density", "density") } }),
    ] });
  },
};
const views = {};
// Charts are born with their data: Vega warns of empty domains otherwise.
async function embed(name, datasets) {
  const options = { actions: false, config: CONFIG, renderer: "canvas", tooltip: { theme: dark ? "dark" : "light" } };
  if (views[name]) views[name].finalize();
  views[name] = (await vegaEmbed("#" + name, { ...CHARTS[name](), datasets }, options)).view;
}
function feed(name, datasets) {
  if (!views[name] || !datasets) return;
  for (const [part, rows] of Object.entries(datasets)) views[name].data(part, rows);
  views[name].runAsync();
}

// --- controls --------------------------------------------------------------------------------------------
const refuse = text => { $("refusal").textContent = text; };
const toSlider = value => Math.max(0, score().steps.findIndex(step => step >= value));
// Bring every control but the one that a person is moving in line with the choice, then tell and draw it.
function show(moved) {
  const size = table().bytes[row()], [least, most] = sizeBounds();
  if (moved !== "slider") $("slider").value = toSlider(choice.threshold);
  if (moved !== "number") $("number").value = short(choice.threshold);
  if (moved !== "size") $("size").value = Math.round(STEPS * (size - least) / (most - least || 1));
  if (moved !== "size-number") $("size-number").value = (size / UNIT).toFixed(UNIT === 1e9 ? 3 : 2);
  refuse("");
  tell();
  for (const [name, datasets] of Object.entries(tables())) feed(name, datasets);
}
// Another score or direction protects as many layers as before; only the histogram has another axis then.
let redrawing = Promise.resolve();
function setScore(name, direction) {
  const layers = facts(row()).layers;
  Object.assign(choice, { score: name, direction });
  choose(count(table().facts.layers, one => one <= layers) - 1);
  $("score").value = name;
  $("direction").value = direction;
  show();
  redrawing = redrawing.then(() => embed("histogram", tables().histogram))
    .then(() => feed("histogram", tables().histogram));
}
const typed = id => {
  const text = $(id).value.trim().replace(",", ".").replace("−", "-");
  return text === "" ? NaN : Number(text);
};
function readNumber() {
  const value = typed("number"), [low, high] = [score().steps[0], score().steps.at(-1)], range = `between ${short(low)} and ${short(high)}`;
  if (!Number.isFinite(value)) return refuse(`“${$("number").value}” is no number: type one ${range}.`);
  if (value < low || value > high)
    return refuse(`${short(value)} is outside the score's range: type a number ${range}.`);
  choice.threshold = value;
  show("number");
}
function readSize() {
  const bytes = UNIT * typed("size-number"), [least, most] = sizeBounds(), slack = 0.005 * most;
  if (!(bytes >= least - slack && bytes <= most + slack))
    return refuse(`“${$("size-number").value}” is no size that this model can have: type a number between ` +
                  `${(least / UNIT).toFixed(2)} and ${(most / UNIT).toFixed(2)}.`);
  choose(sizeRow(bytes));
  show();
}
// A page from a disk has no clipboard in some browsers: then the text is selected, ready to be copied by hand.
async function copy(element) {
  getSelection().selectAllChildren(element);
  const done = await navigator.clipboard?.writeText(element.textContent).then(() => true, () => false);
  $("copied").textContent = done ? "copied" : "selected: press Ctrl+C";
}
async function start() {
  for (const [name, one] of Object.entries(DATA.scores)) $("score").add(new Option(one.title, name));
  $("score").value = choice.score;
  $("direction").value = choice.direction;
  const born = { ...tables(), spectrum: spectrumTables(0) };
  for (const name of Object.keys(CHARTS)) if (born[name]) await embed(name, born[name]);
  if (!DATA.band) $("frontier-key").textContent = "Not known: this run has no sensitivity.";
  nameSpectrum(0);
  show();
  $("slider").addEventListener("input", () => {
    choice.threshold = score().steps[$("slider").value];
    show("slider");
  });
  $("number").addEventListener("change", readNumber);
  $("size").addEventListener("input", () => {
    const [least, most] = sizeBounds(), share = Number($("size").value) / STEPS;
    choose(sizeRow(share === 1 ? most : least + share * (most - least)));
    show("size");
  });
  $("size-number").addEventListener("change", readSize);
  $("copy").addEventListener("click", () => copy($("parameters")));
  // Of costs, only the high end is worth protecting; a person may still choose the other.
  $("score").addEventListener("change", () =>
    setScore($("score").value, DATA.scores[$("score").value].additive ? "high" : choice.direction));
  $("direction").addEventListener("change", () => setScore(choice.score, $("direction").value));
  views.map.addEventListener("click", (event, item) => {
    if (item?.datum?.place === undefined) return;
    nameSpectrum(item.datum.place);
    feed("spectrum", spectrumTables(item.datum.place));
  });
  document.body.dataset.ready = "yes";
}
start();
