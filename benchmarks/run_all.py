"""Run every benchmark, keep the figures, and print them as a Markdown table.

    python benchmarks/run_all.py                                 # about ten minutes on an idle machine
    python benchmarks/run_all.py --write                         # and put the table into benchmarks/README.md
    python benchmarks/run_all.py --only first_step loop_overhead

Each program runs as a user runs it, one after another. The figures go to ``benchmarks/results.json``; a run of some
benchmarks (``--only``) replaces their figures there and leaves the others.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import ROOT, Measure, environment, parser
from library.files import write_text

FOLDER = Path(__file__).resolve().parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
RUNS = {
    "help_time": [["help_time.py"]],
    "first_step": [["first_step.py"]],
    "caching": [["caching.py"], ["caching.py", "--encoder_ms", "100", "--source", "768"]],
    "loop_overhead": [["loop_overhead.py"]],
    "load_memory": [["load_memory.py"], ["load_memory.py", "--layout", "diffusers"]],
    "lora_overhead": [["lora_overhead.py", "--repeats", "15"]],
    "dry_run": [["dry_run.py"]],
    "many_images": [["many_images.py"]],
    "fused_backward": [["fused_backward.py"]],
    "block_streaming": [
        ["block_streaming.py", "--parts", "fp8", "steps", "overhead"],
        ["block_streaming.py", "--parts", "load", "--gigabytes", "2"],
    ],
    "scaling": [["scaling.py", "--fsdp"]],
    "train_step": [["train_step.py"]],
    "compile": [["compile.py"]],
    "formats": [["formats.py"]],
    "format_quality": [["format_quality.py"]],
    "gen_img": [["gen_img.py"]],
}


def run(words: list[str]) -> dict[str, Any]:
    """Run one benchmark, show what it prints, and return its JSON line with the command that made it."""
    print(f"\n$ python benchmarks/{' '.join(words)}", flush=True)
    process = subprocess.run(
        [sys.executable, str(FOLDER / words[0]), *words[1:]], stdout=subprocess.PIPE, cwd=ROOT, env=environment()
    )
    output = process.stdout.decode("utf-8", errors="replace")
    if process.returncode:
        sys.exit(f"{output}\nerror: {words[0]} ended with code {process.returncode}")
    *table, line = output.strip().splitlines()
    print("\n".join(table), flush=True)
    return {"command": " ".join(words), **json.loads(line)}


def measures(result: dict[str, Any]) -> list[Measure]:
    """The figures of a result."""
    return [Measure(**{key: value for key, value in entry.items() if key != "met"}) for entry in result["measures"]]


def markdown(results: list[dict[str, Any]]) -> str:
    """The figures as a table, and where they were taken."""
    lines = ["| program | figure | value | target | met |", "| --- | --- | ---: | ---: | :---: |"]
    for result in results:
        for measure in measures(result):
            met = {True: "yes", False: "**no**", None: ""}[measure.met]
            value = f"{measure.value:.3g} {measure.unit}".strip()
            lines.append(f"| `{result['command']}` | {measure.what} | {value} | {measure.target} | {met} |")
    places: dict[str, list[str]] = {}
    for result in results:
        where = result["machine"]
        place = f"{where['date']}, {where['processor']}, {where['cores']} cores, {where['system']}"
        place += f", Python {where['python']}, torch {where['torch']}, one thread"
        places.setdefault(place, []).append(f"`{result['benchmark']}`")
    heads = [f"- {place}: {', '.join(dict.fromkeys(names))}" for place, names in places.items()]
    return "\n".join([*heads, "", *lines])


def into_readme(table: str) -> None:
    """Put the table between the two marks in the README."""
    readme = FOLDER / "README.md"
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        sys.exit(f"error: {readme} has no {BEGIN} ... {END}")
    write_text(readme, pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text))


def main() -> None:
    """Run, keep, print."""
    arguments = parser(__doc__)
    arguments.add_argument("--only", nargs="+", choices=list(RUNS), metavar="NAME", help=f"of {', '.join(RUNS)}")
    arguments.add_argument("--write", action="store_true", help="put the table into benchmarks/README.md")
    arguments.add_argument("--results", type=Path, default=FOLDER / "results.json", help="where the figures go")
    options = arguments.parse_args()
    chosen = options.only or list(RUNS)
    kept = json.loads(options.results.read_text(encoding="utf-8")) if options.only and options.results.exists() else []
    made = [run(words) for name in chosen for words in RUNS[name]]
    by_command = {result["command"]: result for result in (*kept, *made)}
    order = [" ".join(words) for runs in RUNS.values() for words in runs]
    results = [by_command[command] for command in order if command in by_command]
    write_text(options.results, json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    print(f"\n{table}")
    if options.write:
        into_readme(table)


if __name__ == "__main__":
    main()
