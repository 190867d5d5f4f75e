// The report of gen_img.py: the images of every prompt line in DATA (library/generation/image_pages.py says what is in it).

function shared(cards, read) {
  const first = read(cards[0]);
  return cards.every((card) => read(card) === first) ? first : undefined;
}

function marks(card) {
  return [`${card.size[0]} x ${card.size[1]}`, ...Object.entries(card.settings).map(([name, value]) => `${name} ${value}`)];
}

function words(card) {
  const lines = [card.prompt || "empty prompt"];
  if (card.negative) lines.push(`negative prompt: ${card.negative}`);
  return lines;
}

function sample(card, rows, y, x, prompt) {
  const image = element("button", {class: "image", type: "button", "aria-label": `${card.name}: enlarge`, onclick: () => viewer.open(rows, y, x)},
    element("img", {src: card.image, alt: "", width: card.size[0], height: card.size[1], decoding: "async", loading: "lazy"}));
  image.style.aspectRatio = `${card.size[0]} / ${card.size[1]}`;
  return element("article", {class: "sample"}, image,
    element("div", {class: "about"},
      prompt === undefined ? element("p", {class: "caption"}, words(card)[0]) : null,
      element("p", {class: "file mono"}, card.name),
      element("ul", {class: "marks"}, ...marks(card).map((text) => element("li", {}, text)))));
}

function lines() {
  const rows = DATA.lines.map((cards) => cards.map((card) => (
    {source: card.link, fallback: card.image, link: card.link, title: card.name, lines: [...words(card), marks(card).join(", ")]})));
  put("lines", ...DATA.lines.map((cards, y) => {
    const prompt = shared(cards, (card) => words(card).join("\n"));
    return element("section", {},
      ...(prompt === undefined ? [] : prompt.split("\n").map((line, place) => element("p", {class: place ? "soft small" : ""}, line))),
      element("div", {class: "cards"}, ...cards.map((card, x) => sample(card, rows, y, x, prompt))));
  }));
}

put("name", DATA.name);
put("what", count(DATA.lines.reduce((sum, cards) => sum + cards.length, 0), "image"));
lines();
prepareViewer();
put("end", "Written by --report.");
