"""Predictions can be found again by their ids, within limits."""

import json
import tracemalloc

import pytest
import requests
from cog.schema import PredictionResponse, Status

from benchmarks.harness import DEADLINE, EXAMPLES, Server, data_uri, wait_until
from blip.server import history
from blip.server.history import History
from tests.peers import FileServer

PAIR = data_uri(EXAMPLES / "pair.jpg")
CAPTION = "Caption: a large red circle to the left of a small blue square"


def get(server: Server, name: str) -> requests.Response:
    return requests.get(f"{server.url}/predictions/{name}", timeout=DEADLINE)


def test_a_prediction_without_an_id_gets_one_and_is_found_by_it(server: Server) -> None:
    body = server.predict(input={"image": PAIR}).json()
    assert len(body["id"]) == 32
    wait_until(lambda: get(server, body["id"]).json()["status"] == "succeeded", "its end")
    assert body["input"].pop("image")
    assert get(server, body["id"]).json() == body, "all but its image"


def test_without_a_webhook_nothing_is_lost(server: Server, files: FileServer) -> None:
    held = {"image": f"{files.url}/held/pair.jpg"}
    name = server.predict(input=held, headers={"Prefer": "respond-async"}).json()["id"]
    running = get(server, name).json()
    assert (running["status"], running["output"], "image" in running["input"]) == ("processing", None, False)
    files.release.set()
    wait_until(lambda: get(server, name).json()["status"] == "succeeded", "its end")
    ended = get(server, name).json()
    assert ended["output"] == CAPTION
    assert ended["metrics"]["download_time"] > 0


def test_an_unknown_id_is_404_with_one_sentence(server: Server) -> None:
    answer = get(server, "nobody")
    assert answer.status_code == 404
    assert answer.json() == {"detail": "No prediction with this id is running or has ended within the hour"}


def run(known: History, name: str, output: str = "") -> None:
    prediction = PredictionResponse(input={"image": "data:,"}, id=name, output=output, status=Status.SUCCEEDED)
    known.start(name, lambda: prediction)
    known.end(name)


def kept(known: History, count: int) -> list[int]:
    return [number for number in range(count) if known.get(str(number))]


def test_the_oldest_go_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "NUMBER", 3)
    known = History()
    for number in range(5):
        run(known, str(number))
    assert kept(known, 5) == [2, 3, 4]


def test_the_oldest_go_when_they_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "SIZE", 2_500)
    known = History()
    for number in range(5):
        run(known, str(number), "x" * 800)
    assert kept(known, 5) == [3, 4]
    run(known, "large", "x" * 3_000)
    assert kept(known, 5) == []
    assert known.get("large") is None


def test_a_prediction_takes_the_memory_of_its_json_and_little_more() -> None:
    known = History()
    run(known, "first")
    tracemalloc.start()
    try:
        for number in range(200):
            run(known, str(number), "x" * 200)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(known.get("7") or b"") < taken / 200 < 1_500


def test_all_go_after_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "SECONDS", -1.0)
    known = History()
    run(known, "0")
    assert kept(known, 1) == []


def test_an_id_that_is_used_again_has_the_newer_state() -> None:
    known = History()
    for output in ("first", "second"):
        run(known, "again", output)
    assert json.loads(known.get("again") or b"")["output"] == "second"
