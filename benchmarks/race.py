"""Contenders on the same task, a run each in turn."""

import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import MIB
from benchmarks.outcome import share_different
from benchmarks.responder import Responder
from blip.config import COMPUTING, DTYPES


class Contender(Responder):
    """A running benchmarks/contender.py, in the environment of the interpreter `python`."""

    def __init__(self, python: Path, name: str, tasks: Sequence[str], *, small: bool = False) -> None:
        environment = {**COMPUTING, **os.environ} if name in DTYPES else {}  # ours as it is served
        super().__init__(python, ["benchmarks.contender", *(["--small"] if small else []), name, *tasks], environment)
        self.name = name
        self.runs: list[dict[str, Any]] = []

    def run(self, task: str, seed: int) -> None:
        """Time one request on the image of `seed`."""
        self.runs.append(self.ask(f"{task} {seed}"))


def race(pythons: Mapping[str, Path], task: str, rounds: int) -> list[dict[str, Any]]:
    """All contenders at full size on one task, each in a process of its own; their rows, LAVIS's first."""
    with ExitStack() as stack:
        contenders = []
        for name, python in pythons.items():  # one after another: loading is no part of the race
            contender = stack.enter_context(Contender(python, name, [task]))
            contenders.append(contender)
            contender.run(task, 0)
        return take_turns(contenders, task, rounds)


def race_small(pythons: Mapping[str, Path], tasks: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The same with small models, all tasks in one process of each contender, one round; the rows by task."""
    with ExitStack() as stack:
        contenders = [
            stack.enter_context(Contender(python, name, tasks, small=True)) for name, python in pythons.items()
        ]
        return [take_turns(contenders, task, rounds=1) for task in tasks]


def take_turns(contenders: Sequence[Contender], task: str, rounds: int) -> list[dict[str, Any]]:
    """Run `rounds` on one task; return the medians and their ratios to the first contender's."""
    for contender in contenders:
        contender.runs.clear()
    for seed in range(rounds):
        for contender in contenders:
            contender.run(task, seed)
    return [row(task, contender, contenders) for contender in contenders]


def row(task: str, contender: Contender, others: Sequence[Contender]) -> dict[str, Any]:
    """What one contender did on one task, beside LAVIS, which is the first of the others."""
    lavis = others[0]
    same_weights = {"openvino": "hf", **dict.fromkeys(DTYPES, lavis.name)}  # by the first part of the name
    reference = next((other for other in others if other.name == same_weights.get(contender.name.split("-")[0])), None)
    seconds = [run["seconds"] for run in contender.runs]
    median = statistics.median(seconds)
    found: dict[str, Any] = {
        "task": task,
        "contender": contender.name,
        "median_s": round(median, 4),
        "fastest_s": round(min(seconds), 4),
        "ratio": round(statistics.median(run["seconds"] for run in lavis.runs) / median, 2),
        "peak_mib": round(max(run["peak"] for run in contender.runs) / MIB),
    }
    if reference:
        runs = zip(contender.runs, reference.runs, strict=True)
        pairs = [(ours["output"], theirs["output"]) for ours, theirs in runs]
        if task == "match":
            found["largest_difference"] = max(abs(_probability(ours) - _probability(theirs)) for ours, theirs in pairs)
        else:
            found["different"] = share_different(pairs)
    return found


def _probability(match: Any) -> float:
    """Of one match, or of the first in a batch."""
    first = match[0]
    return float(first[0] if isinstance(first, list) else first)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One task's rows."""
    print(f"\n{rows[0]['task']:17} {'median':>9} {'ratio':>7} {'peak':>10} {'different':>10}")
    for row in rows:
        different = f"{row['different']:.1%}" if "different" in row else "-"
        if "largest_difference" in row:
            different = f"{row['largest_difference']:.1e}"
        memory = f"{row['peak_mib']} MiB"
        print(
            f"{row['contender']:17} {row['median_s']:7.3f} s {row['ratio']:6.1f}x {memory:>10} {different:>10}",
            flush=True,
        )
