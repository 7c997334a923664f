"""Grafana's dashboard asks for what there is; test_prometheus.py has its queries answered."""

import re

from benchmarks import dashboard
from benchmarks.harness import ROOT


def test_the_dashboard_asks_for_metrics_that_are_served() -> None:
    docs = (ROOT / "docs" / "operating.md").read_text()
    served = set(re.findall(r"^\| `(blip_\w+)` \|", docs, re.MULTILINE))  # test_metrics.py holds it to the server
    asked = set(re.findall(r"blip_\w+", " ".join(dashboard.queries("1m"))))
    assert len(asked) >= 15
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in asked} <= served


def test_each_series_is_named_by_labels_that_its_query_keeps() -> None:
    for panel in dashboard.panels("1m"):
        for query, name in panel.queries:
            for label in re.findall("{{(\\w+)}}", name):
                assert re.search(rf"by \([^)]*\b{label}\b", query), (panel.title, query)
