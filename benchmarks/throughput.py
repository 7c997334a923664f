"""Requests per second over HTTP: closed-loop clients against the plain predictor and against ours."""

import argparse
import base64
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parent.parent
IMAGE = ROOT / "examples" / "pair.jpg"
SLOTS = 64  # of our server in this benchmark
INPUTS: dict[str, dict[str, str]] = {
    "caption": {"task": "image_captioning"},
    "answer": {"task": "visual_question_answering", "question": "what color is the circle?"},
    "match": {"task": "image_text_matching", "caption": "a large red circle to the left of a small blue square"},
}
WORKLOADS = {"caption": ("caption",), "mixed": ("caption", "answer", "match")}
CONTENDERS = {"plain": "benchmarks/plain_predict.py:Predictor", "ours": "predict.py:Predictor"}


@dataclass
class Cell:
    """What one contender did under one load."""

    latencies: list[float] = field(default_factory=list)  # seconds, from the first attempt
    batches: Counter[int] = field(default_factory=Counter)
    outputs: dict[str, set[str]] = field(default_factory=dict)
    refused: int = 0  # 409s; the client tries again
    lost: int = 0  # anything but 200 succeeded or 409
    elapsed: float = 0.0

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.elapsed


@contextmanager
def server(contender: str, bundle: Path, dtype: str | None) -> Iterator[str]:
    """Start the stock server with a contender; yields its address when it is READY."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PORT": str(port),
        "COG_PREDICT_TYPE_STUB": CONTENDERS[contender],
        "COG_MAX_CONCURRENCY": "1" if contender == "plain" else str(SLOTS),
        "COG_LOG_LEVEL": "error",
        "BENCH_BUNDLE": str(bundle),
        "BLIP_WEIGHTS": str(bundle),
        "BLIP_DTYPE": dtype or "",
    }
    command = [sys.executable, "-m", "cog.server.http"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server with the {contender} predictor ended")
            try:
                if requests.get(f"{url}/health-check", timeout=5).json()["status"] == "READY":
                    break
            except requests.RequestException:
                pass
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def measure(url: str, kinds: Sequence[str], clients: int, seconds: float) -> Cell:
    """Let `clients` ask one request after another for `seconds`; then wait for what was accepted."""
    cell, lock = Cell(), threading.Lock()
    image = "data:image/jpeg;base64," + base64.b64encode(IMAGE.read_bytes()).decode()
    started = time.monotonic()
    finished = [started]

    def client(number: int) -> None:
        session = requests.Session()
        for turn in range(number, 1_000_000):
            kind = kinds[turn % len(kinds)]
            asked = time.monotonic()
            while True:
                if time.monotonic() - started >= seconds:
                    return
                answer = session.post(f"{url}/predictions", json={"input": {"image": image, **INPUTS[kind]}})
                if answer.status_code != 409:
                    break
                with lock:
                    cell.refused += 1
                time.sleep(0.05)
            body: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
            with lock:
                if body.get("status") != "succeeded":
                    cell.lost += 1
                    continue
                finished.append(time.monotonic())
                cell.latencies.append(finished[-1] - asked)
                cell.outputs.setdefault(kind, set()).add(body["output"])
                cell.batches[int(body["metrics"].get("batch_size", 1))] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cell.elapsed = max(finished) - started
    return cell


def device_memory() -> int | None:
    """MiB in use on the first GPU; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Requests per second by clients, one line per workload and contender."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for workload, contender in sorted({(row["workload"], row["contender"]) for row in rows}):
        line = [row for row in rows if (row["workload"], row["contender"]) == (workload, contender)]
        axes.plot(
            [row["clients"] for row in line],
            [row["requests_per_s"] for row in line],
            marker="o",
            linestyle="-" if contender == "ours" else "--",
            label=f"{contender}, {workload}",
        )
    axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="requests/s")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str]) -> int:
    """Measure every cell, print the table and one JSON line."""
    parser = argparse.ArgumentParser(prog="scripts/bench throughput", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle with full-size weights")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long new requests are made in each cell")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, SLOTS, 2 * SLOTS])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtype", help="BLIP_DTYPE of our server")
    parser.add_argument("--plot", type=Path, help="write an SVG")
    arguments = parser.parse_args(argv)

    rows: list[dict[str, Any]] = []
    outputs: dict[tuple[str, str], set[str]] = {}
    with server("plain", arguments.bundle, None) as plain, server("ours", arguments.bundle, arguments.dtype) as ours:
        for workload in arguments.workloads:
            for clients in arguments.clients:
                for contender, url in (("plain", plain), ("ours", ours)):
                    cell = measure(url, WORKLOADS[workload], clients, arguments.seconds)
                    for kind, found in cell.outputs.items():
                        outputs.setdefault((contender, kind), set()).update(found)
                    rows.append(
                        {
                            "workload": workload,
                            "clients": clients,
                            "contender": contender,
                            "answers": len(cell.latencies),
                            "requests_per_s": round(cell.rate, 3),
                            "p50_s": round(statistics.median(cell.latencies), 2),
                            "p99_s": round(percentile(cell.latencies, 0.99), 2),
                            "batches": dict(sorted(cell.batches.items())),
                            "refused_409": cell.refused,
                            "lost": cell.lost,
                        }
                    )
                    print(f"{workload}, {clients} clients, {contender}: {cell.rate:.2f} requests/s", file=sys.stderr)
        memory = device_memory()
    differing = [kind for kind in INPUTS if outputs.get(("plain", kind)) != outputs.get(("ours", kind))]

    print("| workload | clients | plain, req/s | ours, req/s | ratio | ours p50 / p99 | largest batch | 409s | lost |")
    print("|---|---|---|---|---|---|---|---|---|")
    for theirs, row in zip(rows[::2], rows[1::2], strict=True):
        ratio = row["requests_per_s"] / theirs["requests_per_s"]
        row["ratio"] = round(ratio, 2)
        print(
            f"| {row['workload']} | {row['clients']} | {theirs['requests_per_s']:.2f} | {row['requests_per_s']:.2f} "
            f"| {ratio:.1f} | {row['p50_s']:.1f} / {row['p99_s']:.1f} s | {max(row['batches'])} "
            f"| {row['refused_409']} | {row['lost']} |"
        )
    print(f"Tasks whose answers differ from the plain predictor's: {', '.join(differing) or 'none'}.")
    if arguments.plot:
        plot(rows, arguments.plot)
    summary = {
        "benchmark": "throughput",
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "dtype": arguments.dtype or "default",
        "device_memory_mib": memory,
        "differing_tasks": differing,
        "rows": rows,
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
