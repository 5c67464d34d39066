// The kernel-less explorer: reads DATA (layers, scores, sizes) and draws SPECS (Vega-Lite) with vegaEmbed.
// A layer is kept in 16-bit when its score is at the threshold or beyond it, as plan.py's rule `threshold` has it.
const $ = id => document.getElementById(id);
const state = { ...DATA.start };
const views = {};
const STEPS = 1000;

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
const gb = bytes => bytes >= 1e8 ? (bytes / 1e9).toFixed(2) + " GB" : (bytes / 1e6).toFixed(1) + " MB";
const short = value => Number(value).toPrecision(4).replace(/\.?0+(e|$)/, "$1");

function tell(c) {
  const parts = [`${c.layers} of ${DATA.layers.length} layers in 16-bit${DATA.failed}`,
                 `${gb(c.size)} in all, ${gb(DATA.size_full - c.size)} saved`, `${c.bits.toFixed(2)} bits a weight`];
  if (c.kl !== null) parts.push(`predicted KL ${c.kl.toPrecision(3)}`);
  $("histogram-title").textContent = "Layers by " + scoreOf().axis;
  $("answer").textContent = parts.join(" · ");
  $("notes").textContent = DATA.notes;
  const f = DATA.frontier;
  if (!f || c.kl === null) {
    $("standing").textContent = "No sensitivity in this run: the cost of a choice is not predicted.";
    return;
  }
  const random = interpolate(f.size, f.random_median, c.size), best = interpolate(f.size, f.optimum, c.size);
  const gain = random - best;
  const share = gain > 1e-12 ? ` This choice gets ${Math.round(100 * (random - c.kl) / gain)} % of that gain.` : "";
  $("standing").textContent =
    `At this size a random choice is predicted ${random.toPrecision(3)} nats a token, the optimum ` +
    `${best.toPrecision(3)}.${share}`;
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
function curve() {
  const values = scoreOf().values, sign = state.direction === "high" ? -1 : 1;
  const order = values.map((v, i) => i).filter(i => values[i] !== null).sort((a, b) => sign * (values[a] - values[b]));
  let size = DATA.size_base, kl = DATA.kl.reduce((a, b) => a + b, 0);
  const rows = [{ size: size / 1e9, kl }];
  for (const i of order) { size += DATA.size_extra[i]; kl -= DATA.kl[i]; rows.push({ size: size / 1e9, kl }); }
  const stride = Math.ceil(rows.length / 400);
  return rows.filter((row, i) => i % stride === 0 || i === rows.length - 1);
}
function layerRows() {
  const values = scoreOf().values;
  return DATA.layers.map((layer, i) => ({ ...layer, place: i, score: values[i],
    state: DATA.settled[i] ? DATA.settled[i] : kept(values[i]) ? "16-bit" : DATA.rest + (values[i] === null ? ", no score" : "") }));
}
// Chart -> named table -> rows, for the present choice.
function tables(c) {
  const all = { histogram: { bins: bins(), cut: [{ threshold: state.threshold }] }, map: { layers: layerRows() } };
  if (DATA.frontier) {
    const f = DATA.frontier;
    const band = f.size.map((size, i) => ({ size: size / 1e9, low: f.random_low[i], high: f.random_high[i],
                                            optimum: f.optimum[i] }));
    all.frontier = { band, curve: curve(), point: [{ size: c.size / 1e9, kl: c.kl }] };
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
function feed(name, rows) {
  for (const [table, content] of Object.entries(rows)) views[name].data(table, content);
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
  else text += `α ${s.alpha.toFixed(2)}, xmin ${short(s.xmin)}, KS distance ${s.ks.toFixed(3)}, tail of ${s.tail} values`;
  $("spectrum-title").textContent = text;
}

// --- controls --------------------------------------------------------------------------------------------
function refuse(text) { $("refusal").textContent = text; }

function setThreshold(value, from) {
  state.threshold = value;
  if (from !== "slider") $("slider").value = toSlider(value);
  if (from !== "number") $("number").value = short(value);
  refuse("");
  draw();
}
function setScore(name, direction) {
  const share = consequences().layers / DATA.layers.length;
  state.score = name;
  state.direction = direction;
  // Another score has another scale: keep as many layers as before.
  const sorted = known(scoreOf().values).sort((a, b) => direction === "high" ? b - a : a - b);
  const count = Math.round(share * DATA.layers.length) - DATA.held;
  const next = sorted[Math.max(0, Math.min(sorted.length, count) - 1)];
  state.threshold = next === undefined ? 0 : next;
  $("slider").value = toSlider(state.threshold);
  $("number").value = short(state.threshold);
  refuse(sorted.length ? "" : "No layer has a value of this score.");
  draw();
}
function readNumber() {
  const text = $("number").value.trim().replace(",", ".");
  const value = Number(text), [low, high] = range();
  if (text === "" || !Number.isFinite(value)) {
    refuse(`“${$("number").value}” is no number: type one between ${short(low)} and ${short(high)}.`);
  } else if (value < low || value > high) {
    refuse(`${short(value)} is outside the score's range: type a number between ${short(low)} and ${short(high)}.`);
  } else setThreshold(value, "number");
}
async function start() {
  for (const [name, score] of Object.entries(DATA.scores)) $("score").add(new Option(score.title, name));
  $("score").value = state.score;
  $("direction").value = state.direction;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const ink = dark ? "#d0d0d0" : "#444", grid = dark ? "#3a3f43" : "#e6e6e6";
  const config = { background: null, view: { stroke: null }, font: "system-ui, sans-serif",
    axis: { labelColor: ink, titleColor: ink, gridColor: grid, domainColor: ink, tickColor: ink, labelFontSize: 11,
            titleFontWeight: "normal" },
    legend: { labelColor: ink, titleColor: ink } };
  // Born with their data: Vega warns of empty domains otherwise.
  const born = { ...tables(consequences()), spectrum: spectrumTables(0) };
  for (const [name, spec] of Object.entries(SPECS)) {
    const options = { actions: false, config, renderer: "canvas" };
    const dressed = { ...spec, params: [{ name: "ink", value: ink }], datasets: born[name] };
    views[name] = (await vegaEmbed("#" + name, dressed, options)).view;
  }
  if (!DATA.frontier) $("frontier-title").textContent = "What a gigabyte buys: not known, this run has no sensitivity";
  $("slider").value = toSlider(state.threshold);
  $("number").value = short(state.threshold);
  tell(consequences());
  nameSpectrum(0);
  $("slider").addEventListener("input", () => setThreshold(fromSlider(Number($("slider").value)), "slider"));
  $("number").addEventListener("change", readNumber);
  $("score").addEventListener("change", () => setScore($("score").value, state.direction));
  $("direction").addEventListener("change", () => setScore(state.score, $("direction").value));
  views.map.addEventListener("click", (event, item) => {
    if (!item || !item.datum || item.datum.place === undefined) return;
    nameSpectrum(item.datum.place);
    feed("spectrum", spectrumTables(item.datum.place));
  });
  document.body.dataset.ready = "yes";
}
start();
