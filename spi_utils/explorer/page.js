// The kernel-less explorer: reads DATA (layers, scores, sizes) and draws SPECS (Vega-Lite) with vegaEmbed.
// A layer is kept in 16-bit when its score is at the threshold or beyond it, as plan.py's rule `threshold` has it.
const $ = id => document.getElementById(id);
const state = { ...DATA.start };
const views = {};
const STEPS = 1000;

const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const [UNIT, UNIT_NAME] = DATA.unit;

const scoreOf = () => DATA.scores[state.score];
const known = values => values.filter(v => v !== null);
const BINS = 40;

function range() {
  const values = known(scoreOf().values);
  if (!values.length) return [0, 1];
  let low = Infinity, high = -Infinity;
  for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); }
  return [low, high];
}
// The slider runs over the score's range, logarithmically where that spans decades.
function fromSlider(step) {
  const [low, high] = range();
  if (step <= 0) return low;
  if (step >= STEPS) return high;
  return scoreOf().wide ? low * (high / low) ** (step / STEPS) : low + (high - low) * step / STEPS;
}
function toSlider(value) {
  const [low, high] = range();
  if (low === high) return 0;
  const share = scoreOf().wide ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  return Math.round(STEPS * Math.min(1, Math.max(0, share)));
}
function kept(value) {
  if (value === null) return false;
  return state.direction === "high" ? value >= state.threshold : value <= state.threshold;
}

// --- consequences: the same sums as plan.py's ------------------------------------------------------------
function consequences() {
  const out = { layers: DATA.held, size: DATA.size_base, kl: DATA.kl ? 0 : null };
  scoreOf().values.forEach((value, i) => {
    if (kept(value)) { out.layers += 1; out.size += DATA.size_extra[i]; }
    else if (DATA.kl) out.kl += DATA.kl[i];
  });
  out.payload = out.size - DATA.header_base;
  scoreOf().values.forEach((value, i) => { if (kept(value)) out.payload -= DATA.header_extra[i]; });
  out.bits = 8 * out.payload / DATA.weights;
  return out;
}
function interpolate(xs, ys, x) {
  if (x <= xs[0]) return ys[0];
  for (let i = 1; i < xs.length; i++)
    if (x <= xs[i]) return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1] || 1);
  return ys[ys.length - 1];
}
// Three significant digits in the whole model's unit, as state.py's amount().
function amount(bytes) {
  const size = bytes / UNIT, digits = size ? 2 - Math.floor(Math.log10(Math.abs(size))) : 0;
  return size.toFixed(Math.min(3, Math.max(0, digits))) + " " + UNIT_NAME;
}
const minus = text => text.replace(/-/g, "−");
const three = value => minus(value.toPrecision(3));
const short = value => Number(value).toPrecision(4).replace(/\.?0+(e|$)/, "$1");

function tell(c) {
  const parts = [`${c.layers} of ${DATA.layers.length} layers in 16-bit${DATA.failed}`,
                 `${amount(c.size)} in all, ${amount(DATA.size_full - c.size)} saved`, `${c.bits.toFixed(2)} bits a weight`];
  if (c.kl !== null) parts.push(`predicted KL ${three(c.kl)} nats a token`);
  $("histogram-title").textContent = "Layers by " + scoreOf().axis;
  $("answer").textContent = parts.join(" · ");
  $("notes").textContent = [ties(), DATA.notes].filter(Boolean).join(" ");
  const f = DATA.frontier;
  if (!f || c.kl === null) {
    $("standing").textContent = "No sensitivity in this run: the cost of a choice is not predicted.";
    return;
  }
  const random = interpolate(f.size, f.random_median, c.size), best = interpolate(f.size, f.optimum, c.size);
  const room = random - best, gain = random - c.kl;
  let worth = "";
  if (room > 1e-12 * Math.max(random, 1e-300)) worth = gain < 0
    ? ` This choice is predicted worse than random by ${three(-gain)}.`
    : ` This choice is predicted to get ${Math.round(100 * gain / room)} % of what can be gained over random.`;
  $("standing").textContent =
    `Predicted at this size: a random choice ${three(random)} nats a token, the least predicted KL ${three(best)}.${worth}`;
}
// Layers, in different groups, that share the score's value at the cut: no threshold parts them.
function ties() {
  const values = scoreOf().values, inside = values.filter(kept);
  if (!inside.length) return "";
  const last = state.direction === "high" ? Math.min(...inside) : Math.max(...inside);
  const same = values.map((v, i) => i).filter(i => values[i] === last);
  return new Set(same.map(i => DATA.item[i])).size > 1 ? DATA.ties.replace("{}", same.length) : "";
}

