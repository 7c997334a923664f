"""One request at a time: LAVIS as the reference build calls it, Hugging Face's BLIP, and our engine in each precision.

    scripts/bench latency [--rounds N] [--task NAME ...] [--scenes N]

Full-size models with random weights, the same for LAVIS and for ours. Each contender has a process of its own, so that
its peak memory is its own; they take turns, so that whatever else the machine does falls on all. Beside the speed of a
precision stands how often its string differs from LAVIS's or, for a match, how far its probability is off at most: on
the random images timed here, whose nearly equal scores are the hardest case, and on scenes drawn for the demo weights.
Prints tables and one line of JSON. A run of all tasks keeps that line under benchmarks/results.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.contender import TASKS
from benchmarks.scenes import disagreement
from blip.config import DTYPES
from blip.precision import PrecisionError, check

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "benchmarks" / "requirements-hf.txt"
MIB = 2**20


class Contender:
    """A running benchmarks/contender.py."""

    def __init__(self, python: Path, name: str, task: str) -> None:
        command: list[str | Path] = [python, "-W", "ignore", ROOT / "benchmarks" / "contender.py", name, task]
        self.name = name
        self.runs: list[dict[str, Any]] = []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> "Contender":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, seed: int) -> None:
        """Time one request on the image of `seed`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"scripts/bench: {self.name} ended early; its message is above.")
        self.runs.append(json.loads(line))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="scripts/bench latency", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each contender on each task (default 7)")
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task; may be repeated")
    parser.add_argument("--scenes", type=int, default=500, help="drawn scenes to compare answers on (default 500)")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pythons = {"lavis": Path(sys.executable), "hf": hf_python()}
    pythons |= {name: Path(sys.executable) for name in precisions(device)}
    rows = []
    for task in options.task or TASKS:
        rows += race(task, pythons, options.rounds)
        print_table(rows[-len(pythons) :])
    scenes = compare_on_scenes(options.scenes, device)
    result = {
        "benchmark": "latency",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine(device),
        "versions": {"ours": versions(Path(sys.executable)), "hf": versions(pythons["hf"])},
        "rounds": options.rounds,
        "rows": rows,
        "scenes": scenes,
    }
    line = json.dumps(result)
    if not options.task:
        kept = ROOT / "benchmarks" / "results" / f"latency-{device.type}.json"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(line + "\n")
    print(line)


def race(task: str, pythons: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """All contenders on one task, a run each in turn; the medians, and what they are to LAVIS's."""
    contenders = []
    for name, python in pythons.items():  # one after another: loading is no part of the race
        contender = Contender(python, name, task)
        contenders.append(contender)
        contender.run(0)
        contender.runs.clear()
    for seed in range(rounds):
        for contender in contenders:
            contender.run(seed)
    for contender in contenders:
        contender.__exit__(None, None, None)
    lavis = contenders[0]
    base = statistics.median(run["seconds"] for run in lavis.runs)
    rows = []
    for contender in contenders:
        seconds = [run["seconds"] for run in contender.runs]
        median = statistics.median(seconds)
        row: dict[str, Any] = {
            "task": task,
            "contender": contender.name,
            "median_s": round(median, 4),
            "fastest_s": round(min(seconds), 4),
            "ratio": round(base / median, 2),
            "peak_mib": round(max(run["peak"] for run in contender.runs) / MIB),
        }
        if contender.name in DTYPES:
            pairs = [
                (ours["output"], theirs["output"]) for ours, theirs in zip(contender.runs, lavis.runs, strict=True)
            ]
            if task == "match":
                row["largest_difference"] = max(abs(ours[0] - theirs[0]) for ours, theirs in pairs)
            else:
                row["different"] = round(sum(ours != theirs for ours, theirs in pairs) / rounds, 4)
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """One task's rows."""
    print(f"\n{rows[0]['task']:12} {'median':>9} {'ratio':>7} {'peak':>10} {'different':>10}")
    for row in rows:
        different = f"{row['different']:.1%}" if "different" in row else "-"
        if "largest_difference" in row:
            different = f"{row['largest_difference']:.1e}"
        memory = f"{row['peak_mib']} MiB"
        print(
            f"{row['contender']:12} {row['median_s']:7.3f} s {row['ratio']:6.1f}x {memory:>10} {different:>10}",
            flush=True,
        )


def compare_on_scenes(count: int, device: torch.device) -> dict[str, Any]:
    """How often each precision's result on the demo weights is not LAVIS's."""
    rates = {name: disagreement(count, device, name) for name in precisions(device)}
    print(f"\nof {count} drawn scenes, different from LAVIS:")
    for name, rate in rates.items():
        shares = "  ".join(f"{task} {rate[task]:.1%}" for task in ("caption", "answer", "match"))
        print(f"{name:12} {shares}  (probability by {rate['largest_difference']:.1e} at most)")
    return {"count": count, "different": rates}


def precisions(device: torch.device) -> list[str]:
    """Those that this machine has."""
    names = []
    for name in DTYPES:
        try:
            check(device, name)
        except PrecisionError as reason:
            print(f"without {name}: {reason}")
        else:
            names.append(name)
    return names


def hf_python() -> Path:
    """The interpreter of an environment with Hugging Face's transformers, made with uv where it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "blip-bench-hf"
    python, installed = cache / "bin" / "python", cache / "requirements-hf.txt"
    if not installed.is_file() or installed.read_text() != REQUIREMENTS.read_text():
        subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", "3.11", cache], check=True)
        subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, "-r", REQUIREMENTS], check=True)
        installed.write_text(REQUIREMENTS.read_text())
    return python


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    found["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions(python: Path) -> dict[str, str]:
    """Of the packages that matter in the environment of `python`."""
    names = ("torch", "transformers", "salesforce-lavis", "timm")
    script = (
        "import importlib.metadata as m, json\n"
        f"print(json.dumps({{d.name: d.version for d in m.distributions() if d.name in {names!r}}}))"
    )
    done = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    return {"python": platform.python_version(), **json.loads(done.stdout)}


if __name__ == "__main__":
    main()
