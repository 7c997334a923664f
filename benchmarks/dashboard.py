"""The Grafana dashboard's plots without Grafana: a real Prometheus answers its queries about a server under load.

    scripts/draw_dashboard

Draws each panel of deploy/grafana/blip.json over three minutes: one client, then as many as the server has slots, then
four times as many, then one again. Writes docs/dashboard.svg. The weights are the demo's.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, START, Connection, Peer, Server, data_uri, free_port
from benchmarks.throughput import INPUTS

DASHBOARD = ROOT / "deploy" / "grafana" / "blip.json"
PICTURE = ROOT / "docs" / "dashboard.svg"
SLOTS = 8
#: Seconds, and how many clients ask meanwhile.
STAGES = ((40, 1), (60, SLOTS), (40, 4 * SLOTS), (40, 1))
STEP = 2  # seconds between two points
COLUMNS = 3


class Prometheus:
    """A Prometheus that scrapes one server every second, from its first answer on."""

    def __init__(self, target: str, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        configuration = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [{"job_name": "blip", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)

    def ask(self, query: str) -> list[float]:
        """The values of a query now; none where it has no answer yet."""
        return [float(series["value"][1]) for series in self._result("query", query=query)]

    def ask_range(self, query: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of a query between two times, each with its labels as "metric" and its points as "values"."""
        return self._result("query_range", query=query, start=str(start), end=str(end), step=str(step))

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(DEADLINE)

    def _result(self, kind: str, **parameters: str) -> list[dict[str, Any]]:
        try:
            answer = requests.get(f"{self.url}/api/v1/{kind}", params=parameters, timeout=DEADLINE)
        except requests.ConnectionError:  # it has just been started
            return []
        if answer.status_code == 503:  # and is not ready
            return []
        assert answer.ok, answer.text
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found


@dataclass(frozen=True)
class Panel:
    """A plot of the dashboard: its title and unit, and each query with the pattern that names its series."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]


def panels(interval: str) -> Iterator[Panel]:
    """Those of the dashboard, for all servers; `interval` is what Grafana would choose by the scrapes."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        queries = [(target["expr"], target.get("legendFormat", "")) for target in panel["targets"]]
        yield Panel(
            panel["title"],
            panel["fieldConfig"]["defaults"].get("unit", ""),
            tuple(
                (query.replace("$__rate_interval", interval).replace("$instance", ".*"), name)
                for query, name in queries
            ),
        )


def main() -> None:
    """Load a server, and draw what Prometheus has seen."""
    if not shutil.which("prometheus"):
        sys.exit("Prometheus is missing; install it with scripts/need prometheus.")
    with (
        tempfile.TemporaryDirectory() as folder,
        Server({"COG_MAX_CONCURRENCY": str(SLOTS), "COG_LOG_LEVEL": "error"}) as server,
    ):
        server.wait_for("READY", START)
        with closing(Prometheus(f"127.0.0.1:{server.port}", Path(folder))) as prometheus:
            start = time.time()
            for seconds, clients in STAGES:
                load(server, seconds, clients)
            draw(prometheus, start, time.time())
    print(f"Drew {PICTURE.relative_to(ROOT)}.")


def load(server: Server, seconds: float, clients: int) -> None:
    """Let clients ask for `seconds`, all tasks in turn; some ask for what is refused, and some have a webhook."""
    image, end, receiver = data_uri(EXAMPLES / "pair.jpg"), time.monotonic() + seconds, Peer()
    kinds = list(INPUTS.values())

    def client(number: int) -> None:
        connection, turn = Connection(server.port), number
        while time.monotonic() < end:
            turn += 1
            body: dict[str, Any] = {"input": {"image": image if turn % 9 else "no", **kinds[turn % len(kinds)]}}
            if turn % 5 == 0:
                body["webhook"] = receiver.url
            connection.post("/predictions", json.dumps(body).encode())
            time.sleep(0.05)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    receiver.close()


def draw(prometheus: Prometheus, start: float, end: float) -> None:
    """Draw all panels that have a unit."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "blip", "svg.fonttype": "none"})  # text as text
    import matplotlib.pyplot as plt

    plots = [panel for panel in panels("15s") if panel.unit]
    rows = -(-len(plots) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(5 * COLUMNS, 3 * rows), squeeze=False)
    for axes, panel in zip(grid.flat, plots, strict=False):
        scale, unit = {"bytes": (2**20, "MiB"), "Bps": (2**20, "MiB/s"), "reqps": (1, "per s")}.get(
            panel.unit, (1, panel.unit.replace("none", ""))
        )
        for query, name in panel.queries:
            for series in prometheus.ask_range(query, start, end, STEP):
                points = [(float(at) - start, float(value) / scale) for at, value in series["values"]]
                axes.plot(*zip(*points, strict=True), label=label(name, series["metric"]))
        axes.set_title(panel.title, fontsize=10)
        axes.set(ylabel=unit, xlabel="seconds")
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def label(pattern: str, labels: dict[str, str]) -> str:
    """The name of a series, as Grafana makes it: "{{task}}" becomes its label."""
    for name, value in labels.items():
        pattern = pattern.replace(f"{{{{{name}}}}}", value)
    return pattern


def queries(interval: str) -> Sequence[str]:
    """All that the dashboard asks for."""
    return [query for panel in panels(interval) for query, _ in panel.queries]


if __name__ == "__main__":
    main()
