// The training report: builds every section from DATA (library/training/report_page.py says what is in it).

const STATES = {running: "running", finished: "finished", interrupted: "interrupted", failed: "ended by an error"};
const COLORS = ["--one", "--two", "--three", "--four", "--five", "--six"];
const EMPTY = {x: [], y: []};
const last = (list) => list[list.length - 1];

function epochOf(step) {
  return Math.max(1, Math.ceil(step / DATA.plan.steps_per_epoch));
}

function describeStep(step) {
  return `step ${step.toLocaleString("en")}, epoch ${epochOf(step)}`;
}

function head() {
  const {state, reason, step} = DATA.status, {steps, epochs} = DATA.plan;
  put("name", DATA.name);
  put("state", element("span", {class: "pill " + state}, STATES[state]));
  put("what", DATA.what);
  const bar = element("span", {class: state});
  bar.style.width = `${100 * step / steps}%`;
  put("progress", bar);
  put("trouble", state === "failed" && reason ? reason : "");
  const follows = location.hash === "#follow";
  const button = state === "running" && window === window.top && element("button", {type: "button", id: "follow", onclick: () => {
    history.replaceState(null, "", follows ? "#" : "#follow");
    location.reload();
  }}, follows ? "stop following" : "follow");
  const written = () => {
    const age = Date.now() / 1000 - DATA.written;
    const why = state === "interrupted" && reason ? ` (${reason})` : "";
    const when = state === "running" ? `written ${duration(age)} ago` : `ended ${moment(DATA.written)}`;
    put("written", `step ${step.toLocaleString("en")} of ${steps.toLocaleString("en")}, epoch ${epochOf(step)} of ${epochs}${why}; ${when}`, button);
  };
  written();
  if (state === "running") setInterval(written, 10000);
  if (state === "running" && follows) setTimeout(() => location.reload(), 20000);
}

function tile(name, value, more) {
  return element("div", {class: "tile"}, element("div", {class: "name"}, name), element("div", {class: "value"}, value), element("div", {class: "more"}, more || ""));
}

function tiles() {
  const tiles = [], loss = DATA.curves.loss || EMPTY, now = last(DATA.runs), done = DATA.status.step - now.from_step;
  const mean = smooth(loss);
  if (loss.x.length) {
    const ends = mean || loss, start = ends.y[Math.floor(ends.y.length / 10)];
    tiles.push(tile(mean ? "Loss (mean)" : "Loss", number(last(ends.y)), mean && loss.x.length > 20 ? `${number(start, 3)} early on` : ""));
  }
  const validations = ["validation step", "validation epoch"].flatMap((name) => {
    const curve = DATA.curves[name] || EMPTY;
    return curve.x.map((x, index) => ({x, y: curve.y[index]}));
  }).sort((a, b) => a.x - b.x);
  if (validations.length)
    tiles.push(tile("Validation loss", number(last(validations).y), validations.length > 1 ? `${number(validations[0].y, 3)} at step ${validations[0].x}` : ""));
  const used = DATA.runs.reduce((sum, run) => sum + run.until - run.started, 0);
  tiles.push(tile("Time", duration(used), `since ${moment(DATA.runs[0].started)}`));
  const rate = done > 0 ? (now.until - now.trains_since) / done : 0;
  if (rate) tiles.push(tile("Per step", rate < 1 ? `${number(rate, 2)} s` : `${number(rate, 3)} s`, "with samples and files"));
  if (rate && DATA.status.state === "running") tiles.push(tile("Left", duration(rate * (DATA.plan.steps - DATA.status.step)), ""));
  const file = last(DATA.files.filter((file) => file.kind === "network"));
  if (file) tiles.push(tile("LoRA file", bytes(file.size), file.name));
  put("tiles", ...tiles);
}

function smooth(curve) {
  if (curve.x.length < 20) return null;
  const span = smoothingSpan(curve);
  return {...movingMean(curve, span), span};
}

// About a twentieth of the run, as a round number of steps.
function smoothingSpan(curve) {
  const steps = (last(curve.x) - curve.x[0]) / 20, power = 10 ** Math.floor(Math.log10(Math.max(steps, 1)));
  return Math.max(10, Math.round(steps / power) * power);
}

function show(id, spec) {
  const holder = document.getElementById(id);
  holder.hidden = !spec.series.some((one) => one.x.length);
  if (!holder.hidden) chart(holder, {describe: describeStep, marks: resumes(), ...spec, label: `${spec.name}, a line chart over the training steps; arrow keys show values`});
}

function resumes() {
  return DATA.runs.filter((run) => run.from_step > 0).map((run) => ({x: run.from_step, name: "resumed"}));
}