// Bins of equal width on the slider's own scale, the kept part of each stacked on the rest.
function bins() {
  const values = scoreOf().values, [low, high] = range(), wide = scoreOf().wide;
  const pad = low === high ? Math.abs(low) * 0.05 || 1 : 0;
  const edge = i => pad ? low - pad + 2 * pad * i / BINS : fromSlider(STEPS * i / BINS);
  const counts = Array.from({ length: BINS }, () => [0, 0]);
  for (const value of values) {
    if (value === null) continue;
    const share = pad ? 0.5 : wide ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    counts[Math.min(BINS - 1, Math.floor(share * BINS))][kept(value) ? 0 : 1] += 1;
  }
  const rows = [];
  counts.forEach(([in16, in4], i) => {
    if (in16) rows.push({ left: edge(i), right: edge(i + 1), low: in4, high: in4 + in16, count: in16, state: "16-bit" });
    if (in4) rows.push({ left: edge(i), right: edge(i + 1), low: 0, high: in4, count: in4, state: DATA.rest });
  });
  return rows;
}

// --- drawing ---------------------------------------------------------------------------------------------
function ranked() {
  const values = scoreOf().values, sign = state.direction === "high" ? -1 : 1;
  return values.map((v, i) => i).filter(i => values[i] !== null).sort((a, b) => sign * (values[a] - values[b]));
}
function curve() {
  let size = DATA.size_base, kl = DATA.kl.reduce((a, b) => a + b, 0);
  const rows = [{ size: size / UNIT, kl }];
  for (const i of ranked()) { size += DATA.size_extra[i]; kl -= DATA.kl[i]; rows.push({ size: size / UNIT, kl }); }
  const stride = Math.ceil(rows.length / 400);
  return rows.filter((row, i) => i % stride === 0 || i === rows.length - 1);
}
function layerRows() {
  const values = scoreOf().values;
  return DATA.layers.map((layer, i) => {
    const stored = DATA.settled[i] ? DATA.settled[i]
      : kept(values[i]) ? "16-bit" : DATA.rest + (values[i] === null ? ", no score" : "");
    return { label: layer.label, depth: layer.depth, place: i, state: stored, tip: tip(layer, values[i], stored) };
  });
}
function tip(layer, value, stored) {
  const rows = { title: layer.name, "stored in": stored };
  if (value !== null) rows[scoreOf().short + " (the score)"] = three(value);
  DATA.facts.forEach(([column, title], j) => {
    if (column !== state.score && layer.facts[j] !== null) rows[title] = layer.facts[j];
  });
  return rows;
}
// Chart -> named table -> rows, for the present choice.
function tables(c) {
  const all = { histogram: { bins: bins(), cut: [{ threshold: state.threshold }] }, map: { layers: layerRows() } };
  if (DATA.frontier) {
    const f = DATA.frontier;
    const band = f.size.map((size, i) => ({ size: size / UNIT, low: f.random_low[i], high: f.random_high[i],
                                            optimum: f.optimum[i] }));
    all.frontier = { band, curve: curve(), point: [{ size: c.size / UNIT, kl: c.kl }] };
  }
  return all;
}
function spectrumTables(place) {
  const s = DATA.spectra && DATA.spectra[place];
  if (!s) return { bars: [], fit: [] };
  const n = s.density.length, edge = i => s.low * (s.high / s.low) ** (i / n);
  const bars = s.density.map((density, i) => ({ left: edge(i), right: edge(i + 1), density, floor: s.floor }));
  const fit = s.alpha === null ? [] : [s.xmin, s.high].map(x => ({ x,
    density: Math.max(s.floor, s.share * (s.alpha - 1) / s.xmin * (x / s.xmin) ** -s.alpha) }));
  return { bars: bars.filter(bar => bar.density > 0), fit };
}
// Air above the tallest bar: one that reaches the frame looks cut.
const headroom = bars => 1.08 * bars.reduce((most, bar) => Math.max(most, bar.high), 1);
function feed(name, rows) {
  for (const [table, content] of Object.entries(rows)) views[name].data(table, content);
  if (rows.bins) views[name].signal("top", headroom(rows.bins));
  views[name].runAsync();
}
function draw() {
  const c = consequences();
  tell(c);
  for (const [name, rows] of Object.entries(tables(c))) feed(name, rows);
}
function nameSpectrum(place) {
  const layer = DATA.layers[place], s = DATA.spectra && DATA.spectra[place];
  let text = `Spectrum of ${layer.name}: `;
  if (!s) text = `${layer.name}: no spectrum in this file`;
  else if (s.alpha === null) text += "no fit";
  else text += `Clauset's α ${s.alpha.toFixed(2)} (xmin ${short(s.xmin)}, KS distance ${s.ks.toFixed(3)}, ` +
    `tail of ${s.tail} values)`;
  const hill = layer.facts[DATA.facts.findIndex(([column]) => column === "alpha_hill")];
  if (s && hill) text += `, Hill's α ${hill}`;
  $("spectrum-title").textContent = text;
}

