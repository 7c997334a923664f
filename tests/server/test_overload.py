"""Four times as many clients as slots, over real sockets."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests

from benchmarks.harness import EXAMPLES, MIB, TIMEOUT, Server, data_uri
from benchmarks.processes import memory
from tests.peers import FileServer

SLOTS = 8
CLIENTS = 4 * SLOTS
SECONDS = 6.0


@dataclass
class Observed:
    """What the clients and the bystanders saw.

    Attributes:
        outcomes: how often each came: "answered", "refused", or what went wrong.
        statuses: how often the health was what, under load.
        memory: bytes of the server's two processes in the middle and at the end of the load.
        afterwards: the health, and a prediction's output, when the last client had gone.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    afterwards: tuple[str, str] = ("", "")


def ask(server: Server, session: requests.Session, inputs: dict[str, Any], expected: str) -> str:
    try:
        answer = session.post(f"{server.url}/predictions", json={"input": inputs}, timeout=TIMEOUT)
    except requests.RequestException as error:
        return repr(error)
    if answer.status_code == 409:
        return "refused"
    right = answer.status_code == 200 and (answer.json()["status"], answer.json()["output"]) == ("succeeded", expected)
    return "answered" if right else f"HTTP {answer.status_code}: {answer.text[:200]}"


def overload(server: Server, files: FileServer) -> Observed:
    observed, over = Observed(), threading.Event()
    images = (data_uri(EXAMPLES / "pair.jpg"), data_uri(EXAMPLES / "group.png"), f"{files.url}/pair.jpg")
    texts: tuple[dict[str, str], ...] = (
        {},
        {"task": "visual_question_answering", "question": "how many objects are there?"},
        {"task": "image_text_matching", "caption": "a large red circle to the left of a small blue square"},
    )
    inputs = [{"image": image, **text} for image in images for text in texts]
    expected: list[str] = [server.predict(input=one).json()["output"] for one in inputs]

    def client(number: int) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        with requests.Session() as session:
            while not over.is_set():
                choice = number % len(inputs)
                outcomes[ask(server, session, inputs[choice], expected[choice])] += 1
                number += 1
        return outcomes

    def watch() -> Counter[str]:
        statuses: Counter[str] = Counter()
        while not over.wait(0.05):
            statuses[server.health()["status"]] += 1
        return statuses

    processes = server.processes
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        watching = pool.submit(watch)
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        for _ in range(2):
            time.sleep(SECONDS / 2)
            observed.memory.append(sum(memory(pid) for pid in processes))
        over.set()
    observed.outcomes = sum((one.result() for one in clients), Counter())
    observed.statuses = watching.result()
    observed.afterwards = server.health()["status"], server.predict(input=inputs[0]).json()["output"]
    return observed


@pytest.fixture(scope="module")
def observed() -> Iterator[Observed]:
    files = FileServer()
    environment = {"COG_MAX_CONCURRENCY": str(SLOTS), "COG_LOG_LEVEL": "error"}
    with Server(environment) as server:
        server.wait_for("READY")
        yield overload(server, files)
    files.close()


def test_every_request_under_overload_gets_the_right_answer_or_409(observed: Observed) -> None:
    assert set(observed.outcomes) == {"answered", "refused"}
    assert observed.outcomes["answered"] > 0


def test_health_answers_ready_or_busy_all_through_an_overload(observed: Observed) -> None:
    assert set(observed.statuses) <= {"READY", "BUSY"}
    assert observed.statuses["BUSY"] > 0


def test_memory_does_not_grow_under_overload(observed: Observed) -> None:
    middle, end = observed.memory
    assert end < 1.05 * middle + 10 * MIB


def test_the_server_is_ready_after_an_overload_and_answers(observed: Observed) -> None:
    assert observed.afterwards == ("READY", "Caption: a large red circle to the left of a small blue square")
