"use strict";
// What the studio's pages do by themselves: search in a form, the chooser of paths, copying, and what changes while runs go on.
// Texts of files and runs become text nodes only, never HTML.

const at = (id) => document.getElementById(id);

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

async function read(address) {
  const answer = await fetch(address, {headers: {Accept: "application/json"}, cache: "no-store"});
  if (!answer.ok) throw new Error(String(answer.status));
  return answer.json();
}

// ---- a form: search, what is set -------------------------------------------------------------------------------------

function prepareSearch() {
  const find = at("find"), only = at("only-set"), groups = [...document.querySelectorAll("details.group")];
  const open = new Map(groups.map((group) => [group, group.open]));
  const links = new Map([...document.querySelectorAll(".groups a")].map((link) => [link.hash.slice(1), link]));
  const isSet = (field) => {
    const input = field.querySelector("input, select, textarea");
    return input.type === "checkbox" ? input.checked !== input.defaultChecked || field.classList.contains("set") : input.value !== "";
  };
  let looking = false;
  function look() {
    const words = find.value.toLowerCase().replace(/^--/, "").split(/\s+/).filter(Boolean), narrowed = words.length > 0 || only.checked;
    if (!looking && narrowed) for (const group of groups) open.set(group, group.open);
    let found = 0;
    for (const group of groups) {
      let here = 0;
      for (const field of group.querySelectorAll(".field")) {
        const shown = words.every((word) => field.dataset.words.includes(word)) && (!only.checked || isSet(field));
        field.hidden = !shown;
        here += shown;
      }
      group.hidden = here === 0;
      if (links.has(group.id)) links.get(group.id).hidden = here === 0;
      if (narrowed) group.open = here > 0;
      else if (looking) group.open = open.get(group);
      found += here;
    }
    looking = narrowed;
    at("found").textContent = narrowed ? `${found} ${found === 1 ? "option" : "options"}` : "";
    at("nothing").hidden = found > 0;
  }
  find.addEventListener("input", look);
  only.addEventListener("change", look);
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      find.focus();
    }
  });
  find.addEventListener("keydown", (event) => {
    if (event.key === "Enter") event.preventDefault();
    if (event.key === "Escape") { find.value = ""; look(); }
  });
  const reveal = () => {  // a link to a field or a group opens what it is in
    const target = location.hash && at(decodeURIComponent(location.hash.slice(1)));
    const group = target && target.closest("details.group");
    if (group) { group.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", reveal);
  reveal();
  let changed = false;
  at("options").addEventListener("input", (event) => { if (event.target.name) changed = true; });
  at("options").addEventListener("submit", () => { changed = false; });
  addEventListener("beforeunload", (event) => { if (changed) event.preventDefault(); });
  const wrong = document.querySelector("[aria-invalid]");
  if (wrong) wrong.focus();
}

// ---- the chooser of paths --------------------------------------------------------------------------------------------

function prepareChooser() {
  const dialog = at("chooser"), list = at("chooser-list"), take = at("chooser-take");
  let input = null, files = false, here = "";
  function put(path) {
    input.value = path;
    input.dispatchEvent(new Event("input", {bubbles: true}));
    dialog.close();
  }
  async function go(path) {
    let found;
    try { found = await read(`/folders?${new URLSearchParams({path, files: files ? "1" : ""})}`); }
    catch (error) { if (path !== "") go(""); return; }
    here = found.path;
    at("chooser-path").textContent = here;
    at("chooser-roots").replaceChildren(...found.roots.map((root) => element("button", {type: "button", class: "small", onclick: () => go(root)}, root)));
    const up = found.parent === null ? [] : [{name: "..", path: found.parent, images: 0}];
    const folders = [...up, ...found.folders].map((folder) => element("li", {},
      element("button", {type: "button", onclick: () => go(folder.path)}, `${folder.name}/`,
        folder.images ? element("span", {class: "soft small"}, `${folder.images} images`) : null)));
    const named = found.files.map((file) => element("li", {}, element("button", {type: "button", onclick: () => put(file.path)}, file.name)));
    list.replaceChildren(...folders, ...named, ...(found.more ? [element("li", {class: "soft small"}, "There is more in it than is shown.")] : []));
    list.scrollTop = 0;
  }
  for (const button of document.querySelectorAll("button.choose")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      input = at(button.dataset.for);
      files = button.dataset.kind === "file";
      at("chooser-title").textContent = files ? "Choose a file or a folder" : "Choose a folder";
      dialog.showModal();
      go(input.value);
    });
  }
  take.addEventListener("click", () => put(here));
  at("chooser-close").addEventListener("click", () => dialog.close());
}

