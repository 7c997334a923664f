"""Requests per second over HTTP: closed-loop clients against the plain predictor and against ours."""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from benchmarks.harness import DEADLINE, EXAMPLES, START, Server, chosen, data_uri
from benchmarks.machine import processor
from benchmarks.outcome import finish, of_processor
from blip.config import DEMO

IMAGE = EXAMPLES / "pair.jpg"
SLOTS = 64  # of our server in this benchmark
SECONDS = 60.0
SOON = 0.05  # seconds until a refused client asks again where no Retry-After header says when: stock Cog sends none
CLIENTS = [1, 8, SLOTS, 2 * SLOTS]
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
    refused: int = 0  # 409s; the client asks again when it is told to
    lost: Counter[str] = field(default_factory=Counter)  # anything but 200 succeeded or 409, by what was said
    elapsed: float = 0.0

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.elapsed


def server(contender: str, bundle: Path, dtype: str | None) -> Server:
    """The server with a contender."""
    return Server(
        {
            **chosen(BLIP_DEVICE="auto"),
            "COG_PREDICT_TYPE_STUB": CONTENDERS[contender],
            "COG_MAX_CONCURRENCY": "1" if contender == "plain" else str(SLOTS),
            "COG_LOG_LEVEL": "error",
            "BENCH_BUNDLE": str(bundle),
            "BLIP_WEIGHTS": str(bundle),
            "BLIP_DTYPE": dtype or "",
        }
    )


def measure(url: str, kinds: Sequence[str], clients: int, seconds: float) -> Cell:
    """Let `clients` ask one request after another for `seconds`; then wait for what was accepted."""
    cell, lock = Cell(), threading.Lock()
    image = data_uri(IMAGE)
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
                status, body, wait = ask(session, f"{url}/predictions", {"image": image, **INPUTS[kind]})
                if status != 409:
                    break
                with lock:
                    cell.refused += 1
                time.sleep(wait)
            with lock:
                if body.get("status") != "succeeded":
                    cell.lost[f"{status}: {body.get('error')}"] += 1
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
    cell.elapsed = max(finished) - started or seconds
    return cell


def ask(session: requests.Session, url: str, inputs: dict[str, str]) -> tuple[int, dict[str, Any], float]:
    """The status (0 for no answer), the body or what was said, and the seconds to wait before asking again."""
    try:
        answer = session.post(url, json={"input": inputs}, timeout=DEADLINE)
        body = answer.json() if answer.status_code == 200 else {"error": answer.text[:200]}  # others may be no JSON
    except requests.RequestException as error:
        return 0, {"error": type(error).__name__}, SOON
    return answer.status_code, body, float(answer.headers.get("Retry-After", SOON))


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


def row(workload: str, clients: int, contender: str, cell: Cell) -> dict[str, Any]:
    """What the line of JSON says of a cell."""
    return {
        "workload": workload,
        "clients": clients,
        "contender": contender,
        "answers": len(cell.latencies),
        "requests_per_s": round(cell.rate, 3),
        "p50_s": round(statistics.median(cell.latencies), 2) if cell.latencies else None,
        "p99_s": round(percentile(cell.latencies, 0.99), 2) if cell.latencies else None,
        "batches": dict(sorted(cell.batches.items())),
        "refused_409": cell.refused,
        "lost": cell.lost.total(),
    }


def shown(value: float | None) -> str:
    """A figure, or that there is none because nothing was answered."""
    return "none" if value is None else f"{value:.1f}"


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows, the plain predictor's and ours in turn, and add the ratio to ours."""
    print("| workload | clients | plain, req/s | ours, req/s | ratio | ours p50 / p99 | largest batch | 409s | lost |")
    print("|---|---|---|---|---|---|---|---|---|")
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        print(
            f"| {ours['workload']} | {ours['clients']} | {theirs['requests_per_s']:.2f} | {ours['requests_per_s']:.2f} "
            f"| {shown(ours['ratio'])} | {shown(ours['p50_s'])} / {shown(ours['p99_s'])} s "
            f"| {max(ours['batches'], default='none')} "
            f"| {ours['refused_409']} | {ours['lost']} |"
        )


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every cell; the rows, the tasks whose answers differ, and the GPU memory that both servers take."""
    rows: list[dict[str, Any]] = []
    outputs: dict[tuple[str, str], set[str]] = {}
    with ExitStack() as stack:
        servers = {
            "plain": stack.enter_context(server("plain", arguments.bundle, None)),
            "ours": stack.enter_context(server("ours", arguments.bundle, arguments.dtype)),
        }
        for one in servers.values():
            one.wait_for("READY", START)
        for workload in arguments.workloads:
            for clients in arguments.clients:
                for contender, one in servers.items():
                    cell = measure(one.url, WORKLOADS[workload], clients, arguments.seconds)
                    for kind, found in cell.outputs.items():
                        outputs.setdefault((contender, kind), set()).update(found)
                    rows.append(row(workload, clients, contender, cell))
                    print(f"{workload}, {clients} clients, {contender}: {cell.rate:.2f} requests/s", file=sys.stderr)
                theirs, ours = (one["requests_per_s"] for one in rows[-2:])
                rows[-1]["ratio"] = round(ours / theirs, 2) if theirs else None
        memory = device_memory()
    differing = [kind for kind in INPUTS if outputs.get(("plain", kind)) != outputs.get(("ours", kind))]
    return {"device_memory_mib": memory, "differing_tasks": differing, "rows": rows}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench throughput", description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a bundle with full-size weights")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long new requests are made in each cell")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtype", help="BLIP_DTYPE of our server")
    parser.add_argument(
        "--quick", action="store_true", help="the demo's weights, few clients, 2 s in each cell: a trial, no result"
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.bundle = arguments.bundle or DEMO
        arguments.seconds, arguments.clients, arguments.workloads = 2.0, [1, 4], ["mixed"]
    if arguments.bundle is None:
        parser.error("--bundle is required")
    return arguments


def main(argv: Sequence[str]) -> None:
    """Measure every cell, print the table and one JSON line."""
    arguments = parse(argv)
    compared = compare(arguments)
    rows = compared["rows"]
    print_table(rows)
    print(f"Tasks whose answers differ from the plain predictor's: {', '.join(compared['differing_tasks']) or 'none'}.")
    print(f"On {processor()}, {os.cpu_count()} cores.")
    about = {
        "benchmark": "throughput",
        "quick": arguments.quick,
        "machine": platform.processor() or platform.machine(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "dtype": arguments.dtype or "default",
    }
    cells = arguments.clients, arguments.workloads, arguments.seconds
    whole = not arguments.quick and arguments.dtype is None and cells == (CLIENTS, list(WORKLOADS), SECONDS)
    device = "cpu" if compared["device_memory_mib"] is None else "cuda"
    finish({**about, **compared}, of_processor(f"throughput-{device}", about) if whole else None)


if __name__ == "__main__":
    main(sys.argv[1:])
