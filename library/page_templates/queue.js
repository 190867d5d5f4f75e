// The page of tools/run_queue.py: one card for each job in DATA, in the order in which they run.

const LINKS = {report: "report", lora: "LoRA file", average: "moving average", log: "log"};

function job(entry) {
  const links = Object.entries(LINKS).filter(([name]) => entry.links[name]);
  return element("li", {class: "card"},
    element("div", {class: "title"}, element("h2", {}, entry.name), element("span", {class: "pill " + entry.kind}, entry.state)),
    element("p", {class: "soft small"}, [entry.script, entry.started && `started ${entry.started}`, entry.took && `took ${entry.took}`].filter(Boolean).join(", ")),
    entry.error ? element("p", {class: "problem mono"}, entry.error) : null,
    links.length ? element("p", {class: "links"}, ...links.map(([name, words]) => element("a", {href: entry.links[name]}, words))) : null);
}

const states = ["running", "done", "failed", "interrupted", "waiting"];
const counted = states.map((state) => [DATA.jobs.filter((entry) => entry.kind === state).length, state]).filter(([amount]) => amount);
put("what", `${count(DATA.jobs.length, "job")}: ${counted.map(([amount, state]) => `${amount} ${state}`).join(", ")}`);
put("jobs", ...DATA.jobs.map(job));
