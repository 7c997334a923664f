"""Process start to READY, and peak memory: the reference's way of loading against ours, at full size.

Both serve random weights in upstream's layout with the stock server, started in turn with the files
in the page cache. Ours also makes one real prediction of each task before it is READY; the
reference does not.
"""

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 600.0  # seconds to READY
POLL = 0.05  # seconds between two health checks


@dataclass(frozen=True)
class Start:
    """One start: seconds from exec to READY, and the peak resident memory of the worker process in bytes."""

    seconds: float
    memory: int


def main(argv: Sequence[str]) -> None:
    """Prepare the files, start each contender in turn, print a table and last a line of JSON."""
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
    arguments = parser.parse_args(argv)
    checkpoints, bundle = prepare(arguments.files, arguments.dtype)

    home = checkpoints.parents[1]
    stock = {"TORCH_HOME": str(home), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "HF_HUB_OFFLINE": "1"}
    if arguments.dtype == "float32":
        command = [sys.executable, "-m", "benchmarks.parity", str(bundle)]
        subprocess.run(command, cwd=home, env={**os.environ, **stock, "PYTHONPATH": str(ROOT)}, check=True)
    contenders = {
        "reference": (home, stock),
        "ours": (ROOT, {"BLIP_WEIGHTS": str(bundle)}),
    }
    starts: dict[str, list[Start]] = {name: [] for name in contenders}
    warm(checkpoints, bundle)
    for run in range(arguments.runs):
        for name, (directory, environment) in contenders.items():
            start = measure(directory, environment)
            starts[name].append(start)
            print(f"run {run + 1}, {name}: {start.seconds:.1f} s, {start.memory / 1e9:.2f} GB", flush=True)

    print(f"\n{'':<12}{'median s':>10}{'min s':>8}{'max s':>8}{'peak GB':>9}{'files GB':>10}")
    sizes = {"reference": size(checkpoints), "ours": size(bundle)}
    for name, runs in starts.items():
        seconds = [start.seconds for start in runs]
        memory = max(start.memory for start in runs)
        print(
            f"{name:<12}{statistics.median(seconds):>10.1f}{min(seconds):>8.1f}{max(seconds):>8.1f}"
            f"{memory / 1e9:>9.2f}{sizes[name] / 1e9:>10.2f}"
        )
    stages = profile(bundle)
    print("\nOurs in a process of its own, stage by stage:")
    for name, duration in stages.items():
        print(f"    {name:<44}{duration:>6.1f} s")
    medians = {name: statistics.median(start.seconds for start in runs) for name, runs in starts.items()}
    summary = {
        "benchmark": "coldstart",
        "dtype": arguments.dtype,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "seconds": {name: [round(start.seconds, 2) for start in runs] for name, runs in starts.items()},
        "peak_bytes": {name: max(start.memory for start in runs) for name, runs in starts.items()},
        "file_bytes": sizes,
        "stages": stages,
        "ratio": round(medians["ours"] / medians["reference"], 3),
    }
    print(json.dumps(summary))


def prepare(files: Path, dtype: str) -> tuple[Path, Path]:
    """Write the checkpoints and build the bundle where they are not there yet; their two directories."""
    from benchmarks.checkpoints import write_checkpoint
    from blip.download import File
    from blip.models import make_tokenizer
    from blip.pretrained import Upstream, build, published

    upstream = published()
    checkpoints = files / "reference" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    stock = files / "reference"
    vocabulary = checkpoints / "vocab.txt"
    if not vocabulary.exists():
        vocabulary.write_text("".join(f"{token}\n" for token in random_vocabulary()))
    (stock / "bert-base-uncased").mkdir(exist_ok=True)
    (stock / "bert-base-uncased" / "vocab.txt").write_bytes(vocabulary.read_bytes())
    (stock / "predict.py").write_bytes((ROOT / "benchmarks" / "stock_predict.py").read_bytes())
    (stock / "cog.yaml").write_text('predict: "predict.py:Predictor"\n')
    tokenizer = make_tokenizer(vocabulary)
    sized = {}
    for task, file in upstream.checkpoints.items():
        path = checkpoints / file.name
        if not path.exists():
            print(f"Writing {path}.", flush=True)
            partial = path.with_suffix(".partial")
            write_checkpoint(partial, task, upstream.configs[task], tokenizer, legacy=task == "match")
            partial.rename(path)
        sized[task] = replace(file, size=path.stat().st_size)
        assert abs(path.stat().st_size / file.size - 1) < 0.01, f"{path} is not of the published size"
    bundle = files / f"bundle-{dtype}"
    local = Upstream(File("vocab.txt", vocabulary.stat().st_size), sized, upstream.configs)
    build(local, bundle, dtype, print, source=checkpoints)
    return checkpoints, bundle


def random_vocabulary() -> list[str]:
    """30,522 tokens: single characters, the prompt's words, and numbered ones."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{one}" for one in characters)]
    tokens += "picture of the what is this".split()
    return tokens + [f"word{number}" for number in range(30_522 - len(tokens))]


def warm(*directories: Path) -> None:
    """Read every file once, so that it is in the page cache."""
    for path in (path for directory in directories for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def size(directory: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@contextmanager
def running(
    command: Sequence[str], directory: Path, environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which is killed at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def descendants(pid: int) -> Iterator[int]:
    """The process and all that it started."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from descendants(int(child))


def peak(pid: int) -> int:
    """The process's largest resident memory so far, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


STAGES = """
import json, sys, time
marks = [("start", float(sys.argv[1]))]
def mark(name): marks.append((name, time.time()))
mark("interpreter")
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from blip.bundle import open_bundle
bundle = open_bundle(Path(sys.argv[2]))
verified = ThreadPoolExecutor(1).submit(bundle.verify)
import torch
mark("import torch, verifying meanwhile")
from blip.models import import_lavis, load_models
from blip.tasks import Tasks
import_lavis()
mark("import LAVIS and what it needs")
tasks = Tasks(load_models(bundle, torch.device("cpu"), "float32"))
mark("weights")
verified.result()
mark("rest of the verification")
for task, sample in tasks.examples().items():
    tasks.run(task, [sample])
mark("one prediction of each task")
print(json.dumps({name: round(end - start, 2) for (_, start), (name, end) in zip(marks, marks[1:])}))
"""


def profile(bundle: Path) -> dict[str, float]:
    """Seconds of the stages of our setup, in order, in a fresh process without the server."""
    command = [sys.executable, "-c", STAGES, str(time.time()), str(bundle)]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    stages: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return stages


def measure(directory: Path, environment: dict[str, str]) -> Start:
    """Start the stock server in `directory` and follow it until it is READY."""
    log = directory / "coldstart.log" if directory != ROOT else Path(environment["BLIP_WEIGHTS"]).parent / "ours.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "BLIP_DEVICE": "cpu", **environment, "PORT": str(port)}
    started = time.monotonic()
    with running([sys.executable, "-m", "cog.server.http"], directory, environment, log) as process:
        while True:
            try:
                status = requests.get(f"http://127.0.0.1:{port}/health-check", timeout=5).json()["status"]
            except requests.RequestException:
                status = "STARTING"
            seconds = time.monotonic() - started
            if status == "READY":
                return Start(seconds, max(peak(pid) for pid in descendants(process.pid)))
            if status != "STARTING" or process.poll() is not None or seconds > DEADLINE:
                sys.exit(f"scripts/bench: {directory} is {status}:\n{log.read_text()}")
            time.sleep(POLL)


if __name__ == "__main__":
    main(sys.argv[1:])
