// The page: inputs, editor, table and drawings. All that is computed, worker.js computes.
"use strict";

const $ = (id) => document.getElementById(id);
const MINE = "mine";
// Name: what it is called, the slider's ends, whether it moves by ratios, whether it counts things.
const FIELDS = {
  prefill: ["Prefill workers", 1, 8, false, true],
  decode: ["Decode workers", 1, 8, false, true],
  rate: ["Requests / s", 0.5, 200, true, false],
  prompt: ["Prompt tokens", 16, 16000, true, true],
  output: ["Output tokens", 1, 1000, true, true],
  spread: ["± range ratio", 0, 0.95, false, false],
  gbps: ["Link, Gbit/s", 1, 3600, true, false],
  requests: ["Requests", 20, 2000, true, true],
  seed: ["Seed", 0, 99, false, true],
};
// Of the result's table: title, unit, factor, whether more is better.
const ROWS = {
  p50_ttft: ["TTFT p50", "ms", 1e3, false],
  p99_ttft: ["TTFT p99", "ms", 1e3, false],
  p50_ttst: ["Second token p50", "ms", 1e3, false],
  mean_tpot: ["TPOT", "ms", 1e3, false],
  p99_itl: ["ITL p99", "ms", 1e3, false],
  output_throughput: ["Throughput", "tok/s", 1, true],
  request_goodput: ["Goodput", "req/s", 1, true],
  attainment: ["SLO attainment", "%", 100, true],
};
const EQUAL = 0.03; // a ratio that is nearer to 1 says nothing
const STAGES = ["queue", "prefill", "transfer", "decode wait", "decode"];
const COLORS = ["queue", "prefill", "transfer", "wait", "decode"];

let worker = null;
let about = null; // what there is to choose from
let usable = false; // the worker has loaded
let again = false; // run as soon as it can
let shown = null; // the last result
let view = [0, 1]; // seconds that are drawn

// ---------------------------------------------------------------- inputs

function makeFields() {
  for (const [name, [title, low, high, ratios, whole]] of Object.entries(FIELDS)) {
    const row = document.createElement("template");
    row.innerHTML = `<label for="${name}">${title}</label>
      <input type="range" data-of="${name}" aria-label="${title}, slider"
        ${ratios ? 'min="0" max="1000"' : `min="${low}" max="${high}" step="${whole ? 1 : 0.05}"`}>
      <input type="number" id="${name}" min="0" step="${whole ? 1 : "any"}" required>`;
    $("settings").append(row.content);
  }
}

const slider = (name) => document.querySelector(`[data-of="${name}"]`);

function moveSlider(name) {
  const [, low, high, ratios] = FIELDS[name];
  const value = Number($(name).value);
  slider(name).value = ratios ? (1000 * Math.log(Math.max(value, low) / low)) / Math.log(high / low) : value;
}

function readSlider(name) {
  const [, low, high, ratios, whole] = FIELDS[name];
  const at = Number(slider(name).value);
  const value = ratios ? Number((low * (high / low) ** (at / 1000)).toPrecision(2)) : at;
  $(name).value = whole ? Math.round(value) : value;
}

function settings() {
  const numbers = Object.keys(FIELDS).map((name) => [name, Number($(name).value)]);
  const [baseline, options] = [$("baseline").value, $("options").value.trim()];
  return {
    ...Object.fromEntries(numbers),
    profile: $("profile").value,
    baseline: options && baseline !== MINE ? `${baseline}:${options}` : baseline,
  };
}

function apply(values) {
  for (const [name, value] of Object.entries(values)) {
    if (name in FIELDS) {
      $(name).value = value;
      moveSlider(name);
    }
  }
  const [, baseline, options] = values.baseline.match(/^([^:]*):?(.*)$/);
  $("baseline").value = baseline;
  $("options").value = options;
  $("options").disabled = baseline === MINE;
  $("profile").value = values.profile;
}

/** The address has the settings, but not the policy: a link must not bring code. */
const asHash = () => `#${new URLSearchParams(settings())}`;
const fromHash = () => ({ ...about.defaults, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) });