// ---- commands to copy ------------------------------------------------------------------------------------------------

function prepareCopying() {
  if (!navigator.clipboard) return;
  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
}

// ---- runs and the queue, as they go on -------------------------------------------------------------------------------

function again(look, seconds) {
  setTimeout(async () => {
    if (document.hidden) return again(look, seconds);
    let goes = true;
    try { goes = await look(); } catch (error) { /* the studio may be starting again */ }
    if (goes) again(look, seconds);
  }, seconds * 1000);
}

function prepareRun(run) {
  let shown = JSON.parse(at("live").textContent), loaded = shown.page;
  const log = at("log");
  log.scrollTop = log.scrollHeight;
  function show(live) {
    at("state").textContent = live.state;
    at("state").className = `pill ${live.state}`;
    document.title = document.title.replace(/: [^:]*$/, `: ${live.state}`);
    at("took").textContent = live.took;
    at("error").hidden = !live.error;
    at("error").textContent = live.error;
    at("verdict").hidden = !live.verdict.length;
    at("verdict").classList.toggle("not", live.verdict.some((line) => line.startsWith("Verdict: does not fit")));
    at("verdict").replaceChildren(...live.verdict.map((line) => element("p", {}, line)));
    at("going").hidden = !live.progress;
    if (live.progress) {
      at("progress").max = Math.max(1, live.progress.total);
      at("progress").value = live.progress.done;
      at("going-words").textContent = `${live.progress.name} ${live.progress.done} of ${live.progress.total}  ${live.progress.more}`;
    }
    for (const part of document.querySelectorAll("[data-when]"))
      part.hidden = !(part.dataset.when === live.state || (part.dataset.when === "resumable" && live.resumable));
    at("stop").textContent = live.wishes ? "Stop at once" : "Stop";
    at("stopping").hidden = !(live.wishes && live.state === "running");
    if (live.log !== shown.log) {
      const below = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      log.textContent = live.log;
      if (below) log.scrollTop = log.scrollHeight;
    }
    if (JSON.stringify(live.images) !== JSON.stringify(shown.images)) {
      at("images-section").hidden = !live.images.length;
      const known = new Map([...at("images").children].map((item) => [item.querySelector("img").getAttribute("src"), item]));
      at("images").replaceChildren(...live.images.map((image) => known.get(image.at) || element("li", {},
        element("a", {href: image.at, target: "_blank", rel: "noopener"}, element("img", {src: image.at, alt: image.name})))));
    }
    at("files-section").hidden = !live.files.length;
    at("files").replaceChildren(...live.files.map((file) => element("li", {},
      element("span", {class: "mono"}, file.name), " ", element("span", {class: "soft small"}, `${file.kind}, ${file.size}`))));
    const page = at("page");  // a page that somebody reads at this moment is not taken away
    if (page && live.page && live.page !== loaded && !page.matches(":hover") && document.activeElement !== page) {
      at("page-section").hidden = false;
      page.src = `${run.dataset.page}?${loaded = live.page}`;
    }
    shown = live;
  }
  if (shown.state === "running")
    again(async () => { show(await read(run.dataset.live)); return shown.state === "running"; }, 1);
}

function prepareQueue(queue) {
  if (!queue.dataset.running) return;
  again(async () => {
    const live = await read(queue.dataset.live);
    if ((live.running || "") !== queue.dataset.running) { location.reload(); return false; }
    for (const job of live.jobs) {
      const row = queue.querySelector(`[data-name="${CSS.escape(job.name)}"]`);
      if (!row) continue;
      const pill = row.querySelector(".pill"), progress = job.progress;
      if (pill.textContent !== job.state) { location.reload(); return false; }
      row.querySelector(".words").textContent = (progress ? `${progress.name} ${progress.done} of ${progress.total}, ` : "") + job.took;
    }
    return true;
  }, 2);
}

document.addEventListener("DOMContentLoaded", () => {
  if (at("find")) prepareSearch();
  if (at("chooser")) prepareChooser();
  prepareCopying();
  if (at("run")) prepareRun(at("run"));
  if (at("queue")) prepareQueue(at("queue"));
});
