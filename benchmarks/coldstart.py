"""Process start to READY, and peak memory: the reference's way of loading against ours, at full size.

Both serve random weights in upstream's layout with the same server, started in turn with the files in the page cache.
Ours also makes one real prediction of each task before it is READY; the reference does not.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.coldstart_files import Files, full_size, size, small, warm
from benchmarks.harness import ROOT, START, Server
from benchmarks.machine import processor


@dataclass(frozen=True)
class Start:
    """One start: seconds from exec to READY, and the peak resident memory of the larger process in bytes."""

    seconds: float
    memory: int


def main(argv: Sequence[str]) -> None:
    """Prepare the files and measure."""
    parser = argparse.ArgumentParser(prog="scripts/bench coldstart", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="starts of each contender (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the bundle (%(default)s)"
    )
    parser.add_argument(
        "--files",
        type=Path,
        default=Path("~/.cache/blip-coldstart").expanduser(),
        help="where the checkpoints (6 GB) and the bundle are kept (%(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small models, one start of each, logits not compared: a trial, no result"
    )
    options = parser.parse_args(argv)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            report(measure(small(Path(folder), options.dtype), 1), options)
        return
    files = full_size(options.files, options.dtype)
    if options.dtype == "float32":
        compare_logits(files)
    report(measure(files, options.runs), options)


def compare_logits(files: Files) -> None:
    """Print how far LAVIS's logits with its checkpoints are from ours with the bundle."""
    environment = {**os.environ, **files.environment, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.parity", str(files.bundle)]
    subprocess.run(command, cwd=files.reference, env=environment, check=True)


def measure(files: Files, runs: int) -> dict[str, Any]:
    """Start each contender in turn, print a table and return the numbers."""
    contenders = {
        "reference": (files.reference, files.environment),
        "ours": (ROOT, {"BLIP_WEIGHTS": str(files.bundle)}),
    }
    starts: dict[str, list[Start]] = {name: [] for name in contenders}
    warm(files.checkpoints, files.bundle)
    for run in range(runs):
        for name, (directory, environment) in contenders.items():
            start = time_start(directory, environment)
            starts[name].append(start)
            print(f"run {run + 1}, {name}: {start.seconds:.1f} s, {start.memory / 1e9:.2f} GB", flush=True)

    print(f"\n{'':<12}{'median s':>10}{'min s':>8}{'max s':>8}{'peak GB':>9}{'files GB':>10}")
    sizes = {"reference": size(files.checkpoints), "ours": size(files.bundle)}
    for name, done in starts.items():
        seconds = [start.seconds for start in done]
        memory = max(start.memory for start in done)
        print(
            f"{name:<12}{statistics.median(seconds):>10.1f}{min(seconds):>8.1f}{max(seconds):>8.1f}"
            f"{memory / 1e9:>9.2f}{sizes[name] / 1e9:>10.2f}"
        )
    stages = profile(files.bundle)
    print("\nOurs in a process of its own, stage by stage:")
    for name, duration in stages.items():
        print(f"    {name:<44}{duration:>6.1f} s")
    medians = {name: statistics.median(start.seconds for start in done) for name, done in starts.items()}
    return {
        "seconds": {name: [round(start.seconds, 2) for start in done] for name, done in starts.items()},
        "peak_bytes": {name: max(start.memory for start in done) for name, done in starts.items()},
        "file_bytes": sizes,
        "stages": stages,
        "ratio": round(medians["ours"] / medians["reference"], 3),
    }


def time_start(directory: Path, environment: dict[str, str]) -> Start:
    """Start the server in `directory` and follow it until it is READY."""
    started = time.monotonic()
    with Server(environment, directory=directory) as server:
        server.wait_for("READY", START)
        return Start(time.monotonic() - started, max(server.peak_memory()))


def profile(bundle: Path, device: str = "cpu") -> dict[str, float]:
    """Seconds of the stages of our setup, in order, in a fresh process without the server."""
    command = [sys.executable, "-m", "benchmarks.stages", str(bundle), str(time.time()), device]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    stages: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return stages


def report(measured: dict[str, Any], options: argparse.Namespace) -> None:
    """Print what it ran on and the line of JSON."""
    print(f"\nOn {processor()}, {os.cpu_count()} cores.")
    about = {
        "benchmark": "coldstart",
        "quick": options.quick,
        "dtype": options.dtype,
        "cpu": processor(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps({**about, **measured}))


if __name__ == "__main__":
    main(sys.argv[1:])
