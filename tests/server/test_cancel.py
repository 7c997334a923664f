"""A prediction that is cancelled, or whose client hangs up, ends at once in whatever state and frees its slot."""

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, Server, data_uri, wait_until
from tests.peers import FileServer, Receiver

PAIR = data_uri(EXAMPLES / "pair.jpg")
SLOTS = 4
STATES = ["resolving", "connecting", "headers", "downloading", "queued", "running"]


class Watched:
    """A server of a few slots with a directory of its own, which can be made to think."""

    def __init__(self, server: Server, temporary: Path, thinking: Path, deaf: int) -> None:
        self.server, self.temporary, self.thinking, self.deaf = server, temporary, thinking, deaf

    def inputs(self, state: str, files: FileServer) -> dict[str, str]:
        """Inputs of a prediction that stays in a state."""
        addresses = {"resolving": "http://nobody.invalid/a.jpg", "connecting": f"http://127.0.0.1:{self.deaf}/a.jpg"}
        addresses |= {"headers": f"{files.url}/drip-headers", "downloading": f"{files.url}/drip"}
        if state in addresses:
            return {"image": addresses[state]}
        return {"image": PAIR, "task": "visual_question_answering", "question": "think"}

    def files(self) -> list[Path]:
        return [path for path in self.temporary.rglob("*") if path.is_file()]

    def is_free(self) -> bool:
        return bool(self.server.health()["status"] == "READY")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    temporary, thinking = tmp_path_factory.mktemp("temporary"), tmp_path_factory.mktemp("state") / "thinking"
    environment = {
        "COG_PREDICT_TYPE_STUB": "tests/server/dying_predict.py:Predictor",
        "COG_MAX_CONCURRENCY": str(SLOTS),
        "BLIP_TEST_THINKING": str(thinking),
        "TMPDIR": str(temporary),
    }
    with Server(environment) as server, contextlib.ExitStack() as deaf:
        server.wait_for("READY")
        listener = deaf.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # until the kernel takes no more; a connection is then never made
            waiting = deaf.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        one = Watched(server, temporary, thinking, listener.getsockname()[1])
        yield one
        thinking.unlink(missing_ok=True)
        assert one.files() == []
        assert "Traceback" not in server.log()


@pytest.fixture(autouse=True)
def thoughtless(watched: Watched) -> Iterator[None]:
    yield
    watched.thinking.unlink(missing_ok=True)
    wait_until(watched.is_free, "all slots")


def fill(watched: Watched, state: str, files: FileServer, receiver: Receiver) -> None:
    for number in range(SLOTS):
        answer = watched.server.predict(
            id=f"{state} {number}",
            input=watched.inputs(state, files),
            webhook=receiver.url,
            webhook_events_filter=["completed"],
            headers={"Prefer": "respond-async"},
        )
        assert answer.status_code == 202
    if state in ("queued", "running"):
        wait_until(watched.thinking.exists, "the first to run")


@pytest.mark.parametrize("state", STATES)
def test_a_cancelled_prediction_ends_as_canceled_and_frees_its_slot(
    watched: Watched, files: FileServer, receiver: Receiver, state: str
) -> None:
    fill(watched, state, files, receiver)
    for number in reversed(range(SLOTS)):
        requests.post(f"{watched.server.url}/predictions/{state} {number}/cancel", timeout=DEADLINE)
    if state != "resolving":  # which may have failed before
        ends = {receiver.until_completed()[-1]["status"] for _ in range(SLOTS)}
        # Those that connect give up after 5 s, the last of them last.
        assert "canceled" in ends
        assert ends <= ({"canceled", "failed"} if state == "connecting" else {"canceled"})
    wait_until(watched.is_free, "the slots")
    assert not files.release.is_set(), "what it waited for has not happened"
    wait_until(lambda: watched.files() == [], "the files to be removed")


@pytest.mark.parametrize("way", ["close", "reset", "half", "pipelined"])
@pytest.mark.parametrize("state", STATES[1:])
def test_a_client_that_hangs_up_frees_its_slot(watched: Watched, files: FileServer, state: str, way: str) -> None:
    body = json.dumps({"input": watched.inputs(state, files)}).encode()
    head = "POST /predictions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with contextlib.ExitStack() as clients:
        for _ in range(SLOTS):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", watched.server.port)))
            client.sendall(request * (2 if way == "pipelined" else 1))
            if way == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif way == "half":
                clients.callback(client.shutdown, socket.SHUT_WR)
        wait_until(lambda: not watched.is_free(), "the slots to be taken")
        if state in ("queued", "running"):
            wait_until(watched.thinking.exists, "the first to run")
        refused = watched.server.predict(input={"image": PAIR})
        assert refused.status_code == 409
    wait_until(watched.is_free, "the slots")
    wait_until(lambda: watched.files() == [], "the files to be removed")


def test_an_id_can_be_used_again_at_once(watched: Watched, files: FileServer, receiver: Receiver) -> None:
    more: dict[str, Any] = {"webhook": receiver.url, "webhook_events_filter": ["completed"]}
    for _ in range(20):
        watched.server.predict(
            id="again", input={"image": f"{files.url}/drip"}, headers={"Prefer": "respond-async"}, **more
        )
        assert requests.post(f"{watched.server.url}/predictions/again/cancel", timeout=DEADLINE).status_code == 200
        assert receiver.until_completed()[-1]["status"] == "canceled"
    assert watched.server.predict(id="again", input={"image": PAIR}).json()["status"] == "succeeded"
