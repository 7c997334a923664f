"""Four times as many clients as the server has slots: what they are told, how health answers meanwhile, and memory.

    scripts/bench overload [--seconds N]

The predictor's process and the clients share one core; the server's own process and the health prober have another, as
where a machine has a core to spare. The weights are the demo's, or what BLIP_WEIGHTS says. A client that is refused
waits 50 ms. Prints a table and one line of JSON, and keeps that line under benchmarks/results with the machine.
"""

import argparse
import base64
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from http.client import HTTPException
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.coldstart import ROOT
from benchmarks.serving import MIB, Peer, Serving, health, memory, pin, post, serving
from benchmarks.throughput import INPUTS, percentile

SLOTS = 32
CLIENTS = 4 * SLOTS
PAUSE = 0.05  # seconds after a 409, as clients do that leave the server its core
PROBES = 20  # health checks per second
POLL = 0.02  # seconds between two looks for READY after the load
WARM_UP = 10.0  # seconds of load before the first look at memory


def main(argv: Sequence[str]) -> int:
    """Run the load, print the table, keep the result."""
    import torch

    from benchmarks.latency import machine

    parser = argparse.ArgumentParser(prog="scripts/bench overload", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long requests are made (default 60)")
    seconds = parser.parse_args(argv).seconds
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("two cores are needed")

    environment = {
        "BLIP_DEVICE": "cpu",
        "BLIP_EGRESS": "any",  # the pictures by URL are on the loopback interface
        "COG_MAX_CONCURRENCY": str(SLOTS),
        "OMP_NUM_THREADS": "1",  # the one core that it is pinned to
    }
    with tempfile.TemporaryDirectory() as folder, serving(environment, Path(folder) / "log") as server:
        result = {
            "benchmark": "overload",
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **machine(torch.device("cpu")),
            "threads": 1,
            "weights": os.environ.get("BLIP_WEIGHTS", "demo"),
            "slots": SLOTS,
            "clients": CLIENTS,
            "seconds": seconds,
            **measure(server, seconds, busy=cores[0], spare=cores[1]),
        }
    print(f"{'':34}{CLIENTS} clients, {SLOTS} slots, {seconds:.0f} s")
    for name in ("answered", "refused_409", "lost", "wrong", "answered_per_s", "health_checks", "health_statuses"):
        print(f"{name.replace('_', ' '):34}{result[name]}")
    for name in ("health_ms", "server_memory", "predictor_memory"):
        print(f"{name.replace('_', ' '):34}{', '.join(f'{key} {value}' for key, value in result[name].items())}")
    print(f"{'READY after the last request':34}{result['ready_after_s']} s")
    line = json.dumps(result)
    (ROOT / "benchmarks" / "results" / "overload-cpu.json").write_text(line + "\n")
    print(line)
    return 0


def measure(server: Serving, seconds: float, busy: int, spare: int) -> dict[str, Any]:
    """Load the server for `seconds`; `busy` and `spare` are the cores."""
    pin(server.parent, spare)
    pin(server.worker, busy)
    os.sched_setaffinity(0, {spare})
    spawn = get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn, os.sched_setaffinity, (0, {busy})) as loader,
        ProcessPoolExecutor(1, spawn, os.sched_setaffinity, (0, {spare})) as prober,
    ):
        cases = loader.submit(prepare, server).result()
        prober.submit(probe, server, 0.0).result()  # its process is there when the load begins
        began = time.monotonic()
        end = began + seconds
        loaded, probed = loader.submit(load, server, cases, end), prober.submit(probe, server, end)
        early = look_at_memory(server, began + min(WARM_UP, seconds / 2))
        late = look_at_memory(server, end)
        connection = server.connect()
        while health(connection) != "READY":
            time.sleep(POLL)
        ready = time.monotonic() - end
        outcomes, checks = loaded.result(), probed.result()
    latencies = [milliseconds for milliseconds, _ in checks]
    return {
        **{name: outcomes[name] for name in ("answered", "refused_409", "lost", "wrong")},
        "answered_per_s": round(outcomes["answered"] / seconds, 2),
        "health_checks": len(checks),
        "health_statuses": dict(Counter(status for _, status in checks)),
        "health_ms": {
            "p50": round(statistics.median(latencies), 1),
            "p99": round(percentile(latencies, 0.99), 1),
            "max": round(max(latencies), 1),
        },
        "ready_after_s": round(ready, 3),
        **{
            f"{name}_memory": {
                "early_mib": round(early[name] / MIB, 1),
                "end_mib": round(late[name] / MIB, 1),
                "growth_percent": round(100 * (late[name] / early[name] - 1), 2),
            }
            for name in early
        },
    }


def look_at_memory(server: Serving, when: float) -> dict[str, int]:
    """Bytes of both processes at a time of the monotonic clock."""
    time.sleep(max(0.0, when - time.monotonic()))
    return {"server": memory(server.parent), "predictor": memory(server.worker)}


def prepare(server: Serving) -> list[tuple[bytes, str]]:
    """Requests of all tasks, one picture as a data URI and one by URL, and what the unloaded server says to each."""
    pair, group = ((ROOT / "examples" / name).read_bytes() for name in ("pair.jpg", "group.png"))
    peer = Peer({"/group.png": group}, received=lambda _: None)
    images = ("data:image/jpeg;base64," + base64.b64encode(pair).decode(), f"{peer.url}/group.png")
    bodies = [json.dumps({"input": {"image": image, **more}}).encode() for image in images for more in INPUTS.values()]
    connection = server.connect()
    return [(body, json.loads(post(connection, "/predictions", body)[1])["output"]) for body in bodies]


def load(server: Serving, cases: Sequence[tuple[bytes, str]], end: float) -> Counter[str]:
    """Let the clients ask one request after another until `end`; counts of what became of them."""

    def client(number: int) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        connection = server.connect()
        for turn in count(number):
            if time.monotonic() >= end:
                break
            body, expected = cases[turn % len(cases)]
            try:
                status, answer = post(connection, "/predictions", body)
            except (OSError, HTTPException):
                connection.close()
                status, answer = 0, b""
            if status == 409:
                outcomes["refused_409"] += 1
                time.sleep(PAUSE)
            elif status != 200:
                outcomes["lost"] += 1
            else:
                outcomes["answered" if json.loads(answer)["output"] == expected else "wrong"] += 1
        return outcomes

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(client, range(CLIENTS)), Counter())


def probe(server: Serving, end: float) -> list[tuple[float, str]]:
    """Ask for the health at a fixed rate until `end`: milliseconds from when each was due, and the status."""
    checks = []
    connection, due = server.connect(), time.monotonic()
    while due < end:
        time.sleep(max(0.0, due - time.monotonic()))
        status = health(connection)
        checks.append((1000 * (time.monotonic() - due), status))
        due += 1 / PROBES
    return checks


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
