"""Decoding behind the real server: cancelling, crashes, the end of the worker, and memory."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from PIL import Image

from benchmarks.harness import EXAMPLES, Server, data_uri, wait_until
from benchmarks.processes import decoders_of, memory
from tests.image_files import encoded
from tests.pictures.test_pool import CRASHED, is_decoding, slow_picture

CAPTION = "Caption: a large red circle to the left of a small blue square"
PAIR = data_uri(EXAMPLES / "pair.jpg")


@pytest.fixture
def own() -> Iterator[Server]:
    with Server({"COG_MAX_CONCURRENCY": "2"}) as server:
        server.wait_for("READY")
        yield server


@pytest.fixture
def slow(tmp_path: Path) -> str:
    path = tmp_path / "slow.bmp"
    path.write_bytes(slow_picture())
    return data_uri(path)


def decoding(server: Server) -> list[int]:
    return [pid for pid in decoders_of(server.process.pid) if is_decoding(pid)]


def test_cancelling_while_decoding_ends_the_prediction_and_frees_its_slot(own: Server, slow: str) -> None:
    with ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(own.predict, input={"image": slow}, id=name) for name in ("a", "b")]
        wait_until(lambda: bool(decoding(own)), "a picture to be decoded")
        own.wait_for("BUSY")
        for name in ("a", "b"):
            assert requests.post(f"{own.url}/predictions/{name}/cancel", timeout=10).status_code == 200
        assert [answer.result().json()["status"] for answer in answers] == ["canceled", "canceled"]
    own.wait_for("READY")
    assert own.predict(input={"image": PAIR}).json()["output"] == CAPTION
    assert decoding(own) == []


def test_a_crash_fails_its_prediction_in_one_sentence_and_no_other(own: Server, slow: str) -> None:
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(own.predict, input={"image": slow})
        wait_until(lambda: bool(decoding(own)), "a picture to be decoded")
        os.kill(decoding(own)[0], signal.SIGSEGV)
        body = answer.result().json()
    assert (body["status"], body["error"]) == ("failed", CRASHED)
    assert own.predict(input={"image": PAIR}).json()["output"] == CAPTION


def test_the_decoders_end_with_the_worker_whatever_they_do(own: Server, slow: str) -> None:
    decoders = decoders_of(own.process.pid)
    assert decoders
    asking = threading.Thread(target=own.predict, kwargs={"input": {"image": slow}}, daemon=True)
    asking.start()
    wait_until(lambda: bool(decoding(own)), "a picture to be decoded")
    os.kill(own.processes[1], signal.SIGKILL)
    wait_until(lambda: not any(map(alive, decoders)), "the decoders to end")
    asking.join()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # gone, or it went while its file was read
        return False


def test_the_memory_of_large_pictures_goes_back(own: Server, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(encoded(Image.new("RGBA", (8000, 8000)), "PNG"))
    for image in (PAIR, data_uri(path)):
        assert own.predict(input={"image": image}).json()["status"] == "succeeded"
    processes = [own.processes[1], *decoders_of(own.process.pid)]
    before = sum(map(memory, processes))
    for _ in range(3):
        assert own.predict(input={"image": data_uri(path)}).json()["status"] == "succeeded"
    after = sum(map(memory, processes))
    assert after < before + (30 << 20)
    assert all(memory(pid) < 100 << 20 for pid in processes[1:])