function curves() {
  const loss = DATA.curves.loss || EMPTY, mean = smooth(loss);
  const notes = [];
  if (loss.stride > 1) notes.push(`Each point of the faint line is the mean of ${loss.stride} steps, the band their range.`);
  if (loss.not_finite) notes.push(`The loss was not a number in ${count(loss.not_finite, "step")}, first in step ${loss.first_not_finite}.`);
  show("loss", {name: "Training loss", height: 300, note: notes.join(" "), series: [
    {...loss, name: "each step", style: mean ? "faint" : "line", color: "--one"},
    ...(mean ? [{...mean, name: `mean of ${mean.span} steps`, style: "line", color: "--one"}] : []),
    {...(DATA.curves["loss epoch"] || EMPTY), low: null, high: null, name: "epoch average", style: "dots", color: "--two"},
  ]});
  show("validation", {name: "Validation loss", height: 220, series: [
    {...(DATA.curves["validation step"] || EMPTY), name: "after steps", style: "dots", color: "--three"},
    {...(DATA.curves["validation epoch"] || EMPTY), name: "after epochs", style: "dots", color: "--four"},
  ]});
  const rates = DATA.rates.map((rate, index) => ({...rate.curve, low: null, high: null, name: rate.names.join(", "), factor: rate.factor, style: "line", color: COLORS[index % 6]}));
  show("rates", {name: "Learning rate", height: 220, series: rates.filter((rate) => !rate.factor)});
  show("factors", {name: "Learning rate x d", height: 220, series: rates.filter((rate) => rate.factor)});
  const small = [...document.querySelectorAll("#curves .card:not(#loss):not([hidden])")];
  if (small.length % 2) last(small).classList.add("wide");
  document.getElementById("curves").hidden = !document.querySelector("#curves .card:not([hidden])");
}

function samples() {
  const {prompts, rounds, dropped} = DATA.samples;
  document.getElementById("samples").hidden = !rounds.length;
  const used = prompts.map((_, number) => number).filter((number) => rounds.some((round) => round.images[number]));
  const name = (round) => round.step === 0 ? "before training" : round.epoch === null ? `step ${round.step}` : `epoch ${round.epoch}`;
  const rows = used.map((number) => rounds.filter((round) => round.images[number]).map((round) => {
    const prompt = prompts[number], image = round.images[number];
    return {key: `${round.step} ${round.epoch}`, source: image.link, fallback: image.thumb, link: image.link, title: `${name(round)}${round.epoch ? `, step ${round.step}` : ""}`,
            lines: [prompt.text, prompt.details], when: name(round), thumb: image.thumb, size: image.size};
  }));
  const notes = [];
  if (rows.some((row) => row.some((item) => !item.thumb))) notes.push("Older images are links to their files in the sample folder, so that this page stays small.");
  if (dropped) notes.push(`${count(dropped, "older round")} of samples ${dropped === 1 ? "is" : "are"} only in the sample folder.`);
  put("samples-note", notes.join(" "));
  const strips = [];
  put("samples-grid", element("div", {class: "card"}, ...rows.map((row, y) => {
    const prompt = prompts[used[y]];
    const strip = element("div", {class: "strip", tabindex: row.length > 4 ? 0 : null}, ...row.map((item, x) => shot(item, rows, y, x)));
    strips.push(strip);
    return element("div", {class: "prompt"}, words(prompt.text || "empty prompt"),
      prompt.negative ? element("p", {class: "small soft"}, `without: ${prompt.negative}`) : null,
      element("div", {class: "small soft"}, prompt.details), strip);
  })));
  together(strips);
  new ResizeObserver(() => fit(strips, rows)).observe(document.getElementById("samples-grid"));
}

// Images as large as lets a row fit on the page, within reason.
function fit(strips, rows) {
  strips.forEach((strip, y) => {
    const widest = Math.max(...rows[y].map((item) => item.size[0] / item.size[1]));
    const room = (strip.clientWidth - 6 - 10 * (rows[y].length - 1)) / rows[y].length / widest;
    strip.style.setProperty("--shot", `${Math.round(Math.min(210, Math.max(strip.clientWidth < 500 ? 128 : 100, room - 0.5)))}px`);
    strip.scrollLeft = strip.scrollWidth;
  });
}

// A long prompt shows its beginning until it is opened.
function words(text) {
  if (text.length < 320) return element("p", {class: "words"}, text);
  return element("details", {class: "words"}, element("summary", {}, text.slice(0, 220) + " ..."), element("p", {}, text));
}

function shot(item, rows, y, x) {
  if (!item.thumb)
    return element("div", {class: "shot linked"}, element("a", {href: item.link}, "open"), element("div", {class: "when"}, item.when));
  const button = element("button", {class: "image", type: "button", "aria-label": `${item.when}: enlarge`, onclick: () => viewer.open(rows, y, x)},
    element("img", {src: item.thumb, alt: "", width: item.size[0], height: item.size[1], decoding: "async"}));
  button.style.aspectRatio = `${item.size[0]} / ${item.size[1]}`;
  return element("div", {class: "shot"}, button, element("div", {class: "when"}, item.when));
}

