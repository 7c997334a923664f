"""Folders of pictures, captioned here and by real servers, in processes that are killed too."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, Server, wait_until
from tests.deploy.refusing import refusing_port

PAIR = "a large red circle to the left of a small blue square"
GROUP = "three small green triangles on a dark background"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty pictures, of which two are none."""
    for number in range(20):
        source = EXAMPLES / ("pair.jpg" if number % 2 else "group.png")
        shutil.copy(source, tmp_path / f"{number:02}{source.suffix}")
    for number in (4, 7):
        next(tmp_path.glob(f"{number:02}.*")).write_bytes(b"no picture")
    return tmp_path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "blip", "caption", *map(str, arguments)]


def caption(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BLIP_WEIGHTS": "demo", "BLIP_DEVICE": "cpu"}
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False
    )


def texts(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("*.txt"))]


def test_a_folder_is_captioned_here_without_a_server(folder: Path) -> None:
    errors = folder / "errors.log"
    ended = caption(folder, "--prefix", "a drawing of ", "--postfix", ", flat", "--errors", errors)
    assert ended.returncode == 1
    assert texts(folder) == [f"a drawing of {[GROUP, PAIR][n % 2]}, flat" for n in range(20) if n not in (4, 7)]
    failed = errors.read_text().splitlines()
    assert [line.partition(": ")[0] for line in failed] == [str(folder / "04.png"), str(folder / "07.jpg")]
    assert all(line in ended.stderr for line in failed)
    again = caption(folder)
    assert "2 of 20 pictures to do." in again.stderr


def test_answers_and_matches_go_into_tables(server: Server, folder: Path) -> None:
    question = ("--question", "how many objects are there?", "--url", server.url)
    table = folder / "out.csv"
    assert caption(folder, "--csv", table, *question).returncode == 1
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["answer"] for row in rows] == [["3", "2"][n % 2] for n in range(20) if n not in (4, 7)]
    assert rows[0]["image"] == f"{folder}/00.png"
    lines = folder / "out.jsonl"
    assert caption(folder, "--jsonl", lines, "--match", "a red circle", "--url", server.url).returncode == 1
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert found[1]["probability"] > 0.9 > found[0]["probability"]


def test_a_run_that_is_killed_goes_on_where_it_was(server: Server, folder: Path) -> None:
    table = folder / "out.jsonl"
    arguments = ("--jsonl", table, "--url", server.url)
    for done in (3, 9):
        process = subprocess.Popen(command(folder, *arguments), cwd=ROOT, stderr=subprocess.DEVNULL)
        wait_until(lambda: table.exists() and table.read_bytes().count(b"\n") >= done, "some results")  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE)
    assert caption(folder, *arguments).returncode == 1
    images = [json.loads(line)["image"] for line in table.read_text().splitlines()]
    assert images == sorted(images)
    assert len(images) == len(set(images)) == 18


@contextmanager
def killed_soon(server: Server, table: Path) -> Iterator[None]:
    """Kill a server once there are some results."""

    def kill() -> None:
        wait_until(lambda: table.exists() and table.read_bytes().count(b"\n") >= 2, "some results")
        os.killpg(server.process.pid, signal.SIGKILL)

    killing = threading.Thread(target=kill)
    killing.start()
    yield
    killing.join(DEADLINE)


def test_servers_share_the_work_and_one_that_dies_is_replaced_by_the_others(server: Server, folder: Path) -> None:
    table = folder / "out.jsonl"
    with Server() as dying, refusing_port() as port:
        dying.wait_for("READY")
        with killed_soon(dying, table):
            urls = [f"http://127.0.0.1:{port}", dying.url, server.url]
            ended = caption(folder, "--jsonl", table, *(word for url in urls for word in ("--url", url)))
    assert ended.returncode == 1
    captions = [json.loads(line)["caption"] for line in table.read_text().splitlines()]
    assert captions == [[GROUP, PAIR][n % 2] for n in range(20) if n not in (4, 7)], ended.stderr


def test_servers_that_are_down_cost_no_picture(server: Server, folder: Path) -> None:
    with contextlib.ExitStack() as ports:
        down = [f"http://127.0.0.1:{ports.enter_context(refusing_port())}" for _ in range(6)]
        ended = caption(folder, *(word for url in [*down, server.url] for word in ("--url", url)))
    assert [line.partition(": ")[0] for line in ended.stderr.splitlines() if line.startswith(str(folder))] == [
        str(folder / "04.png"),
        str(folder / "07.jpg"),
    ]
    assert texts(folder) == [[GROUP, PAIR][n % 2] for n in range(20) if n not in (4, 7)]
    told = "is left alone and tried again later: no server answered (ConnectionError)."
    assert all(ended.stderr.count(f"{url} {told}\n") == 1 for url in down)


