"""SIGTERM, as an orchestrator stops a replica."""

import signal
import threading
import time

import pytest
import requests
from server import DEADLINE, EXAMPLES, FileServer, Receiver, Server, data_uri, wait_until


def refuses(server: Server) -> bool:
    return bool(server.health()["status"] == "no answer")


def test_work_in_flight_is_finished_while_new_connections_are_refused(files: FileServer, receiver: Receiver) -> None:
    held = {"input": {"image": f"{files.url}/held/pair.jpg"}}
    answers: list[requests.Response] = []
    with Server({"BLIP_EGRESS": "any"}) as server:
        server.wait_for("READY")
        expected = server.predict(input={"image": data_uri(EXAMPLES / "pair.jpg")}).json()["output"]
        client = threading.Thread(target=lambda: answers.append(server.predict(**held)))
        client.start()
        later = server.predict(headers={"Prefer": "respond-async"}, webhook=receiver.url, **held)
        assert later.status_code == 202
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server), "new connections to be refused")
        time.sleep(6)  # stock gives up after five seconds
        assert answers == []
        files.release.set()
        client.join(DEADLINE)
        assert answers[0].json()["output"] == expected
        assert receiver.until_completed()[-1]["output"] == expected
        assert server.process.wait(DEADLINE) == 0


def test_after_the_grace_period_the_server_ends_all_the_same(files: FileServer) -> None:
    with Server({"BLIP_EGRESS": "any", "BLIP_GRACE_SECONDS": "1"}) as server:
        server.wait_for("READY")
        held = {"input": {"image": f"{files.url}/held/pair.jpg"}}
        statuses: list[int] = []
        client = threading.Thread(target=lambda: statuses.append(server.predict(**held).status_code))
        client.start()
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        client.join(10)
        assert statuses == [500]
        files.release.set()
        server.process.wait(DEADLINE)


@pytest.mark.parametrize("grace", ["soon", "1 min"])
def test_a_grace_period_that_is_no_number_is_found_at_the_start(grace: str) -> None:
    with Server({"BLIP_GRACE_SECONDS": grace}) as server:
        assert server.process.wait(DEADLINE) != 0
        assert f"could not convert string to float: '{grace}'" in server.log()
