"""The metrics as a real Prometheus takes them, and what docs/operating.md and the autoscaler ask it for."""

import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import requests
import yaml

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, Server, data_uri, free_port, wait_until

pytestmark = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="needs Prometheus; scripts/test_prometheus installs it"
)

PAIR = data_uri(EXAMPLES / "pair.jpg")


class Prometheus:
    """A Prometheus that scrapes one server every second."""

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
        """The values of a query; none where it has no answer yet."""
        try:
            answer = requests.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=DEADLINE)
        except requests.ConnectionError:  # it has just been started
            return []
        if answer.status_code == 503:  # and is not ready
            return []
        assert answer.ok, answer.text
        return [float(series["value"][1]) for series in answer.json()["data"]["result"]]

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(DEADLINE)


def queries() -> Iterator[str]:
    """What the docs and the autoscaler ask for."""
    docs = (ROOT / "docs" / "operating.md").read_text()
    yield from re.findall(r"^\| [^`|]+ \| `(.+)` \|$", docs.split("What to ask Prometheus for:")[1], re.MULTILINE)
    scaled = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "autoscaling.yaml").read_text())
    for trigger in scaled["spec"]["triggers"]:
        yield trigger["metadata"]["query"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        server.wait_for("READY")
        yield server


def test_promtool_finds_nothing_wrong(server: Server) -> None:
    metrics = requests.get(f"{server.url}/metrics", timeout=DEADLINE).text
    ended = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_every_query_has_an_answer_once_predictions_are_made(server: Server, tmp_path: Path) -> None:
    asked = list(queries())
    assert len(asked) >= 8
    with closing(Prometheus(f"127.0.0.1:{server.port}", tmp_path)) as prometheus:
        wait_until(lambda: prometheus.ask("up") == [1], "the first scrape")

        def have_answers() -> bool:
            assert server.predict(input={"image": PAIR}).status_code == 200
            assert server.predict(input={"image": "no"}).status_code == 422
            return all(any(map(math.isfinite, prometheus.ask(query))) for query in asked)

        wait_until(have_answers, "an answer to each query")
