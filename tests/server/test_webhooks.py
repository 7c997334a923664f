"""Webhooks whose receivers are down, slow or wrong, and a real server whose predictions do not mind."""

import asyncio
import base64
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from cog.server.webhook import requests_session_with_retries
from requests.adapters import HTTPAdapter
from standardwebhooks import Webhook, WebhookVerificationError

from benchmarks.harness import EXAMPLES, Server, data_uri, free_port, wait_until
from blip.server.egress import Egress
from blip.server.files import Files
from blip.server.webhooks import SECONDS, THREADS, Delivery, Outbox
from tests.peers import Receiver

INPUT = {"image": data_uri(EXAMPLES / "pair.jpg")}
BUSY = '{"detail":"Already running a prediction"}'
TOKEN = "a-token-that-nobody-else-may-see"


@pytest.fixture(scope="module")
def secret() -> Iterator[Server]:
    """A server with a token for its webhooks that logs all it can."""
    environment = {"WEBHOOK_AUTH_TOKEN": TOKEN, "COG_LOG_LEVEL": "debug", "BLIP_GRACE_SECONDS": "1"}
    with Server(environment) as server:
        server.wait_for("READY")
        yield server
        assert TOKEN not in server.log()


def start(server: Server, webhook: str, **more: object) -> None:
    def started() -> bool:  # a slot may have to come free first
        answer = server.predict(input=INPUT, webhook=webhook, headers={"Prefer": "respond-async"}, **more)
        assert (answer.status_code, answer.text) in ((202, answer.text), (409, BUSY))
        return answer.status_code == 202

    wait_until(started, "a free slot")


def assert_predictions_go_on(server: Server) -> None:
    assert server.predict(input=INPUT).json()["status"] == "succeeded"
    assert server.health()["status"] == "READY"


def test_a_receiver_that_is_down_gets_the_final_event_when_it_is_back(secret: Server) -> None:
    port = free_port()
    body = secret.predict(input=INPUT, webhook=f"http://127.0.0.1:{port}/hook").json()
    assert (body["status"], body["error"]) == ("succeeded", None)
    assert_predictions_go_on(secret)
    with contextlib.closing(Receiver(port=port)) as receiver:
        assert [event["status"] for event in receiver.until_completed()] == ["succeeded"]
        assert receiver.tokens == [f"Bearer {TOKEN}"]


def test_slow_receivers_hold_up_nobody_and_get_their_events_in_order(secret: Server) -> None:
    with contextlib.closing(Receiver(held=True)) as receiver:
        for number in range(10):
            start(secret, receiver.url, id=f"slow {number}")
        assert_predictions_go_on(secret)
        receiver.release.set()
        bodies: list[dict[str, Any]] = []
        while len({body["id"] for body in bodies if body["status"] == "succeeded"}) < 10:
            bodies += receiver.until_completed()
    for number in range(10):
        events = [body["status"] for body in bodies if body["id"] == f"slow {number}"]
        assert list(dict.fromkeys(events)) == ["processing", "succeeded"]  # the last may come more than once


@pytest.mark.parametrize(
    ("status", "retry_after"),
    [(429, "soon"), (500, "-1"), (502, "9" * 5000), (503, "Fri, 31 Dec 99999 23:59:59 GMT"), (504, "")],
)
def test_a_final_event_is_sent_until_the_receiver_takes_it(secret: Server, status: int, retry_after: str) -> None:
    with contextlib.closing(Receiver(status, status, Retry_After=retry_after)) as receiver:
        start(secret, receiver.url, webhook_events_filter=["completed"])
        assert [receiver.until_completed()[-1]["output"] for _ in range(3)] == [
            "Caption: a large red circle to the left of a small blue square"
        ] * 3
        start(secret, receiver.url, id="next")
        assert receiver.until_completed()[0]["id"] == "next", "what was taken is not sent again"


def test_a_final_event_is_given_up_after_as_many_attempts_as_cog_promises(caplog: pytest.LogCaptureFixture) -> None:
    adapter = requests_session_with_retries().get_adapter("http://")
    assert isinstance(adapter, HTTPAdapter)
    promised = adapter.max_retries
    assert (promised.total, promised.backoff_factor) == (12, 0.1)
    assert set(promised.status_forcelist) == {429, 500, 502, 503, 504}

    async def deliver(url: str) -> None:
        outbox = Outbox(Egress(guarded=False), Files())
        delivery = Delivery(outbox, url, {}, promised.new(backoff_factor=0.001))
        delivery.post({"status": "succeeded"}, final=True)
        await asyncio.sleep(0)
        while outbox.events:
            await asyncio.sleep(0.05)

    with contextlib.closing(Receiver(*[500] * 100)) as receiver:
        asyncio.run(deliver(receiver.url))
        assert len(receiver.tokens) == 13
    assert "webhook to 127.0.0.1 failed: status 500" in caplog.text


def test_hung_receivers_leave_room_for_the_others(secret: Server) -> None:
    with contextlib.closing(Receiver(held=True)) as hung, contextlib.closing(Receiver()) as good:
        for _ in range(40):
            start(secret, hung.url, webhook_events_filter=["completed"])
        start(secret, good.url.replace("127.0.0.1", "localhost"))
        assert good.until_completed()[-1]["status"] == "succeeded"