// --- controls --------------------------------------------------------------------------------------------
function refuse(text) { $("refusal").textContent = text; }

// Every control but the one that a person is moving.
function follow(from) {
  const size = consequences().size, [least, most] = sizeBounds();
  if (from !== "slider") $("slider").value = toSlider(state.threshold);
  if (from !== "number") $("number").value = short(state.threshold);
  if (from !== "size") $("size").value = Math.round(STEPS * (size - least) / (most - least || 1));
  if (from !== "size-number") $("size-number").value = (size / UNIT).toFixed(UNIT === 1e9 ? 3 : 2);
}
function setThreshold(value, from) {
  state.threshold = value;
  follow(from);
  refuse("");
  draw();
}
// File sizes with nothing and with everything scored in 16-bit.
function sizeBounds() {
  return [DATA.size_base, ranked().reduce((size, i) => size + DATA.size_extra[i], DATA.size_base)];
}
// As many layers in the score's order as the file has room for; equal scores go together or not at all.
function setSize(bytes, from) {
  const order = ranked(), values = scoreOf().values;
  if (!order.length) return;
  let k = 0, size = DATA.size_base;
  while (k < order.length && size + DATA.size_extra[order[k]] <= bytes) size += DATA.size_extra[order[k++]];
  while (k > 0 && k < order.length && values[order[k - 1]] === values[order[k]]) k--;
  setThreshold(k ? values[order[k - 1]] : beyond(values[order[0]], state.direction), from);
}
// A threshold just past the first score in order: it keeps nothing.
function beyond(first, direction) {
  const sign = direction === "high" ? 1 : -1;
  return first + sign * Math.max(Math.abs(first) * 1e-12, Number.MIN_VALUE);
}
function setScore(name, direction) {
  const share = consequences().layers / DATA.layers.length;
  state.score = name;
  state.direction = direction;
  // Another score has another scale: keep as many layers as before.
  const sorted = known(scoreOf().values).sort((a, b) => direction === "high" ? b - a : a - b);
  const count = Math.round(share * DATA.layers.length) - DATA.held;
  if (!sorted.length) state.threshold = 0;
  else if (count > 0) state.threshold = sorted[Math.min(sorted.length, count) - 1];
  else state.threshold = beyond(sorted[0], direction);
  $("direction").value = direction;
  follow();
  refuse(sorted.length ? "" : "No layer has a value of this score.");
  draw();
  // An axis can't turn logarithmic in place. One drawing after the other, each with what is chosen by then.
  redrawing = redrawing.then(() => embed("histogram", tables(consequences()).histogram))
    .then(() => feed("histogram", tables(consequences()).histogram));
}
let redrawing = Promise.resolve();
function typed(id) {
  const text = $(id).value.trim().replace(",", ".").replace("−", "-");
  return text === "" ? NaN : Number(text);
}
function readSize() {
  const value = typed("size-number"), [least, most] = sizeBounds(), slack = 0.005 * most;
  if (Number.isFinite(value) && value * UNIT >= least - slack && value * UNIT <= most + slack)
    return setSize(value * UNIT, "");
  refuse(`“${$("size-number").value}” is no size that this model can have: type a number between ` +
         `${(least / UNIT).toFixed(2)} and ${(most / UNIT).toFixed(2)}.`);
}
function readNumber() {
  const value = typed("number"), [low, high] = range();
  if (!Number.isFinite(value)) {
    refuse(`“${$("number").value}” is no number: type one between ${short(low)} and ${short(high)}.`);
  } else if (value < low || value > high) {
    refuse(`${short(value)} is outside the score's range: type a number between ${short(low)} and ${short(high)}.`);
  } else setThreshold(value, "number");
}
const ink = dark ? "#d0d0d0" : "#444", grid = dark ? "#3a3f43" : "#e6e6e6", line = dark ? "#56B4E9" : "#0072B2";
const CONFIG = { background: null, view: { stroke: null }, font: "system-ui, sans-serif",
  axis: { labelColor: ink, titleColor: ink, gridColor: grid, domainColor: ink, tickColor: ink, labelFontSize: 11,
          titleFontWeight: "normal" },
  legend: { labelColor: ink, titleColor: ink } };