// All strips show the same steps: they start at the newest and scroll together.
function together(strips) {
  let leader = null;
  for (const strip of strips) {
    strip.scrollLeft = strip.scrollWidth;
    for (const event of ["pointerdown", "pointerenter", "touchstart", "wheel", "focus"]) strip.addEventListener(event, () => { leader = strip; }, {passive: true});
    strip.addEventListener("scroll", () => {
      const hidden = (one) => one.scrollWidth - one.clientWidth;
      if (leader === strip) for (const other of strips) if (other !== strip) other.scrollLeft = hidden(other) * strip.scrollLeft / hidden(strip);
    }, {passive: true});
  }
}

function files() {
  const kinds = {network: "LoRA", state: "state"};
  const rows = DATA.files.slice().reverse().map((file) => element("div", {class: "file"},
    element("span", {class: "name mono"}, file.kind === "network" ? element("a", {href: file.link}, file.name) : file.name),
    element("span", {class: "soft"}, kinds[file.kind]), element("span", {class: "size"}, bytes(file.size)),
    element("span", {class: "soft"}, `step ${file.step.toLocaleString("en")}`), element("span", {class: "soft"}, moment(file.time))));
  if (DATA.removed_files) rows.push(element("p", {class: "note"}, `${count(DATA.removed_files, "older file")} no longer there.`));
  put("files-list", ...(rows.length ? rows : [element("span", {class: "soft"}, "No file was written yet.")]));
}

function facts(pairs) {
  return element("dl", {class: "facts"}, ...pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function run() {
  const pairs = DATA.runs.map((run, index) => {
    const ended = run.state === "running" ? "running" : `${STATES[run.state]} ${moment(run.until)}`;
    return [index ? "Resumed" : "Started", `${moment(run.started)} at step ${run.from_step}; ${ended} at step ${run.to_step}, ${duration(run.until - run.started)}`];
  });
  put("run-facts", facts([...pairs, ...DATA.facts]), spent());
}

// Where the seconds of the last process went.
function spent() {
  const total = Object.values(DATA.times).reduce((sum, seconds) => sum + seconds, 0);
  if (!total) return null;
  const large = Object.entries(DATA.times).filter(([name, seconds]) => name !== "other" && seconds >= total / 100).sort((a, b) => b[1] - a[1]);
  const parts = [...large, ["other", total - large.reduce((sum, part) => sum + part[1], 0)]];
  const colored = parts.map(([name, seconds], index) => {
    const piece = element("span", {}), swatch = element("span", {class: "swatch dots"}), color = index < 6 ? `var(${COLORS[index]})` : "var(--soft)";
    piece.style.width = `${100 * seconds / total}%`;
    piece.style.background = swatch.style.color = color;
    return [piece, element("span", {}, swatch, `${name} ${duration(seconds)} (${Math.round(100 * seconds / total)} %)`)];
  });
  return element("div", {class: "spent"}, element("div", {class: "pieces"}, ...colored.map(([piece]) => piece)),
    element("div", {class: "legend small"}, ...colored.map(([, words]) => words)));
}

function shown(value) {
  if (value === null || value === "") return "unset";
  if (Array.isArray(value)) return value.length ? value.join(" ") : "unset";
  return String(value);
}

function settings() {
  const row = (setting) => element("div", {class: "setting"}, element("span", {class: "mono name"}, setting.name),
    element("span", {class: "mono"}, shown(setting.value)),
    element("span", {class: "help"}, setting.help, setting.changed && setting.default ? ` Default: ${shown(setting.default)}.` : ""));
  const changed = DATA.settings.filter((setting) => setting.changed), groups = new Map();
  for (const setting of DATA.settings)
    if (!setting.changed) groups.set(setting.group, [...(groups.get(setting.group) || []), setting]);
  const others = [...groups].flatMap(([group, list]) => [element("h3", {class: "group"}, group), element("div", {}, ...list.map(row))]);
  put("settings-list", element("div", {}, ...changed.map(row)),
    element("details", {}, element("summary", {}, `${count(DATA.settings.length - changed.length, "option")} with ${changed.length === 1 ? "its default" : "their defaults"}`), ...others));
}

function navigation() {
  const links = [...document.querySelectorAll("main section")].filter((section) => !section.hidden)
    .map((section) => element("a", {href: "#" + section.id}, section.querySelector("h2").textContent));
  put("nav", ...links);
}

for (const part of [head, tiles, curves, samples, files, run, settings, prepareViewer, navigation]) part();
put("data-summary", ...dataSummary(DATA.data));
put("end", `Session ${DATA.session}. This page holds everything it shows but the full-size images, which are links into the sample folder.`);
