// The report of gen_img.py: the images of every prompt line in DATA (library/generation/image_pages.py says what is in it).

const CARDS = DATA.lines.flat();

// What all cards have in common; undefined where they differ.
function shared(cards, read) {
  const first = read(cards[0]);
  return cards.every((card) => read(card) === first) ? first : undefined;
}

const COMMON = Object.keys(CARDS[0]?.settings || {}).filter((name) => shared(CARDS, (card) => card.settings[name]) !== undefined);

function setting(card, name) {
  return `${name} ${card.settings[name]}`;
}

function marks(card) {
  const own = Object.keys(card.settings).filter((name) => !COMMON.includes(name));
  return [`${card.size[0]} x ${card.size[1]}`, ...own.map((name) => setting(card, name))];
}

const positive = (card) => card.prompt || "empty prompt";
const negative = (card) => card.negative ? `negative prompt: ${card.negative}` : "";

function sample(card, rows, y, x, texts) {
  const image = element("button", {class: "image", type: "button", "aria-label": `${card.name}: enlarge`, onclick: () => viewer.open(rows, y, x)},
    element("img", {src: card.image, alt: "", width: card.size[0], height: card.size[1], decoding: "async", loading: "lazy"}));
  image.style.aspectRatio = `${card.size[0]} / ${card.size[1]}`;
  return element("article", {class: "sample"}, image,
    element("div", {class: "about"},
      ...texts.map((text) => element("p", {class: "caption"}, text)),
      element("p", {class: "file mono"}, card.name),
      element("ul", {class: "marks"}, ...marks(card).map((text) => element("li", {}, text)))));
}

function lines() {
  const rows = DATA.lines.map((cards) => cards.map((card) => ({
    source: card.link, fallback: card.image, link: card.link, title: card.name,
    lines: [positive(card), negative(card), [marks(card)[0], ...Object.keys(card.settings).map((name) => setting(card, name))].join(", ")].filter(Boolean),
  })));
  put("lines", ...DATA.lines.map((cards, y) => {
    const above = [positive, negative].filter((read) => shared(cards, read) !== undefined), below = [positive, negative].filter((read) => !above.includes(read));
    return element("section", {},
      ...above.map((read) => [read, read(cards[0])]).filter(([, text]) => text).map(([read, text]) =>
        element("p", {class: read === negative ? "soft small" : null}, text)),
      element("div", {class: "cards"}, ...cards.map((card, x) => sample(card, rows, y, x, below.map((read) => read(card)).filter(Boolean)))));
  }));
}

put("name", DATA.name);
put("what", [count(CARDS.length, "image"), ...COMMON.map((name) => setting(CARDS[0], name))].join(", "));
lines();
prepareViewer();
put("end", "Written by --report.");
