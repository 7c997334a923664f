"""The Prefer header, as RFC 7240 has it."""

import time

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, Server, data_uri, wait_until
from blip.server.prefer import Preference
from tests.peers import FileServer

PAIR = data_uri(EXAMPLES / "pair.jpg")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], Preference()),
        (["respond-async"], Preference(respond_async=True)),
        (["Respond-ASYNC"], Preference(respond_async=True)),
        (["return=minimal, respond-async"], Preference(respond_async=True)),
        (["return=minimal", "respond-async; foo=1"], Preference(respond_async=True)),
        (["respond-async, wait=10"], Preference(respond_async=True, wait=10)),
        (['WAIT = "5"'], Preference(wait=5)),
        (["wait=5, wait=6"], Preference(wait=5)),
        (["wait=-1"], Preference()),
        (["wait=soon"], Preference()),
        (["wait=" + "9" * 500], Preference()),
        (['handling="a, respond-async"'], Preference()),
        ([",,;=,"], Preference()),
    ],
)
def test_the_header_is_read_as_the_rfc_says(values: list[str], expected: Preference) -> None:
    headers = [(b"accept", b"*/*"), *((b"prefer", value.encode()) for value in values)]
    assert Preference.of(headers) == expected


@pytest.mark.parametrize("value", ['"' * 65_000, '"\\' * 32_000, "wait=" * 13_000, "," * 65_000])
def test_a_hostile_header_prefers_nothing(value: str) -> None:
    assert Preference.of([(b"prefer", value.encode())]) == Preference()


def test_a_list_in_any_case_is_answered_at_once(server: Server, files: FileServer) -> None:
    headers = {"Prefer": "return=minimal, Respond-Async"}
    answer = server.predict(input={"image": f"{files.url}/held/pair.jpg"}, headers=headers)
    assert (answer.status_code, answer.json()["status"]) == (202, "processing")
    assert answer.headers["Preference-Applied"] == "respond-async"


def test_after_the_time_to_wait_the_running_prediction_is_the_answer(server: Server, files: FileServer) -> None:
    held, began = {"image": f"{files.url}/held/pair.jpg"}, time.monotonic()
    answer = server.predict(input=held, headers={"Prefer": "wait=1"})
    assert time.monotonic() - began >= 1
    assert (answer.status_code, answer.json()["status"]) == (202, "processing")
    assert answer.headers["Preference-Applied"] == "wait=1"
    again = requests.put(
        f"{server.url}/predictions/{answer.json()['id']}",
        json={"input": held},
        headers={"Prefer": "wait=0"},
        timeout=30,
    )
    assert (again.status_code, again.json()["started_at"]) == (202, answer.json()["started_at"])
    files.release.set()
    known = f"{server.url}/predictions/{answer.json()['id']}"
    wait_until(lambda: requests.get(known, timeout=DEADLINE).json()["status"] == "succeeded", "its end")


def test_what_ends_within_the_time_is_answered_as_ever(server: Server) -> None:
    headers = {"Prefer": "respond-async, wait=100"}
    answer = server.predict(input={"image": PAIR}, headers=headers)
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert answer.headers["Preference-Applied"] == "wait=100"


def test_without_a_preference_nothing_is_said_of_one(server: Server) -> None:
    assert "Preference-Applied" not in server.predict(input={"image": PAIR}).headers
    refused = server.predict(input={"image": "no"}, headers={"Prefer": "respond-async"})
    assert (refused.status_code, "Preference-Applied" in refused.headers) == (422, False)
