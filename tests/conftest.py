"""Fixtures: one server on the demo weights for the whole run, and its peers."""

from collections.abc import Iterator

import pytest

from benchmarks.harness import Server
from tests.peers import FileServer, Receiver
from tests.weights.hf_oracle import oracle as oracle


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server() as running:
        running.wait_for("READY")
        yield running


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    webhooks = Receiver()
    yield webhooks
    webhooks.close()


@pytest.fixture
def files() -> Iterator[FileServer]:
    serving = FileServer()
    yield serving
    serving.close()
