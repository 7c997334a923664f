"""Draws the kept results of benchmarks/results as the plots of docs/benchmarks.md: scripts/draw_benchmarks [FOLDER]."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.harness import ROOT

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "blip", "svg.fonttype": "none"})  # the same file each time, its text as text
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
TASKS = {"caption-30": "caption of 30 tokens", "answer-10": "answer of 10 tokens", "match": "match"}
CONTENDERS = {
    "lavis": "LAVIS",
    "hf": "Hugging Face",
    "float32": "ours, float32",
    "bfloat16": "ours, bfloat16",
    "int8": "ours, int8",
}

LINES = ("-", "--", ":")  # of one machine each


Results = Sequence[Mapping[str, Any]]


def latency(axes: Axes, results: Results) -> None:
    """Seconds for each task, a bar for each contender, on the machine where ours leads least."""
    result = results[0]
    medians = {(row["task"], row["contender"]): row["median_s"] for row in result["rows"]}
    height = 0.8 / len(CONTENDERS)
    for number, (contender, name) in enumerate(CONTENDERS.items()):
        places = [place + (number - len(CONTENDERS) / 2 + 0.5) * height for place in range(len(TASKS))]
        bars = axes.barh(places, [medians[task, contender] for task in TASKS], height, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_yticks(range(len(TASKS)), list(TASKS.values()))
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel=f"seconds, the median, on {result['cores']} cores of an {result['cpu']}")


def throughput(axes: Axes, results: Results) -> None:
    """Requests per second by clients, a line for each contender on each machine."""
    for result, style in zip(results, LINES, strict=False):
        for colour, (contender, name) in enumerate({"ours": "ours", "plain": "LAVIS, one at a time"}.items()):
            rows = [row for row in result["rows"] if (row["contender"], row["workload"]) == (contender, "mixed")]
            clients, rates = [row["clients"] for row in rows], [row["requests_per_s"] for row in rows]
            axes.plot(clients, rates, style, marker="o", color=f"C{colour}", label=f"{name}, {result['cpu']}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(clients, [str(number) for number in clients])
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
    axes.set(xlabel=f"clients, on {result['cores']} cores", ylabel="requests per second")


PLOTS: dict[str, Callable[[Axes, Results], None]] = {"latency": latency, "throughput": throughput}


def lead(result: Mapping[str, Any]) -> float:
    """How many times as fast as LAVIS ours is in what people do most."""
    rows = result["rows"]
    if result["benchmark"] == "latency":
        seconds = {row["contender"]: row["median_s"] for row in rows if row["task"] == "caption-30"}
        return float(seconds["lavis"] / seconds["float32"])
    (ratio,) = (row["ratio"] for row in rows if (row["workload"], row["clients"]) == ("mixed", 8) and "ratio" in row)
    return float(ratio)


def main(argv: Sequence[str]) -> None:
    """Draw all of them into a folder."""
    folder = Path(argv[0]) if argv else DOCS
    for name, draw in PLOTS.items():
        figure, axes = plt.subplots(figsize=(8, 4))
        kept = [json.loads(path.read_text()) for path in RESULTS.glob(f"{name}-cpu*.json")]
        draw(axes, sorted(kept, key=lead))
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
