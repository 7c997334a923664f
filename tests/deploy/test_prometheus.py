"""The metrics as a real Prometheus takes them, and what the docs, the autoscaler and the dashboard ask it for."""

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

from benchmarks import dashboard
from benchmarks.dashboard import Prometheus
from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, Server, data_uri, wait_until
from tests.peers import FileServer, Receiver

pytestmark = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="needs Prometheus; scripts/test_prometheus installs it"
)

PAIR = data_uri(EXAMPLES / "pair.jpg")


def queries() -> Iterator[str]:
    """What the docs, the autoscaler and the dashboard ask for."""
    docs = (ROOT / "docs" / "operating.md").read_text()
    yield from re.findall(r"^\| [^`|]+ \| `(.+)` \|$", docs.split("What to ask Prometheus for:")[1], re.MULTILINE)
    scaled = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "autoscaling.yaml").read_text())
    for trigger in scaled["spec"]["triggers"]:
        yield trigger["metadata"]["query"]
    yield from (query for query in dashboard.queries("10s") if "blip_device_memory_bytes" not in query)  # of a GPU


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        server.wait_for("READY")
        yield server


def test_promtool_finds_nothing_wrong(server: Server) -> None:
    metrics = requests.get(f"{server.url}/metrics", timeout=DEADLINE).text
    ended = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_every_query_has_an_answer_once_predictions_are_made(
    server: Server, files: FileServer, receiver: Receiver, tmp_path: Path
) -> None:
    asked = list(queries())
    assert len(asked) >= 24
    with closing(Prometheus(f"127.0.0.1:{server.port}", tmp_path)) as prometheus:
        wait_until(lambda: prometheus.ask("up") == [1], "the first scrape")

        def have_answers() -> bool:
            for image in (PAIR, f"{files.url}/pair.jpg"):
                assert server.predict(input={"image": image}, webhook=receiver.url).status_code == 200
            assert server.predict(input={"image": "no"}).status_code == 422
            return all(any(map(math.isfinite, prometheus.ask(query))) for query in asked)

        wait_until(have_answers, "an answer to each query")
