// Line charts as inline SVG: axes, lines, dots, and the values under the pointer.

function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Round values that divide [low, high] into about `wanted` parts.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.7);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(Number((index * step).toPrecision(12)));
  return found;
}

// The mean of the last `span` steps at every point of a curve; points stand for `n` values each.
function movingMean(curve, span) {
  let first = 0, total = 0, amount = 0;
  const weight = (index) => curve.y[index] === null ? 0 : (curve.n ? curve.n[index] : 1);
  return {x: curve.x, y: curve.x.map((x, index) => {
    total += (curve.y[index] ?? 0) * weight(index);
    amount += weight(index);
    while (curve.x[first] <= x - span) { total -= (curve.y[first] ?? 0) * weight(first); amount -= weight(first++); }
    return amount > 0 ? total / amount : null;
  })};
}

// The range of the y axis: everything that is drawn boldly, and all but the outermost hundredth of the faint lines.
function range(series) {
  let low = Infinity, high = -Infinity;
  for (const one of series) {
    const values = [...(one.low || one.y), ...(one.high || one.y)].filter((value) => value !== null).sort((a, b) => a - b);
    if (!values.length) continue;
    const cut = one.style === "faint" && values.length > 100 ? Math.floor(values.length / 100) : 0;
    low = Math.min(low, values[cut]);
    high = Math.max(high, values[values.length - 1 - cut]);
  }
  if (low > high) return [0, 1];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
}

// chart(holder, {name, height, series: [{name, style, color, x, y, low?, high?, n?}], marks: [{x, name}], describe})
// style: "line", "faint" (single values behind a mean), "dots". describe(x) is the heading of the values shown.
function chart(holder, spec) {
  const series = spec.series.filter((one) => one.x.length);
  const legend = element("div", {class: "legend small"}, ...series.map((one) => {
    const swatch = element("span", {class: "swatch " + one.style});
    swatch.style.color = `var(${one.color})`;
    return element("span", {}, swatch, one.name);
  }));
  const plot = element("div", {class: "plot", tabindex: 0, role: "img", "aria-label": spec.label});
  const box = element("div", {class: "values small", hidden: true});
  holder.replaceChildren(element("div", {class: "chart-head"}, element("h3", {}, spec.name), legend), plot, spec.note ? element("p", {class: "note"}, spec.note) : "");
  const draw = () => { if (plot.clientWidth) { plot.replaceChildren(drawing(plot, spec, series, box), box); box.hidden = true; } };
  let width = 0;
  new ResizeObserver(() => { if (plot.clientWidth !== width) { width = plot.clientWidth; draw(); } }).observe(plot);
}

function drawing(plot, spec, series, box) {
  const size = {width: plot.clientWidth, height: spec.height}, inner = {left: 56, right: size.width - 22, top: 8, bottom: size.height - 26};
  const firsts = series.map((one) => one.x[0]), lasts = series.map((one) => one.x[one.x.length - 1]);
  const begin = Math.min(0, ...firsts), end = Math.max(begin + 1, ...lasts), [low, high] = range(series);
  const place = {
    x: (x) => inner.left + (inner.right - inner.left) * (x - begin) / (end - begin),
    y: (y) => inner.bottom - (inner.bottom - inner.top) * (Math.min(Math.max(y, low), high) - low) / (high - low),
    step: (x) => begin + (end - begin) * (x - inner.left) / (inner.right - inner.left),
  };
  const chart = svg("svg", {width: size.width, height: size.height, viewBox: `0 0 ${size.width} ${size.height}`, "aria-hidden": "true"});
  const words = Math.max(Math.abs(low), Math.abs(high)) < 0.01 ? exponential : number;
  for (const value of ticks(low, high, Math.max(2, size.height / 55))) {
    chart.append(svg("line", {class: "grid", x1: inner.left, x2: inner.right, y1: place.y(value), y2: place.y(value)}));
    chart.append(svg("text", {x: inner.left - 8, y: place.y(value) + 4, "text-anchor": "end"}, words(value, 3)));
  }
  for (const value of ticks(begin, end, Math.max(2, size.width / 110)))
    if (Number.isInteger(value)) chart.append(svg("text", {x: place.x(value), y: inner.bottom + 18, "text-anchor": "middle"}, value.toLocaleString("en")));
  chart.append(svg("line", {class: "axis", x1: inner.left, x2: inner.right, y1: inner.bottom, y2: inner.bottom}));
  for (const mark of spec.marks || []) {
    if (mark.x <= begin || mark.x >= end) continue;
    chart.append(svg("line", {class: "mark", x1: place.x(mark.x), x2: place.x(mark.x), y1: inner.top, y2: inner.bottom}));
    chart.append(svg("text", {class: "mark", x: place.x(mark.x) + 4, y: inner.top + 9}, mark.name));
  }
  for (const one of series) chart.append(...drawn(one, place));
  const pointer = svg("g", {class: "pointer", visibility: "hidden"});
  chart.append(pointer);
  follow(plot, chart, pointer, box, spec, series, place, inner);
  return chart;
}

