"""Every kind of hostile client at once: what good clients are told, how health answers meanwhile, and memory.

    scripts/bench hostile [--seconds N] [--quick]

The clients share all cores with the server, whose weights are the demo's. After the last of them the server has a
minute to give back what they made it take. Prints a table and one line of JSON, and keeps that line under
benchmarks/results; the exit status is 1 where a good answer was lost or wrong, where the processes grew by 2 GiB or
more, kept more than 15 % above what they had, or left a file.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import hostile_clients, overload
from benchmarks.harness import MIB, START, Server, chosen
from benchmarks.machine import machine
from benchmarks.outcome import finish, head
from benchmarks.processes import descendants, proportional_memory

CLIENTS = 4  # good ones
PROBES = 5  # health checks per second
SECONDS, REST = 60.0, 60.0  # of hostility, and to recover from it
LOOK = 0.25  # seconds between two looks at memory
GROWTH = 2048  # MiB above idle at which it fails
LEFT = 15.0  # percent above idle that may be left after the rest
QUICK_SECONDS, QUICK_REST, QUICK_SCALE = 5.0, 3.0, 50


class Watch:
    """Looks at the memory of a server's processes, in a thread."""

    def __init__(self, server: Server) -> None:
        self._server, self._worker = server.processes
        self.most = self.now()
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> dict[str, float]:
        """MiB of the server, the predictor and the decoders, pages that they share counted once."""
        names, found = {self._server: "server", self._worker: "predictor"}, Counter[str]()
        for pid in descendants(self._server):
            with suppress(OSError):  # a decoder ends at any time
                found[names.get(pid, "decoders")] += proportional_memory(pid)
        return {name: round(size / MIB, 1) for name, size in found.items()}

    def settled(self) -> dict[str, float]:
        """MiB, the medians of some seconds."""
        looks = []
        for _ in range(20):
            time.sleep(LOOK)
            looks.append(self.now())
        return {name: statistics.median(look[name] for look in looks) for name in looks[0]}

    def close(self) -> None:
        """Stop looking."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(LOOK):
            self.most = max(self.most, self.now(), key=total)


def total(memory: dict[str, float]) -> float:
    """Of all processes."""
    return sum(memory.values())


def raise_limits() -> None:
    """Allow this process as many connections as the system lets it have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def measure(server: Server, temporary: Path, seconds: float, rest: float, scale: int) -> dict[str, Any]:
    """Let all clients loose for `seconds`, and the server be for `rest` seconds."""
    spawn = get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn, raise_limits) as hostile,
        ProcessPoolExecutor(1, spawn) as good,
        ProcessPoolExecutor(1, spawn) as prober,
    ):
        cases = good.submit(overload.prepare, server.port).result()
        prober.submit(overload.probe, server.port, 0.0, PROBES).result()
        hostile.submit(hostile_clients.prepare, server.port, scale).result()
        watch = Watch(server)
        idle = watch.settled()
        end = time.monotonic() + seconds
        asked = hostile.submit(hostile_clients.run, end)
        answered = good.submit(overload.load, server.port, cases, end, CLIENTS)
        checks = prober.submit(overload.probe, server.port, end, PROBES).result()
        time.sleep(max(0.0, end - time.monotonic()))
        time.sleep(rest)
        after = watch.settled()
        watch.close()
        outcomes, told = answered.result(), asked.result()
    connection = server.connect()
    return {
        "told": {kind: dict(counts.most_common()) for kind, counts in told.items()},
        "good": {name: outcomes[name] for name in ("answered", "refused_409", "lost", "wrong")},
        **overload.summary(checks),
        "idle_mib": idle,
        "most_mib": watch.most,
        "after_mib": after,
        "most_above_idle_mib": round(total(watch.most) - total(idle), 1),
        "left_percent": round(100 * (total(after) / total(idle) - 1), 1),
        "health_after": connection.health(),
        "files_left": sum(len(files) for _, _, files in os.walk(temporary)),
    }


def list_faults(result: dict[str, Any]) -> list[str]:
    """What must not be."""
    faults = [f"{result['good'][name]} good requests were {name}" for name in ("lost", "wrong") if result["good"][name]]
    if not result["good"]["answered"]:
        faults.append("no good request was answered")
    if result["most_above_idle_mib"] >= GROWTH:
        faults.append(f"the processes grew by {result['most_above_idle_mib']:.0f} MiB")
    if result["left_percent"] > LEFT and not result["quick"]:  # too soon after the clients
        faults.append(f"{result['left_percent']:.0f} % more memory than before is in use")
    if result["health_after"] != "READY":
        faults.append(f"the server is {result['health_after']}")
    if result["files_left"]:
        faults.append(f"{result['files_left']} temporary files are left")
    return faults


def print_table(result: dict[str, Any]) -> None:
    """The result, a number a line."""
    print(f"{'':42}{result['seconds']:.0f} s, {result['cpu']}, {result['cores']} cores")
    for kind, told in result["told"].items():
        print(f"{kind:42}{', '.join(f'{number} x {what}' for what, number in told.items())}")
    for name in ("good", "health_statuses", "health_ms", "idle_mib", "most_mib", "after_mib"):
        print(f"{name.replace('_', ' '):42}{', '.join(f'{key} {value}' for key, value in result[name].items())}")
    print(f"{'the most above idle':42}{result['most_above_idle_mib']} MiB")
    print(f"{'left after the rest':42}{result['left_percent']} %")


def main(argv: Sequence[str]) -> int:
    """Run it; the exit status says whether all was well."""
    parser = argparse.ArgumentParser(prog="scripts/bench hostile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of hostility (default {SECONDS:.0f})")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_SECONDS:.0f} s with small files: a trial, no result"
    )
    options = parser.parse_args(argv)
    plan = (QUICK_SECONDS, QUICK_REST, QUICK_SCALE) if options.quick else (options.seconds, REST, 1)
    with tempfile.TemporaryDirectory() as temporary:
        environment = {
            **chosen(BLIP_WEIGHTS="demo", COG_LOG_LEVEL="error"),
            "BLIP_DEVICE": "cpu",
            "BLIP_EGRESS": "any",  # the hosts are on the loopback interface
            "TMPDIR": temporary,
        }
        with Server(environment) as server:
            server.wait_for("READY", START)
            result = {
                **head("hostile", quick=options.quick),
                **machine("cpu"),
                "weights": environment["BLIP_WEIGHTS"],
                "seconds": plan[0],
                **measure(server, Path(temporary), *plan),
            }
    print_table(result)
    faults = list_faults(result)
    for fault in faults:
        print(f"FAULT {fault}")
    finish({**result, "hostile": "failed" if faults else "passed"}, None if options.quick else "hostile-cpu")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
