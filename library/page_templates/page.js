"use strict";
// What both pages share: elements from data, words for numbers, and the viewer for images.

const DATA = JSON.parse(document.getElementById("data").textContent);

// element("div", {class: "card"}, "text", child, null): texts become text nodes, never HTML.
function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function put(id, ...children) {
  document.getElementById(id).replaceChildren(...children.flat().filter(Boolean));
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "not a number";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e6) return exponential(value, digits);
  return String(Number(value.toPrecision(digits)));
}

function exponential(value, digits) {
  return value === 0 ? "0" : value.toExponential(digits - 1).replace(/\.?0+e/, "e");
}

function count(amount, one, many) {
  return `${amount.toLocaleString("en")} ${amount === 1 ? one : many || one + "s"}`;
}

function bytes(size) {
  for (const [unit, worth] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]])
    if (size >= worth) return `${(size / worth).toFixed(size / worth < 10 ? 2 : size / worth < 100 ? 1 : 0)} ${unit}`;
  return `${size} B`;
}

function duration(seconds) {
  const total = Math.max(0, Math.round(seconds));
  const days = Math.floor(total / 86400), hours = Math.floor(total / 3600) % 24, minutes = Math.floor(total / 60) % 60;
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  if (minutes) return minutes < 10 && total % 60 ? `${minutes} min ${total % 60} s` : `${minutes} min`;
  return `${total} s`;
}

function moment(seconds) {
  const date = new Date(seconds * 1000), year = date.getFullYear() === new Date().getFullYear() ? undefined : "numeric";
  return date.toLocaleString(undefined, {year, month: "short", day: "numeric", hour: "numeric", minute: "2-digit"});
}

// Rows of {source, fallback, title, lines, link}; arrows walk along a row and from row to row.
const viewer = {
  rows: [], row: 0, column: 0,
  open(rows, row, column) {
    Object.assign(this, {rows, row, column});
    this.show();
    document.getElementById("viewer").showModal();
  },
  show() {
    const item = this.rows[this.row][this.column];
    const image = element("img", {alt: item.title});
    image.addEventListener("error", () => { if (item.fallback && image.src !== item.fallback) image.src = item.fallback; });
    image.src = item.source;
    put("viewer-words", element("strong", {}, item.title), ...item.lines.map((line) => element("div", {class: "soft small"}, line)));
    put("viewer-stage", image);
    document.getElementById("viewer-open").hidden = !item.link;
    if (item.link) document.getElementById("viewer-open").href = item.link;
    const row = this.rows[this.row];
    for (const [id, off] of [["previous", this.column === 0], ["next", this.column === row.length - 1],
                             ["up", this.row === 0], ["down", this.row === this.rows.length - 1]])
      document.getElementById("viewer-" + id).disabled = off;
    for (const id of ["up", "down"]) document.getElementById("viewer-" + id).hidden = this.rows.length < 2;
  },
  walk(right, down) {
    const row = this.row + down;
    if (!this.rows[row]) return;
    const same = this.rows[row].findIndex((item) => item.key !== undefined && item.key === this.rows[this.row][this.column].key);
    const column = right ? this.column + right : same >= 0 ? same : Math.min(this.column, this.rows[row].length - 1);
    if (!this.rows[row][column]) return;
    Object.assign(this, {row, column});
    this.show();
  },
};

function prepareViewer() {
  const dialog = document.getElementById("viewer"), stage = document.getElementById("viewer-stage");
  const moves = {previous: [-1, 0], next: [1, 0], up: [0, -1], down: [0, 1]};
  for (const [id, way] of Object.entries(moves))
    document.getElementById("viewer-" + id).addEventListener("click", () => viewer.walk(...way));
  document.getElementById("viewer-close").addEventListener("click", () => dialog.close());
  const keys = {ArrowLeft: "previous", ArrowRight: "next", ArrowUp: "up", ArrowDown: "down"};
  dialog.addEventListener("keydown", (event) => {
    if (!keys[event.key]) return;
    event.preventDefault();
    viewer.walk(...moves[keys[event.key]]);
  });
  let start = null;
  stage.addEventListener("touchstart", (event) => { start = event.touches[0].clientX; }, {passive: true});
  stage.addEventListener("touchend", (event) => {
    const moved = start === null ? 0 : event.changedTouches[0].clientX - start;
    if (Math.abs(moved) > 40) viewer.walk(moved < 0 ? 1 : -1, 0);
  });
}

function dataSummary(groups) {
  const parts = [];
  for (const group of groups) {
    const repeated = group.samples === group.images ? "" : `, ${group.samples.toLocaleString("en")} per epoch with repeats`;
    parts.push(element("h3", {}, `${group.title}: ${count(group.images, "image")}${repeated}`));
    for (const dataset of group.datasets) {
      const subsets = dataset.subsets.map((subset) => element("li", {},
        element("span", {class: "mono"}, subset.name), ` ${subset.regularisation ? "(regularisation) " : ""}`,
        element("span", {class: "soft"}, `${count(subset.images, "image")} x ${count(subset.repeats, "repeat")}${subset.trigger || ""}`)));
      const most = Math.max(...dataset.buckets.map((bucket) => bucket.samples), 1);
      const buckets = dataset.buckets.map((bucket) => {
        const bar = element("span", {class: "bar"});
        bar.style.width = `${Math.max(1.5, 100 * bucket.samples / most)}%`;
        return element("li", {}, element("span", {}, `${bucket.size[0]} x ${bucket.size[1]}`), element("span", {class: "track"}, bar),
                       element("span", {class: "soft"}, String(bucket.samples)));
      });
      parts.push(element("div", {class: "dataset"},
        element("p", {class: "soft small"}, `${dataset.resolution[0]} x ${dataset.resolution[1]} pixels, batch size ${dataset.batch_size}, `
                + `${count(dataset.buckets.length, "bucket")}`),
        element("ul", {class: "subsets small"}, ...subsets),
        dataset.buckets.length > 1 ? element("ul", {class: "buckets small"}, ...buckets) : null));
    }
    for (const note of group.notes) parts.push(element("p", {class: "note"}, note));
  }
  return parts;
}