function choose(select, names, group = () => "") {
  for (const [label, members] of Map.groupBy(names, group)) {
    const into = label ? Object.assign(document.createElement("optgroup"), { label }) : select;
    into.append(...members.map((name) => new Option(name)));
    if (label) select.append(into);
  }
}

function introduce(what) {
  if (about) return; // the worker was started again
  about = what;
  choose($("profile"), about.profiles, (name) => name.split(" ")[0]);
  choose($("baseline"), Object.keys(about.policies).filter((name) => name !== "example"));
  $("baseline").append(new Option("the one below", MINE));
  $("load").append(new Option("load …", ""));
  choose($("load"), Object.keys(about.policies));
  setSource(localStorage.getItem("policy") ?? about.policies.example);
  apply(fromHash());
  again = true;
}

// ---------------------------------------------------------------- the editor

function setSource(text) {
  $("source").value = text;
  number();
}

function number(bad = 0) {
  const count = $("source").value.split("\n").length;
  const spans = Array.from({ length: count }, (_, i) => {
    const span = document.createElement("span");
    span.textContent = i + 1;
    span.className = i + 1 === bad ? "bad" : "";
    return span;
  });
  $("lines").replaceChildren(...spans);
  $("lines").scrollTop = $("source").scrollTop;
}

function onEditorKey(event) {
  const box = $("source");
  if (event.key === "Escape") {
    box.dataset.leave = "yes"; // the next Tab leaves: nobody is trapped
  } else if (event.key === "Tab" && !event.shiftKey && !box.dataset.leave) {
    event.preventDefault();
    document.execCommand("insertText", false, "    "); // the one way that can be undone
  } else if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    const line = box.value.slice(0, box.selectionStart).split("\n").at(-1);
    const indent = line.match(/^ */)[0] + (line.trimEnd().endsWith(":") ? "    " : "");
    document.execCommand("insertText", false, `\n${indent}`);
  } else if (event.key !== "Shift") {
    delete box.dataset.leave;
  }
}

function showError({ message, where, line }) {
  const [box, inEditor] = [where === "policy" ? $("error") : $("wrong"), where === "policy"];
  box.textContent = inEditor && line ? `line ${line}: ${message}` : message;
  box.hidden = false;
  if (inEditor && line) {
    $("source").scrollTop = Math.max(0, (line - 6) * 17);
    number(line);
  }
}

function clearErrors() {
  $("error").hidden = $("wrong").hidden = true;
  number();
}

// ---------------------------------------------------------------- the worker

function start() {
  usable = false;
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = (event) => hear(event.data);
  worker.onerror = (event) => hear({ broken: event.message ?? "the worker does not start" });
  tell("loading", "Python loads …");
}

function tell(state, text, share = null) {
  document.body.dataset.state = state;
  $("status").textContent = text;
  $("run").textContent = state === "running" ? "Stop" : "Run";
  $("run").disabled = state === "loading";
  if (share === null) $("progress").removeAttribute("value");
  else $("progress").value = share;
}

function run() {
  if (!worker) start();
  again = !usable;
  if (again) return;
  usable = false;
  delete document.body.dataset.stale;
  history.replaceState(null, "", asHash());
  clearErrors();
  tell("running", "starts", 0);
  worker.postMessage({ ...settings(), source: $("source").value });
}

function stop() {
  again = false;
  worker.terminate();
  start();
}

function hear({ ready, side, ended, result, seconds, broken }) {
  if (side) {
    const count = Number($("requests").value);
    const share = ((side === "disagg") + Math.min(1, ended / count)) / 2;
    tell("running", `${side}: ${ended} of ${count}`, share);
    return;
  }
  usable = true;
  if (ready) {
    introduce(ready);
    tell("ready", "Stopped", 0);
  } else if (broken) {
    showError({ message: broken, where: "settings" });
    tell("error", "Failed", 0);
    worker.terminate(); // whatever is left of it
    worker = null;
  } else if (result.error) {
    showError(result.error);
    tell("error", result.error.where === "policy" ? "The policy has an error" : "The settings have an error", 0);
  } else {
    tell("done", `${result.lengths.length} requests in ${seconds.toFixed(1)} s`, 1);
    show(result);
  }
  if (again) run();
}

