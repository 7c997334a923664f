"""Four times as many clients as the server has slots: what they are told, how probes answer meanwhile, and memory.

    scripts/bench overload [--seconds N] [--quick]

The predictor's process and the clients share one core; the server's own process and the probers have another, as
where a machine has a core to spare. The weights are the demo's, or what BLIP_WEIGHTS says. A client that is refused
waits 50 ms. Before that as many clients as slots ask, which is full load. Prints a table and one line of JSON, and
keeps that line under benchmarks/results with the machine.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from http.client import HTTPException
from itertools import count
from multiprocessing import get_context
from typing import Any

from benchmarks.harness import EXAMPLES, MIB, START, Connection, Peer, Server, chosen, data_uri
from benchmarks.machine import machine
from benchmarks.outcome import finish, head
from benchmarks.processes import memory, pin
from benchmarks.throughput import INPUTS, percentile

SLOTS = 32
CLIENTS = 4 * SLOTS
PAUSE = 0.05  # seconds that a client waits after a 409, so that the server keeps its core
PROBES = {"health": 10, "readyz": 10, "metrics": 1}  # looks per second
POLL = 0.02  # seconds between two looks for READY after the load
WARM_UP = 10.0  # seconds of load before the first look at memory
QUICK_SECONDS = 3.0
#: Milliseconds that each look took, and what was said.
Checks = list[tuple[float, str]]


def main(argv: Sequence[str]) -> None:
    """Run the load, print the table, keep the result."""
    parser = argparse.ArgumentParser(prog="scripts/bench overload", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long requests are made (default 60)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_SECONDS:.0f} s, and nothing kept: a trial, no result"
    )
    options = parser.parse_args(argv)
    seconds = QUICK_SECONDS if options.quick else options.seconds
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("two cores are needed")

    environment = {
        **chosen(BLIP_WEIGHTS="demo", COG_LOG_LEVEL="error"),
        "BLIP_DEVICE": "cpu",
        "BLIP_EGRESS": "any",  # the pictures by URL are on the loopback interface
        "COG_MAX_CONCURRENCY": str(SLOTS),
        "OMP_NUM_THREADS": "1",  # the one core that it is pinned to
    }
    with Server(environment) as server:
        server.wait_for("READY", START)
        result = {
            **head("overload", quick=options.quick),
            **machine("cpu"),
            "threads": 1,
            "weights": environment["BLIP_WEIGHTS"],
            "slots": SLOTS,
            "clients": CLIENTS,
            "seconds": seconds,
            **measure(server, seconds, busy=cores[0], spare=cores[1]),
        }
    print_table(result)
    finish(result, None if options.quick else "overload-cpu")


def print_table(result: dict[str, Any]) -> None:
    """The result, a number a line."""
    print(f"{'':34}{SLOTS} clients, {SLOTS} slots, {result['seconds'] / 3:.0f} s, {result['cpu']}")
    print_figures(result["full_load"])
    print(f"{'':34}{CLIENTS} clients, {SLOTS} slots, {result['seconds']:.0f} s")
    for name in ("answered", "refused_409", "lost", "wrong", "answered_per_s", "health_checks", "health_statuses"):
        print(f"{name.replace('_', ' '):34}{result[name]}")
    print_figures({name: result[name] for name in ("health_ms", "readyz_ms", "metrics_ms")})
    print_figures({name: result[name] for name in ("server_memory", "predictor_memory")})
    print(f"{'READY after the last request':34}{result['ready_after_s']} s")


def print_figures(figures: dict[str, dict[str, float]]) -> None:
    """Several figures of one thing a line."""
    for name, values in figures.items():
        print(f"{name.replace('_', ' '):34}{', '.join(f'{key} {value}' for key, value in values.items())}")


def measure(server: Server, seconds: float, busy: int, spare: int) -> dict[str, Any]:
    """Load the server for `seconds`; `busy` and `spare` are the cores."""
    parent, worker = processes = server.processes
    pin(parent, spare)
    pin(worker, busy)
    os.sched_setaffinity(0, {spare})
    spawn = get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn, os.sched_setaffinity, (0, {busy})) as loader,
        ProcessPoolExecutor(len(PROBES), spawn, os.sched_setaffinity, (0, {spare})) as prober,
    ):
        cases = loader.submit(prepare, server.port).result()
        # So that the processes are there when the load begins.
        wait([prober.submit(time.sleep, 1.0) for _ in PROBES])

        def begin(clients: int, end: float) -> tuple[Future[Counter[str]], dict[str, Future[Checks]]]:
            return loader.submit(load, server.port, cases, end, clients), {
                name: prober.submit(probe, server.port, end, rate, name) for name, rate in PROBES.items()
            }

        _, probed = begin(SLOTS, time.monotonic() + seconds / 3)
        full = {f"{name}_ms": times(found.result()) for name, found in probed.items()}
        began = time.monotonic()
        end = began + seconds
        loaded, probed = begin(CLIENTS, end)
        early = look_at_memory(processes, began + min(WARM_UP, seconds / 2))
        late = look_at_memory(processes, end)
        connection = server.connect()
        while connection.health() != "READY":
            time.sleep(POLL)
        ready = time.monotonic() - end
        outcomes, checks = loaded.result(), {name: found.result() for name, found in probed.items()}
    return {
        "full_load": full,
        **{name: outcomes[name] for name in ("answered", "refused_409", "lost", "wrong")},
        "answered_per_s": round(outcomes["answered"] / seconds, 2),
        **summary(checks["health"]),
        **{f"{name}_ms": times(checks[name]) for name in ("readyz", "metrics")},
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


def look_at_memory(processes: Sequence[int], when: float) -> dict[str, int]:
    """Bytes of the server's two processes at a time of the monotonic clock."""
    time.sleep(max(0.0, when - time.monotonic()))
    return dict(zip(("server", "predictor"), map(memory, processes), strict=True))


