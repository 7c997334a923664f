"""Load a server with good and bad requests for a while and see that nothing is lost, differs or grows.

    scripts/soak [--minutes N] [--quick]

Starts the server on the demo weights, measures for 20 s what it can take, then asks for 80 % of that at random times.
Every good answer is compared with what the same input got alone at the beginning; every bad request must end in 422 or
in one sentence. Prints a table by minute and one line of JSON; the exit status is 1 when an answer was lost, wrong or
another than before, when memory grew by 3 % or more, when a file descriptor leaked or a temporary file was left.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.harness import MIB, START, Peer, Server, chosen
from benchmarks.machine import processor
from benchmarks.processes import decoders_of, memory
from benchmarks.soak_cases import FINE, OUTCOMES, Case, bad_cases, good_inputs
from benchmarks.soak_clients import Answer, Clients
from benchmarks.throughput import percentile

SHARE = 0.8  # of the capacity
LEAST = 0.1  # requests per second, if nothing was answered while the capacity was measured
GROWTH = 3.0  # percent of memory at which the run fails
REST = 2.0  # seconds after the last answer in which the server has closed its connections and files
PATIENCE = 30.0  # seconds that it has for that on a busy machine
LOOKS = 3  # tries to look at processes that may end meanwhile
FAULTS_SHOWN = 20
LOG_LINES = 40  # shown of a server that ended


@dataclass(frozen=True)
class Plan:
    """How long, with what, and whether it is long enough for memory to have settled.

    Attributes:
        seconds: in which requests are made.
        capacity_seconds: of them, for measuring what the server can take.
        sample_seconds: between two looks at the processes.
        sizes: of the pictures, in pixels.
        settles: whether growing memory is a fault.
    """

    seconds: float
    capacity_seconds: float = 20.0
    sample_seconds: float = 10.0
    sizes: tuple[tuple[int, int], ...] = ((64, 48), (320, 240), (800, 600), (480, 1200), (1600, 1200), (2400, 1700))
    settles: bool = True


QUICK = Plan(seconds=6.0, capacity_seconds=1.0, sample_seconds=1.0, sizes=((320, 240),), settles=False)


@dataclass(frozen=True)
class Sample:
    """A look at the server's own process, the predictor's, and those that decode pictures together, in this order."""

    time: float
    memory: tuple[int, ...]  # bytes
    descriptors: tuple[int, ...]
    threads: tuple[int, ...]
    temporary: int  # files


class Watch:
    """Looks at the server's processes and its directory of temporary files, every so many seconds in a thread."""

    def __init__(self, server: Server, temporary: Path, seconds: float) -> None:
        self.over = threading.Event()
        self._processes, self._temporary, self._seconds = server.processes, temporary, seconds
        self.samples = [self.look()]
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def look(self) -> Sample:
        """Take a sample now; a decoder that ends meanwhile is not there the next time."""
        for _ in range(LOOKS - 1):
            with suppress(OSError):
                return self._look()
        return self._look()

    def _look(self) -> Sample:
        parent, worker = self._processes
        groups = ([parent], [worker], decoders_of(parent))
        return Sample(
            time.monotonic(),
            tuple(sum(memory(pid) for pid in group) for group in groups),
            tuple(sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in group) for group in groups),
            tuple(sum(len(os.listdir(f"/proc/{pid}/task")) for pid in group) for group in groups),
            sum(len(files) for _, _, files in os.walk(self._temporary)),
        )

    def look_at_rest(self, before: Sample | None = None) -> Sample:
        """Take a sample after the last answer; wait up to PATIENCE for no more descriptors than `before`."""
        time.sleep(REST)
        end = time.monotonic() + PATIENCE
        while leaks(before, now := self.look()) and time.monotonic() < end:
            time.sleep(REST)
        return now

    def close(self) -> None:
        """Stop looking."""
        self.over.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            while not self.over.wait(self._seconds):
                self.samples.append(self.look())
        except OSError:  # a process has ended; the last look says so
            self.over.set()


def leaks(before: Sample | None, after: Sample) -> bool:
    """Whether a process has more descriptors than before."""
    return before is not None and any(
        now > then for now, then in zip(after.descriptors, before.descriptors, strict=True)
    )


def settled(samples: Sequence[Sample]) -> list[float]:
    """Bytes of the server, the predictor and the decoders: the medians of some samples."""
    return [statistics.median(group) for group in zip(*(one.memory for one in samples), strict=True)]


def milliseconds(answers: Sequence[Answer]) -> list[float]:
    """How long good answers took; never empty."""
    return [1000 * one.seconds for one in answers if one.outcome == "answered"] or [0.0]


def make_clients(server: Server, plan: Plan) -> Clients:
    """Ask every good request alone."""
    peer = Peer()
    good = []
    for name, inputs in good_inputs(peer, plan.sizes):
        body = json.dumps({"input": inputs}).encode()
        with closing(server.connect()) as connection:
            good.append(Case(name, body, json.loads(connection.post("/predictions", body)[1])["output"]))
    return Clients(server, peer, good, bad_cases(peer))