@pytest.mark.parametrize("network", ["127.0.0", "127.1.0", None], ids=["same network", "other network", "many"])
def test_many_receivers_that_never_answer_leave_room_for_the_others(secret: Server, network: str | None) -> None:
    """More than there are threads; what is sent to them ends after seconds as long as others wait."""
    with contextlib.ExitStack() as silent, contextlib.closing(Receiver()) as good:
        for number in range(2, THREADS + 32):
            host = f"{network}.{number}" if network else f"127.{number}.0.1"
            port = silent.enter_context(socket.create_server((host, 0))).getsockname()[1]
            start(secret, f"http://{host}:{port}/hook", webhook_events_filter=["completed"])
        started = time.monotonic()
        start(secret, good.url, webhook_events_filter=["completed"])
        assert good.until_completed()[-1]["status"] == "succeeded"
        assert time.monotonic() - started < SECONDS, "an attempt takes as long where nobody waits"


def test_other_events_are_sent_once_whatever_the_receiver_says(secret: Server) -> None:
    with contextlib.closing(Receiver(500)) as receiver:
        start(secret, receiver.url)
        assert [event["status"] for event in receiver.until_completed()] == ["processing", "succeeded"]


def test_an_event_that_is_refused_for_good_is_logged_without_the_token(secret: Server) -> None:
    with contextlib.closing(Receiver(401)) as receiver:
        start(secret, receiver.url, webhook_events_filter=["completed"])
        receiver.until_completed()
        wait_until(lambda: "webhook to 127.0.0.1 failed: status 401" in secret.log(), "the log")
        assert receiver.is_empty()


def test_a_redirect_is_followed_with_the_event_and_without_the_token(secret: Server) -> None:
    with contextlib.closing(Receiver()) as other, contextlib.closing(Receiver(other.url, other.url)) as receiver:
        start(secret, receiver.url)
        assert [event["status"] for event in other.until_completed()] == ["processing", "succeeded"]
        assert receiver.tokens == [f"Bearer {TOKEN}"] * 2
        assert other.tokens == [None, None]


def test_a_redirect_that_never_ends_is_given_up(secret: Server) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/hook"
    with contextlib.closing(Receiver(*[url] * 1000, port=port)):
        start(secret, url, webhook_events_filter=["start"])
        wait_until(lambda: "webhook to 127.0.0.1 failed: TooManyRedirects" in secret.log(), "the log")
    assert_predictions_go_on(secret)


def test_events_are_signed_as_standard_webhooks_are_and_keep_their_ids() -> None:
    secret = "whsec_" + base64.b64encode(bytes(range(32))).decode()
    with Server({"BLIP_WEBHOOK_SECRET": secret}) as server, contextlib.closing(Receiver(200, 503, 200)) as receiver:
        server.wait_for("READY")
        server.predict(id="signed", input=INPUT, webhook=receiver.url, webhook_events_filter=["start", "completed"])
        for _ in range(2):  # the final event is sent twice
            receiver.until_completed()
        sent = [(Webhook(secret).verify(body, headers), headers["webhook-id"]) for body, headers in receiver.requests]
        assert [event["status"] for event, _ in sent] == ["processing", "succeeded", "succeeded"]
        assert sent[1] == sent[2]
        assert sent[0][1] != sent[1][1]
        body, headers = receiver.requests[0]
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body.replace(b"signed", b"forged"), headers)
        assert secret not in server.log()


def test_when_too_much_waits_for_receivers_more_is_refused_none_is_lost() -> None:
    """The backlog is measured in bytes, and an event carries its image: 16 events of 8 MB are one receiver's share."""
    padding = "data:image/jpeg;base64," + " " * 8_000_000 + INPUT["image"].partition(",")[2]
    with Server() as server, contextlib.closing(Receiver(held=True)) as receiver:
        server.wait_for("READY")
        accepted: set[str] = set()
        while (answer := fill(server, receiver, padding, f"number {len(accepted)}")).status_code == 200:
            accepted.add(answer.json()["id"])
        assert (answer.status_code, answer.json()) == (409, {"detail": "Too many webhooks wait for their receivers"})
        assert len(accepted) > 8
        with contextlib.closing(Receiver()) as other:
            assert fill(server, other, INPUT["image"], "elsewhere").status_code == 200
            assert other.until_completed()[-1]["id"] == "elsewhere"
        assert_predictions_go_on(server)
        receiver.release.set()
        while accepted:  # one that was held for long comes more than once
            (event,) = receiver.until_completed()
            assert event["status"] == "succeeded"
            accepted.discard(event["id"])


def test_a_large_event_waits_on_the_disk_and_leaves_no_file(tmp_path: Path) -> None:
    padding = "data:image/jpeg;base64," + " " * 2_000_000 + INPUT["image"].partition(",")[2]
    environment = {"TMPDIR": str(tmp_path)}
    with Server(environment) as server, contextlib.closing(Receiver(503, held=True)) as receiver:
        server.wait_for("READY")
        assert fill(server, receiver, padding, "large").status_code == 200

        def sizes() -> list[int]:
            found = []
            for path in tmp_path.rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # it was renamed or removed meanwhile
                    found += [path.stat().st_size] if path.is_file() else []
            return found

        # The answer does not wait for the disk.
        wait_until(lambda: len(found := sizes()) == 1 and found[0] > 2_000_000, "the event alone to be written")
        receiver.release.set()
        for _ in range(2):  # also the one that is sent again
            assert receiver.until_completed()[-1]["input"]["image"] == padding
        wait_until(lambda: not any(path.is_file() for path in tmp_path.rglob("*")), "the file to be removed")


def fill(server: Server, receiver: Receiver, image: str, name: str) -> requests.Response:
    return server.predict(id=name, input={"image": image}, webhook=receiver.url, webhook_events_filter=["completed"])