def prepare(port: int) -> list[tuple[bytes, str]]:
    """Requests of all tasks, one picture as a data URI and one by URL, each with the answer of the idle server."""
    peer = Peer()  # as long as this process
    peer.files["/group.png"] = (EXAMPLES / "group.png").read_bytes()
    images = (data_uri(EXAMPLES / "pair.jpg"), f"{peer.url}/group.png")
    bodies = [json.dumps({"input": {"image": image, **more}}).encode() for image in images for more in INPUTS.values()]
    connection = Connection(port)
    return [(body, json.loads(connection.post("/predictions", body)[1])["output"]) for body in bodies]


def load(port: int, cases: Sequence[tuple[bytes, str]], end: float, clients: int = CLIENTS) -> Counter[str]:
    """Let clients ask one request after another until `end`; counts of what became of them."""

    def client(number: int) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        connection = Connection(port)
        for turn in count(number):
            if time.monotonic() >= end:
                break
            body, expected = cases[turn % len(cases)]
            try:
                status, answer = connection.post("/predictions", body)
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

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(client, range(clients)), Counter())


def probe(port: int, end: float, rate: float, name: str = "health") -> Checks:
    """Look `rate` times a second until `end`: milliseconds from when each was due, and what was said.

    That is the status of the health, or the HTTP status of another path. A look that waits for the one before is late
    by the server's fault; one that the system wakes late is not.
    """
    checks = []
    connection, due = Connection(port), time.monotonic()
    while due < end:
        if due > time.monotonic():
            time.sleep(due - time.monotonic())
            due = time.monotonic()
        said = connection.health() if name == "health" else str(connection.look(f"/{name}")[0])
        checks.append((1000 * (time.monotonic() - due), said))
        due += 1 / rate
    return checks


def summary(checks: Checks) -> dict[str, Any]:
    """What the checks of the health found."""
    return {
        "health_checks": len(checks),
        "health_statuses": dict(Counter(status for _, status in checks)),
        "health_ms": times(checks),
    }


def times(checks: Checks) -> dict[str, float]:
    """Their milliseconds."""
    latencies = [milliseconds for milliseconds, _ in checks]
    return {
        "p50": round(statistics.median(latencies), 1),
        "p99": round(percentile(latencies, 0.99), 1),
        "max": round(max(latencies), 1),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
