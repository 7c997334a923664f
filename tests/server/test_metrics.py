"""What Prometheus can scrape."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

import blip
from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, Server, data_uri, wait_until
from tests.peers import FileServer, Receiver

PAIR = data_uri(EXAMPLES / "pair.jpg")
MISSING = {"image": PAIR, "task": "visual_question_answering"}


def scrape(server: Server) -> str:
    return requests.get(f"{server.url}/metrics", timeout=DEADLINE).text


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(server: Server, name: str, **labels: str) -> float:
    """The one sample of this name whose labels include these."""
    (found,) = [
        sample.value
        for family in families(scrape(server)).values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return float(found)


@contextlib.contextmanager
def counted(server: Server, name: str, **labels: str) -> Iterator[None]:
    """Wait until what happens meanwhile is counted."""
    before = value(server, name, **labels)
    yield
    wait_until(lambda: value(server, name, **labels) == before + 1, f"{name} {labels}")


def test_predictions_are_counted_by_task_and_status_with_their_times(server: Server, files: FileServer) -> None:
    task = {"task": "image_captioning"}
    with contextlib.ExitStack() as all_of_them:
        all_of_them.enter_context(counted(server, "blip_predictions_total", status="succeeded", **task))
        for name in ("queue", "device", "decode", "download", "duration"):
            all_of_them.enter_context(counted(server, f"blip_prediction_{name}_seconds_count", **task))
        all_of_them.enter_context(counted(server, "blip_prediction_batch_size_count", **task))
        assert server.predict(input={"image": f"{files.url}/pair.jpg"}).status_code == 200
    with counted(server, "blip_predictions_total", status="failed", task="visual_question_answering"):
        server.predict(input=MISSING)


@pytest.mark.parametrize(
    ("reason", "ask"),
    [
        ("invalid", lambda server: server.predict(input={"image": "no"})),
        ("invalid", lambda server: requests.post(f"{server.url}/predictions", data=b"{", timeout=DEADLINE)),
    ],
)
def test_refusals_are_counted_by_reason(
    server: Server, reason: str, ask: Callable[[Server], requests.Response]
) -> None:
    with counted(server, "blip_refused_requests_total", reason=reason):
        assert ask(server).status_code >= 400


def test_bytes_are_counted(server: Server) -> None:
    before = [value(server, f"blip_{way}_bytes_total") for way in ("received", "sent")]
    server.predict(input={"image": PAIR})
    wait_until(
        lambda: all(
            value(server, f"blip_{way}_bytes_total") > was + len(PAIR)
            for way, was in zip(("received", "sent"), before, strict=True)
        ),
        "the bytes",
    )


def test_webhooks_are_counted_by_outcome(server: Server, receiver: Receiver) -> None:
    hook: dict[str, Any] = {"webhook_events_filter": ["completed"]}
    with counted(server, "blip_webhook_events_total", outcome="delivered"):
        server.predict(input={"image": PAIR}, webhook=receiver.url, **hook)
    with (
        contextlib.closing(Receiver(404)) as refusing,
        counted(server, "blip_webhook_events_total", outcome="failed"),
    ):
        server.predict(input={"image": PAIR}, webhook=refusing.url, **hook)


def test_what_runs_and_how_much_it_takes_can_be_seen(server: Server, files: FileServer) -> None:
    assert value(server, "blip_slots") == 32
    server.predict(input={"image": f"{files.url}/held/pair.jpg"}, headers={"Prefer": "respond-async"})
    assert value(server, "blip_predictions_in_progress") >= 1
    for process in ("server", "worker", "decoders"):
        assert value(server, "blip_resident_memory_bytes", process=process) > 1_000_000
    about = {"version": blip.__version__, "weights": "demo", "dtype": "float32", "device": "cpu"}
    assert value(server, "blip_build_info", **about) == 1


def test_the_table_in_the_docs_is_what_is_served(server: Server) -> None:
    table = (ROOT / "docs" / "operating.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", table, re.MULTILINE)
    served = []
    for family in families(scrape(server)).values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        served.append((name, family.type, ", ".join(f"`{label}`" for label in sorted(labels)), family.documentation))
    assert sorted(rows) == sorted(served)