def soak(server: Server, temporary: Path, plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Load the server and print the table; return the numbers and the faults."""
    began = time.monotonic()
    clients = make_clients(server, plan)
    watch = Watch(server, temporary, plan.sample_seconds)
    try:
        capacity = clients.closed_loop(plan.capacity_seconds)
        before = watch.look_at_rest()
        asked = max(LEAST, SHARE * capacity)
        print(f"The server takes {capacity:.1f} requests/s; asking for {asked:.1f}.", flush=True)
        clients.open_loop(asked, began + plan.seconds, watch.over)
    finally:
        watch.close()
    after = watch.look_at_rest(before)
    clients.peer.close()
    print_minutes(clients.answers, [*watch.samples, after], began)

    window = min(60.0, plan.seconds / 5)
    warm = began + min(120.0, plan.seconds / 5)
    early = settled([one for one in watch.samples if warm <= one.time < warm + window] or watch.samples[:1])
    late = settled(watch.samples[-round(window / plan.sample_seconds) :])
    growth = 100 * (sum(late) / sum(early) - 1)
    counts = Counter(one.outcome for one in clients.answers)
    times = milliseconds(clients.answers)
    report = {
        "capacity_per_s": round(capacity, 1),
        "asked_per_s": round(asked, 1),
        "outcomes": {name: counts[name] for name in OUTCOMES},
        "p50_ms": round(statistics.median(times), 1),
        "p99_ms": round(percentile(times, 0.99), 1),
        "memory_warm_mib": [round(one / MIB, 1) for one in early],
        "memory_end_mib": [round(one / MIB, 1) for one in late],
        "memory_growth_percent": round(growth, 2),
        "descriptors_before": before.descriptors,
        "descriptors_after": after.descriptors,
        "threads_after": after.threads,
        "temporary_files_most": max(one.temporary for one in watch.samples),
        "temporary_files_left": after.temporary,
    }
    faults = list_unexpected(clients.answers)
    if plan.settles and growth >= GROWTH:
        faults.append(f"memory grew by {growth:.1f} %")
    if leaks(before, after):
        faults.append(f"file descriptors went from {before.descriptors} to {after.descriptors}")
    if after.temporary:
        faults.append(f"{after.temporary} temporary files are left")
    return report, faults


def list_unexpected(answers: Sequence[Answer]) -> list[str]:
    """The answers that must not be, the most frequent first."""
    unexpected = Counter(f"{one.outcome}: {one.case.name}: {one.detail}" for one in answers if one.outcome not in FINE)
    return [f"{number} x {what}" for what, number in unexpected.most_common(FAULTS_SHOWN)]


def print_minutes(answers: Sequence[Answer], samples: Sequence[Sample], began: float) -> None:
    """The table; three numbers are of the server's own process, the predictor's and the decoders'."""
    print(f"{'min':>3}{''.join(f'{name:>10}' for name in OUTCOMES)}", end="")
    print(f"{'p50 ms':>8}{'p99 ms':>8}{'MiB':>21}{'fds':>12}{'threads':>12}{'temp':>6}")
    for minute in range(int((samples[-1].time - began) // 60) + 1):
        within = [one for one in answers if minute == (one.ended - began) // 60]
        counts = Counter(one.outcome for one in within)
        times = milliseconds(within)
        last = [one for one in samples if one.time < began + 60 * (minute + 1)][-1]
        held = ", ".join(f"{one / MIB:.1f}" for one in last.memory)
        descriptors, threads = (", ".join(map(str, group)) for group in (last.descriptors, last.threads))
        print(f"{minute + 1:>3}{''.join(f'{counts[name]:>10}' for name in OUTCOMES)}", end="")
        print(f"{statistics.median(times):>8.0f}{percentile(times, 0.99):>8.0f}", end="")
        print(f"{held:>21}{descriptors:>12}{threads:>12}{last.temporary:>6}")


def main(argv: Sequence[str]) -> int:
    """Run it; the exit status says whether all was well."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="how long requests are made (default 15)")
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds, in which growing memory is no fault: a trial, no result"
    )
    options = parser.parse_args(argv)
    plan = QUICK if options.quick else Plan(60 * options.minutes)
    with tempfile.TemporaryDirectory() as temporary:
        environment = {
            **chosen(BLIP_WEIGHTS="demo", BLIP_DEVICE="auto", COG_LOG_LEVEL="error"),
            "BLIP_EGRESS": "any",  # the peer is on the loopback interface
            "TMPDIR": temporary,
        }
        with Server(environment) as server:
            server.wait_for("READY", START)
            try:
                report, faults = soak(server, Path(temporary), plan)
            except (ProcessLookupError, FileNotFoundError):
                lines = server.log().splitlines()[-LOG_LINES:]
                sys.exit("\n".join(["FAULT the server ended; the last it said:", *lines]))
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"On {processor()}, {os.cpu_count()} cores.")
    about = {
        "benchmark": "soak",
        "quick": options.quick,
        "soak": "failed" if faults else "passed",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "minutes": plan.seconds / 60,
    }
    print(json.dumps({**about, **report}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