// ---------------------------------------------------------------- numbers

/** Three digits, but not more than two of them behind the point. */
function format(value) {
  if (value === null) return "–";
  const digits = value ? Math.min(Math.max(2 - Math.floor(Math.log10(value)), 0), 2) : 0;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function show(result) {
  const fresh = shown === null || shown.sides.some((side, i) => side.wall !== result.sides[i].wall);
  shown = result;
  const names = result.sides.map((side, i) => `${"AB"[i]} ${side.label}, ${side.policy}`);
  [$("a").textContent, $("b").textContent] = names;
  const rows = Object.entries(ROWS).map(([name, [title, unit, factor, more]]) => {
    const { a, b, ratio } = result.table[name];
    const row = document.createElement("tr");
    const scaled = (value) => format(value === null ? null : value * factor);
    const judged = ratio === null || Math.abs(ratio - 1) < EQUAL ? "" : ratio > 1 === more ? "good" : "bad";
    const said = { good: "better", bad: "worse", "": "" }[judged];
    row.innerHTML = `<th scope="row">${title} <small>${unit}</small></th><td>${scaled(a)}</td><td>${scaled(b)}</td>
      <td class="${judged}"><small>${said}</small> ${ratio === null ? "–" : `${ratio.toFixed(2)}×`}</td>`;
    return row;
  });
  $("table").replaceChildren(...rows);
  const { ttft, tpot } = result.slo;
  const turnedAway = result.sides.map((side, i) => side.rejected && `${"AB"[i]} turned ${side.rejected} away. `);
  $("slo").textContent =
    `${turnedAway.filter(Boolean).join("")}SLO: TTFT ${ttft} ms (8 unloaded prefills), TPOT ${tpot} ms (2 unloaded ` +
    `steps). ITL is without the gap of the handoff, which the second token shows. B sent ` +
    `${format(result.sides[1].gigabytes)} GB of KV. One run a side: differences of a few percent may be luck.`;
  if (fresh) view = [0, Math.max(...result.sides.map((side) => side.wall))];
  draw();
}

// ---------------------------------------------------------------- drawings

const GUTTER = 108;
const AXIS = 18;
const ROW = 15;
const TITLE = 17;
const WATERFALL = 132; // of one side
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A canvas of this height, cleared, with its time axis; and from seconds to pixels. */
function begin(canvas, height) {
  const [width, ratio] = [canvas.clientWidth, devicePixelRatio];
  canvas.style.height = `${height + 2}px`;
  Object.assign(canvas, { width: width * ratio, height: height * ratio });
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  const scale = (width - GUTTER - 8) / (view[1] - view[0]);
  const x = (t) => GUTTER + (Math.min(Math.max(t, view[0]), view[1]) - view[0]) * scale;
  const rough = (view[1] - view[0]) / 8;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((many) => many * power >= rough);
  pen.textAlign = "center";
  for (let t = Math.ceil(view[0] / step) * step; t <= view[1]; t += step) {
    pen.fillStyle = color("line");
    pen.fillRect(x(t), 0, 1, height - AXIS + 3);
    pen.fillStyle = color("soft");
    pen.fillText(`${Number(t.toFixed(6))} s`, Math.min(x(t), width - 16), height - 4);
  }
  pen.textAlign = "left";
  return { pen, x };
}

function write(pen, text, x, y, tone = "soft", weight = "") {
  pen.font = pen.font.replace(/^(bold )?/, weight && `${weight} `);
  pen.fillStyle = color(tone);
  pen.fillText(text, x, y);
}

/** Where each worker's row begins: {side, worker, y}. */
function stripRows() {
  let y = 0;
  return shown.sides.flatMap((side, i) => {
    y += TITLE;
    const rows = side.workers.map((name, number) => ({ side: i, number, name, y: y + number * ROW }));
    y += side.workers.length * ROW + 6;
    return rows;
  });
}

function drawStrips() {
  const rows = stripRows();
  const { pen, x } = begin($("strips"), rows.at(-1).y + ROW + 6 + AXIS);
  const kinds = ["prefill", "mixed", "decode"].map(color);
  shown.sides.forEach(({ label, policy, busy, steps }, i) => {
    const own = rows.filter((row) => row.side === i);
    write(pen, `${"AB"[i]}  ${label}, ${policy}`, 6, own[0].y - 5, "text", "bold");
    for (const { number, name, y } of own) {
      write(pen, name, 6, y + 11);
      pen.textAlign = "right";
      write(pen, `${Math.round(100 * busy[number])} %`, GUTTER - 6, y + 11);
      pen.textAlign = "left";
    }
    steps.begin.forEach((from, n) => {
      const to = from + steps.seconds[n];
      if (to < view[0] || from > view[1]) return;
      const [left, right] = [x(from), x(to)];
      pen.fillStyle = kinds[steps.prefill[n] ? (steps.decode[n] ? 1 : 0) : 2];
      const gap = right - left > 4 ? 1 : 0; // one step can be told from the next
      pen.fillRect(left, own[steps.worker[n]].y, right - left - gap, ROW - 2);
    });
  });
}

/** Requests that come in the time shown; every `each`-th of them, so that a row can be seen. */
function waterfallRows() {
  const times = shown.sides[0].requests.map(([at]) => at);
  const come = times.map((_, n) => n).filter((n) => view[0] <= times[n] && times[n] < view[1]);
  const each = Math.max(1, Math.ceil((2 * come.length) / WATERFALL));
  const rows = come.filter((_, n) => n % each === 0);
  return { rows, each, height: Math.min(12, WATERFALL / rows.length) };
}

const waterfallTop = (side) => side * (WATERFALL + TITLE + 6) + TITLE;

function drawWaterfall() {
  const { pen, x } = begin($("waterfall"), waterfallTop(2) - TITLE + AXIS);
  const { rows, each, height } = waterfallRows();
  const inks = COLORS.map(color);
  shown.sides.forEach(({ label, policy, requests }, i) => {
    const top = waterfallTop(i);
    write(pen, `${"AB"[i]}  ${label}, ${policy}`, 6, top - 5, "text", "bold");
    write(pen, each > 1 ? `one in ${each} is drawn` : `${rows.length} that come`, 6, top + 11);
    rows.forEach((n, place) => {
      let [at, ...stages] = requests[n];
      stages.forEach((seconds, stage) => {
        pen.fillStyle = inks[stage];
        pen.fillRect(x(at), top + place * height, x(at + seconds) - x(at), 0.8 * height);
        at += seconds;
      });
    });
  });
}

function draw(selection = null) {
  if (!shown) return;
  drawStrips();
  drawWaterfall();
  if (!selection) return;
  for (const canvas of [$("strips"), $("waterfall")]) {
    const pen = canvas.getContext("2d");
    pen.globalAlpha = 0.2;
    pen.fillStyle = color("text");
    pen.fillRect(Math.min(...selection), 0, Math.abs(selection[1] - selection[0]), canvas.clientHeight);
    pen.globalAlpha = 1;
  }
}

function look(from, to) {
  const end = Math.max(...shown.sides.map((side) => side.wall));
  const length = Math.min(Math.max(to - from, 0.002), end);
  const first = Math.min(Math.max(from, 0), end - length);
  view = [first, first + length];
  draw();
}

const ZOOMS = {
  left: ([from, to]) => [from - (to - from) / 4, to - (to - from) / 4],
  right: ([from, to]) => [from + (to - from) / 4, to + (to - from) / 4],
  in: ([from, to]) => [from + (to - from) / 4, to - (to - from) / 4],
  out: ([from, to]) => [from - (to - from) / 2, to + (to - from) / 2],
  all: () => [0, Infinity],
};
const KEYS = { ArrowLeft: "left", ArrowRight: "right", "+": "in", "=": "in", "-": "out", 0: "all" };

const timeAt = (canvas, x) => view[0] + ((x - GUTTER) / (canvas.clientWidth - GUTTER - 8)) * (view[1] - view[0]);
const milliseconds = (seconds) => format(seconds * 1e3);

function tellStep(x, y) {
  const row = stripRows().find((one) => y >= one.y && y < one.y + ROW);
  if (!row || x < GUTTER) return;
  const [steps, t] = [shown.sides[row.side].steps, timeAt($("strips"), x)];
  const under = (from, i) => steps.worker[i] === row.number && from <= t && t < from + steps.seconds[i];
  const n = steps.begin.findIndex(under);
  const what = n < 0 ? "idle" : `a step of ${milliseconds(steps.seconds[n])} ms from ${steps.begin[n].toFixed(3)} s, ` +
    `${steps.prefill[n].toLocaleString("en")} prompt tokens and ${steps.decode[n]} decodes`;
  $("step").textContent = `${"AB"[row.side]} ${row.name}: ${what}`;
}

function tellRequest(x, y) {
  const side = y >= waterfallTop(1) ? 1 : 0;
  const { rows, height } = waterfallRows();
  const n = rows[Math.floor((y - waterfallTop(side)) / height)];
  if (n === undefined) return;
  const [[prompt, output], [at, ...stages]] = [shown.lengths[n], shown.sides[side].requests[n]];
  const parts = stages.map((seconds, stage) => `${STAGES[stage]} ${milliseconds(seconds)}`);
  const what = `${"AB"[side]} request ${n}, ${prompt} + ${output} tokens, at ${at.toFixed(3)} s`;
  $("request").textContent = `${what}: ${parts.join(", ")} ms`;
}

function listen(canvas, tellAt) {
  let from = null;
  canvas.addEventListener("pointerdown", (event) => {
    from = event.offsetX;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!shown) return;
    if (from === null) tellAt(event.offsetX, event.offsetY);
    else draw([from, event.offsetX]);
  });
  canvas.addEventListener("pointerup", (event) => {
    const ends = [from, event.offsetX].sort((a, b) => a - b);
    from = null;
    if (shown && ends[1] - ends[0] > 4) look(...ends.map((x) => timeAt(canvas, x)));
    else draw();
  });
  canvas.addEventListener("dblclick", () => shown && look(...ZOOMS.all()));
  canvas.addEventListener("keydown", (event) => {
    if (!shown || !(event.key in KEYS) || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    look(...ZOOMS[KEYS[event.key]](view));
  });
}

// ---------------------------------------------------------------- events

function onSettings(event) {
  const of = event.target.dataset.of;
  if (of) readSlider(of);
  else if (event.target.id in FIELDS) moveSlider(event.target.id);
}

makeFields();
$("settings").addEventListener("input", onSettings);
$("settings").addEventListener("change", () => {
  $("options").disabled = $("baseline").value === MINE;
  if ($("settings").reportValidity()) again = true;
  if (usable && again) run();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("run").addEventListener("click", () => (document.body.dataset.state === "running" ? stop() : run()));
$("link").addEventListener("click", async () => {
  history.replaceState(null, "", asHash());
  await navigator.clipboard.writeText(location.href);
  $("status").textContent = "Link copied";
});
$("load").addEventListener("change", () => {
  const name = $("load").value;
  $("load").value = "";
  setSource(about.policies[name]);
  $("source").dispatchEvent(new Event("input"));
  run();
});
$("source").addEventListener("input", () => {
  localStorage.setItem("policy", $("source").value);
  document.body.dataset.stale = "yes";
  number();
});
$("source").addEventListener("scroll", () => ($("lines").scrollTop = $("source").scrollTop));
$("source").addEventListener("keydown", onEditorKey);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
});
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => shown && look(...ZOOMS[button.dataset.zoom](view)));
}
listen($("strips"), tellStep);
listen($("waterfall"), tellRequest);
addEventListener("hashchange", () => {
  apply(fromHash());
  run();
});
new ResizeObserver(() => draw()).observe($("right"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
if (location.protocol === "file:") {
  tell("error", "Not from a file", 0);
  showError({ message: "A browser does not run this from a file: python -m http.server -d FOLDER", where: "settings" });
} else {
  start();
}