// Charts are born with their data: Vega warns of empty domains otherwise.
async function embed(name, datasets) {
  const spec = structuredClone(SPECS[name]), options = { actions: false, config: CONFIG, renderer: "canvas",
    tooltip: { theme: dark ? "dark" : "light" } };
  spec.params = [{ name: "ink", value: ink }, { name: "line", value: line }];
  if (name === "histogram") {
    spec.params.push({ name: "top", value: headroom(datasets.bins) });
    Object.assign(spec.layer[0].encoding.x.scale, scoreOf().wide ? { type: "log" } : { type: "linear", zero: false });
  }
  if (views[name]) views[name].finalize();
  views[name] = (await vegaEmbed("#" + name, { ...spec, datasets }, options)).view;
}
async function start() {
  for (const [name, score] of Object.entries(DATA.scores)) $("score").add(new Option(score.title, name));
  $("score").value = state.score;
  $("direction").value = state.direction;
  const born = { ...tables(consequences()), spectrum: spectrumTables(0) };
  for (const name of Object.keys(SPECS)) await embed(name, born[name]);
  if (!DATA.frontier) $("frontier-title").textContent = "What a gigabyte buys: not known, this run has no sensitivity";
  follow();
  tell(consequences());
  nameSpectrum(0);
  $("slider").addEventListener("input", () => setThreshold(fromSlider(Number($("slider").value)), "slider"));
  $("number").addEventListener("change", readNumber);
  $("size").addEventListener("input", () => {
    const [least, most] = sizeBounds(), share = Number($("size").value) / STEPS;
    setSize(share === 1 ? most : least + share * (most - least), "size");
  });
  $("size-number").addEventListener("change", readSize);
  // Of costs, only the high end is worth protecting; a person may still choose the other.
  $("score").addEventListener("change", () =>
    setScore($("score").value, DATA.scores[$("score").value].additive ? "high" : state.direction));
  $("direction").addEventListener("change", () => setScore(state.score, $("direction").value));
  views.map.addEventListener("click", (event, item) => {
    if (!item || !item.datum || item.datum.place === undefined) return;
    nameSpectrum(item.datum.place);
    feed("spectrum", spectrumTables(item.datum.place));
  });
  document.body.dataset.ready = "yes";
}
start();
