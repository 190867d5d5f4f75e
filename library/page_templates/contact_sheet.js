// The contact sheet: a grid of cards for every bucket in DATA (library/data/contact_sheet.py says what is in it).

function marks(card) {
  const found = [];
  if (card.repeats > 1) found.push([`${card.repeats} repeats`, true]);
  if (card.mirrored) found.push(["mirrored", true]);
  if (card.weight !== undefined && card.weight !== 1) found.push([`weight ${number(card.weight, 3)}`, true]);
  if (card.multiplier !== undefined && card.multiplier !== 1) found.push([`multiplier ${number(card.multiplier, 3)}`, true]);
  if (card.original) found.push([`${card.original[0]} x ${card.original[1]}`]);
  if (card.crop && (card.crop[0] || card.crop[1])) found.push([`crop from ${number(card.crop[1])}, ${number(card.crop[0])}`]);
  if (card.lost >= 0.005) found.push([`${Math.round(card.lost * 100)} % cut off`]);
  for (const [name, value] of Object.entries(card.attributes || {})) found.push([`${name}: ${value}`]);
  if (card.image && card.note) found.push([card.note]);
  return found;
}

function sample(card, bucket, rows, y, x) {
  const shape = `${bucket.size[0]} / ${bucket.size[1]}`;
  const image = card.image
    ? element("button", {class: "image", type: "button", "aria-label": `${card.name}: enlarge`, onclick: () => viewer.open(rows, y, x)},
        element("img", {src: card.image, alt: "", width: card.size[0], height: card.size[1], decoding: "async"}))
    : element("div", {class: "none"}, card.note);
  image.style.aspectRatio = shape;
  const extras = (card.extras || []).map(([name, source]) =>
    element("figure", {}, element("img", {src: source, alt: name}), element("figcaption", {}, name)));
  return element("article", {class: "sample"}, image, extras.length ? element("div", {class: "extras"}, ...extras) : null,
    element("div", {class: "about"},
      element("p", {class: "caption" + (card.caption ? "" : " missing")}, card.caption || "empty caption"),
      element("p", {class: "file mono"}, `${card.subset}/${card.name}`),
      element("ul", {class: "marks"}, ...marks(card).map(([text, strong]) => element("li", {class: strong ? "strong" : null}, text)))));
}

function viewerRows() {
  return DATA.buckets.map((bucket) => bucket.cards.map((card) => {
    const lines = [card.caption || "empty caption"];
    if (card.source !== undefined && card.source !== card.caption) lines.push(`in the file: ${card.source || "nothing"}`);
    lines.push([`${bucket.size[0]} x ${bucket.size[1]}`, ...marks(card).map(([text]) => text)].join(", "));
    return {source: card.image || "", fallback: card.image || "", link: card.link, title: card.name, lines};
  }));
}

function buckets() {
  const rows = viewerRows(), several = DATA.data[0].datasets.length > 1;
  const name = (bucket) => `${bucket.size[0]} x ${bucket.size[1]}`;
  put("buckets", ...DATA.buckets.map((bucket, y) => element("section", {id: `bucket-${y}`},
    element("div", {class: "bucket-head"}, element("h2", {}, name(bucket)),
      element("span", {class: "soft small"}, `${several ? `data set ${bucket.dataset}, ` : ""}${count(bucket.images, "image")}, ${count(bucket.samples, "sample")} per epoch`
        + (bucket.more ? `; ${bucket.more.toLocaleString("en")} more not shown here` : ""))),
    element("div", {class: "cards"}, ...bucket.cards.map((card, x) => sample(card, bucket, rows, y, x))))));
  if (DATA.buckets.length > 1)
    put("nav", ...DATA.buckets.map((bucket, y) => element("a", {href: `#bucket-${y}`}, name(bucket))));
}

put("name", `${DATA.name}: data set`);
put("data-summary", ...dataSummary(DATA.data));
buckets();
prepareViewer();
put("end", "Written by --debug_dataset. Nothing was trained.");