function drawn(one, place) {
  const parts = [];
  const line = (ys) => {
    let path = "", open = false;
    ys.forEach((y, index) => {
      if (y !== null) path += `${open ? "L" : "M"}${place.x(one.x[index]).toFixed(1)} ${place.y(y).toFixed(1)}`;
      open = y !== null;
    });
    return path;
  };
  const add = (name, attributes) => {
    const made = svg(name, attributes);
    made.style.color = `var(${one.color})`;
    parts.push(made);
  };
  if (one.low) {
    const known = one.x.map((_, index) => index).filter((index) => one.y[index] !== null);
    const edge = (values, order) => order.map((index) => `${place.x(one.x[index]).toFixed(1)} ${place.y(values[index]).toFixed(1)}`).join("L");
    if (known.length > 1) add("path", {class: "band", d: `M${edge(one.high, known)}L${edge(one.low, known.slice().reverse())}Z`});
  }
  if (one.x.length > 1) add("path", {class: "line " + one.style, d: line(one.y), "data-points": one.x.length, "data-name": one.name});
  if (one.style === "dots" && one.x.length <= 80 || one.x.length === 1)
    one.x.forEach((x, index) => { if (one.y[index] !== null) add("circle", {class: "dot", cx: place.x(x), cy: place.y(one.y[index]), r: 3}); });
  return parts;
}

function follow(plot, chart, pointer, box, spec, series, place, inner) {
  let x = null;
  const hide = () => { box.hidden = true; pointer.setAttribute("visibility", "hidden"); };
  const show = () => {
    // The longest curve says which steps there are; every other one shows its nearest point.
    const main = series.reduce((a, b) => b.x.length > a.x.length ? b : a);
    const at = main.x[nearest(main.x, x)], left = place.x(at);
    pointer.replaceChildren(svg("line", {x1: left, x2: left, y1: inner.top, y2: inner.bottom}));
    const rows = series.map((one) => {
      const index = nearest(one.x, at), value = one.y[index];
      if (value !== null) {
        const dot = svg("circle", {cx: place.x(one.x[index]), cy: place.y(value), r: 3.5});
        dot.style.color = `var(${one.color})`;
        pointer.append(dot);
      }
      const swatch = element("span", {class: "swatch " + one.style});
      swatch.style.color = `var(${one.color})`;
      const spread = one.low && one.low[index] !== null && one.low[index] !== one.high[index] ? ` (${number(one.low[index], 3)} to ${number(one.high[index], 3)})` : "";
      const where = one.x[index] === at ? "" : ` at ${one.x[index].toLocaleString("en")}`;
      return element("div", {}, swatch, `${one.name}${where} `, element("strong", {}, number(value)), spread);
    });
    pointer.setAttribute("visibility", "visible");
    box.replaceChildren(element("div", {class: "soft"}, spec.describe(at)), ...rows);
    box.hidden = false;
    const room = plot.clientWidth - box.offsetWidth;
    box.style.left = `${Math.max(0, Math.min(room, left > plot.clientWidth / 2 ? left - box.offsetWidth - 12 : left + 12))}px`;
  };
  const to = (event) => { x = place.step(event.clientX - chart.getBoundingClientRect().left); show(); };
  chart.addEventListener("pointermove", to);
  chart.addEventListener("pointerdown", to);
  chart.addEventListener("pointerleave", hide);
  plot.onblur = hide;
  plot.onkeydown = (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    const main = series.reduce((a, b) => b.x.length > a.x.length ? b : a);
    const now = x === null ? main.x.length - 1 : nearest(main.x, x) + (event.key === "ArrowLeft" ? -1 : 1);
    x = main.x[Math.min(Math.max(now, 0), main.x.length - 1)];
    show();
  };
}
