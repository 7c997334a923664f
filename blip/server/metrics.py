"""What Prometheus can scrape at /metrics: names and units by its conventions, one registry for each server."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import cog
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

import blip
from blip.server.records import REASONS, TIMES, Record

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
#: Upper bounds in seconds: from a match on a GPU (3 ms) to a caption on two cores, and to a download's limit.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
STATUSES = ("succeeded", "failed", "canceled")
TASKS = ("image_captioning", "visual_question_answering", "image_text_matching")
WEBHOOKS = ("delivered", "failed", "refused", "lost")

#: A gauge's name, what it is, its label's name or "", and what gives its values by label.
Gauge = tuple[str, str, str, Callable[[], dict[str, float]]]


class Metrics:
    """Counts what becomes of requests, and looks at everything else when it is scraped.

    Args:
        gauges: what is looked at.
        facts: about the predictor, from its own process.
    """

    def __init__(self, gauges: list[Gauge], facts: Callable[[], dict[str, str]]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each
        self.registry = CollectorRegistry()
        self._predictions = self._counter("predictions", "Predictions that have ended.", "task", "status")
        self._refused = self._counter("refused_requests", "Requests that were refused, by reason.", "reason")
        self._webhooks = self._counter("webhook_events", "Events for webhooks, by what became of them.", "outcome")
        self._received = self._counter("received_bytes", "Bytes of the bodies of requests for predictions.")
        self._sent = self._counter("sent_bytes", "Bytes of the bodies of their answers.")
        about = {
            "queue_seconds": "Time that predictions waited for the device.",
            "device_seconds": "Time that the batch of a prediction ran.",
            "decode_seconds": "Time until the picture of a prediction was decoded, with waiting for a decoder.",
            "download_seconds": "Time that downloading the image of a prediction took.",
            "duration_seconds": "Time from the first byte of a request to its answer or the end of its prediction.",
        }
        self._times = {name: self._histogram(name, text, SECONDS) for name, text in about.items()}
        self._batches = self._histogram("batch_size", "Predictions that ran together with a prediction.", BATCHES)
        for task in TASKS:  # what has not happened yet is zero, and not missing
            for status in STATUSES:
                self._predictions.labels(task, status)
            for histogram in (*self._times.values(), self._batches):
                histogram.labels(task)
        for reason in REASONS.values():
            self._refused.labels(reason)
        for outcome in WEBHOOKS:
            self._webhooks.labels(outcome)
        self.registry.register(_Gauges(gauges, facts))

    def observe(self, record: Record) -> None:
        """Count a request that is over."""
        self._received.inc(record.received)
        self._sent.inc(record.sent)
        prediction = record.prediction
        if not prediction:
            if reason := record.refused_for:
                self._refused.labels(reason).inc()
            return
        self._predictions.labels(record.task, record.status).inc()
        self._times["duration_seconds"].labels(record.task).observe(record.seconds)
        known = prediction.metrics or {}
        for name, key in TIMES.items():
            if key in known:
                self._times[name].labels(record.task).observe(known[key])
        if "batch_size" in known:
            self._batches.labels(record.task).observe(known["batch_size"])

    def count_webhook(self, outcome: str) -> None:
        """Count an event that was delivered, or was not."""
        self._webhooks.labels(outcome).inc()

    def document(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"blip_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"blip_prediction_{name}", text, ("task",), buckets=buckets, registry=self.registry)


class _Gauges(Collector):
    def __init__(self, gauges: list[Gauge], facts: Callable[[], dict[str, str]]) -> None:
        self._gauges, self._facts = gauges, facts

    def collect(self) -> Iterator[Metric]:
        """What is so now."""
        for name, text, label, values in self._gauges:
            family = GaugeMetricFamily(f"blip_{name}", text, labels=[label] if label else [])
            for key, value in values().items():
                family.add_metric([key] if label else [], value)
            yield family
        versions = {"version": blip.__version__, "cog": cog.__version__}
        yield InfoMetricFamily("blip_build", "What runs.", versions | self._facts())


def children(pid: int) -> list[int]:
    """The processes that a process has started; none where the system does not tell."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread has ended
            found += map(int, path.read_text().split())
    return found