def test_a_picture_alone_finds_the_one_server_that_answers(server: Server, tmp_path: Path) -> None:
    picture = Path(shutil.copy(EXAMPLES / "pair.jpg", tmp_path))
    with contextlib.ExitStack() as ports:
        down = [f"http://127.0.0.1:{ports.enter_context(refusing_port())}" for _ in range(6)]
        ended = caption(picture, *(word for url in [*down, server.url] for word in ("--url", url)))
    assert (ended.returncode, texts(tmp_path)) == (0, [PAIR]), ended.stderr


@contextmanager
def gateway(server: Server, status_of: Callable[[bytes], int]) -> Iterator[str]:
    """A gateway that passes a request on where `status_of` its body is 200, and else answers so itself; its URL.

    It hangs up where that is 0.
    """

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, text = status_of(body), b"upstream"
            if status == 0:
                return
            if status == 200:
                kind = {"Content-Type": self.headers["Content-Type"]}
                answer = requests.post(f"{server.url}{self.path}", data=body, headers=kind, timeout=DEADLINE)
                status, text = answer.status_code, answer.content
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_request(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as listening:
        serving = threading.Thread(target=listening.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
        finally:
            listening.shutdown()
            serving.join(DEADLINE)


def test_a_gateway_whose_server_starts_anew_is_waited_for(server: Server, folder: Path) -> None:
    asked: list[float] = []  # when

    def status_of(_: bytes) -> int:
        asked.append(time.monotonic())
        return 502 if asked[-1] - asked[0] < 4 else 200

    with gateway(server, status_of) as url:
        ended = caption(folder, "--url", url)
    assert ended.returncode == 1
    assert f"{url} is left alone and tried again later: the server answered 502: upstream." in ended.stderr
    assert texts(folder) == [[GROUP, PAIR][n % 2] for n in range(20) if n not in (4, 7)]


def test_a_picture_at_which_a_server_fails_is_listed_and_the_others_are_done(server: Server, folder: Path) -> None:
    with gateway(server, lambda body: 500 if b'filename="05.jpg"' in body else 200) as url:
        ended = caption(folder, "--url", url)
    failed = [line.partition(": ") for line in ended.stderr.splitlines() if line.startswith(str(folder))]
    assert [Path(name).name for name, _, _ in failed] == ["04.png", "05.jpg", "07.jpg"]
    assert failed[1][2] == "the server answered 500: upstream; see that server's log."
    assert len(texts(folder)) == 17


def test_pictures_at_which_a_server_fails_are_listed_though_no_others_are_left(server: Server, tmp_path: Path) -> None:
    for status, sentence in ((500, "the server answered 500: upstream"), (0, "no server answered (ConnectionError)")):
        for name in ("a.jpg", "b.jpg"):
            shutil.copy(EXAMPLES / "pair.jpg", tmp_path / name)
        pictures = sorted(tmp_path.glob("*.jpg"))[: 2 if status else 1]
        with gateway(server, lambda _: status) as url:  # noqa: B023
            ended = caption(*pictures, "--url", url)
        assert ended.returncode == 1
        assert ended.stderr.splitlines()[-len(pictures) :] == [
            f"{picture}: {sentence}; see that server's log." for picture in pictures
        ]


def test_a_busy_server_is_asked_again(folder: Path) -> None:
    with Server({"COG_MAX_CONCURRENCY": "1"}) as server:
        server.wait_for("READY")
        begun = time.monotonic()
        ended = caption(folder / "00.png", folder / "01.jpg", folder / "02.png", "--url", server.url)
        assert ended.returncode == 0, ended.stderr
        assert time.monotonic() - begun < DEADLINE
    assert texts(folder) == [GROUP, PAIR, GROUP]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("none",), "none is no file and no folder; check its name."),
        (("examples", "--question", " "), "--question is blank; give it a text."),
        (("examples", "--csv", "/none/a.csv"), "/none/a.csv cannot be used ("),
        (("examples", "--weights", "nothing"), "BLIP_WEIGHTS=nothing is neither demo nor pretrained nor a directory"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    ended = caption(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"blip caption: {sentence}")
