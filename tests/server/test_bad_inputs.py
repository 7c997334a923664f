"""Whatever is sent, the answer is one plain sentence, nothing is left behind, and the next request succeeds."""

import asyncio
import base64
import contextlib
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import requests
from fastapi import FastAPI
from PIL import Image
from starlette.types import Message

from benchmarks.harness import DEADLINE, EXAMPLES, Server, data_uri, free_port, wait_until
from blip import __version__
from blip.server import bodies
from blip.server.files import Files
from blip.server.room import Room
from tests.image_files import encoded, png
from tests.peers import FileServer

PAIR = data_uri(EXAMPLES / "pair.jpg")
CAPTION = "Caption: a large red circle to the left of a small blue square"
MAX_BYTES = 2_000_000
MEMORY = 200_000_000  # bytes by which no process may grow at any time, several times what the largest input needs


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes images of up to 2 MB and has a directory for temporary files of its own."""
    temporary = tmp_path_factory.mktemp("temporary")
    with Server({"BLIP_MAX_IMAGE_BYTES": str(MAX_BYTES), "TMPDIR": str(temporary)}) as server:
        server.wait_for("READY")
        for _ in range(3):
            ask(server, PAIR)
        before = server.peak_memory()
        yield server
        wait_until(lambda: files_in(temporary) == [], "temporary files to be removed")
        after = server.peak_memory()
        assert all(later - earlier < MEMORY for earlier, later in zip(before, after, strict=True))


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def ask(server: Server, image: Any, **more: Any) -> dict[str, Any]:
    """The answer as the status of the prediction, or 422, and the sentence; and the server lives."""
    return judge(server.predict(input={"image": image, **more}))


def judge(answer: requests.Response) -> dict[str, Any]:
    body = answer.json()
    if answer.status_code == 422:
        (refusal,) = body["detail"]
        assert set(refusal) == {"loc", "msg", "type"}
        return {"status": 422, "error": refusal["msg"]}
    assert answer.status_code == 200
    return {"status": body["status"], "error": body["error"], "output": body["output"]}


def post(server: Server, body: bytes, content_type: str = "application/json") -> dict[str, Any]:
    headers = {"Content-Type": content_type}
    return judge(requests.post(f"{server.url}/predictions", data=body, headers=headers, timeout=DEADLINE))


def assert_a_good_request_succeeds(server: Server) -> None:
    assert ask(server, PAIR) == {"status": "succeeded", "error": None, "output": CAPTION}


def data(content: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black pixels, one bit each, with all of its data."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    return png((side, side), b"".join(packer.compress(row) for _ in range(side)) + packer.flush(), bits=1)


UNKNOWN = "image is not a picture in a known format; send a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC file."
DAMAGED = "image could not be read: it is damaged or incomplete; send it again or save it anew."
FAILED = "image could not be downloaded: the connection to 127.0.0.1 failed; check the address."
PHOTO = (EXAMPLES / "pair.jpg").read_bytes()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "image is empty; send a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC file."),
        (b"hello", UNKNOWN),
        (b"<!DOCTYPE html><title>404</title>", UNKNOWN),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', UNKNOWN),
        (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", UNKNOWN),
        (PHOTO[:20], DAMAGED),
        (bomb(60_000), "image has 3600000000 pixels, more than the 64 million that are taken; send a smaller one."),
    ],
    ids=["empty", "text", "html", "svg", "pdf", "header only", "bomb"],
)
def test_a_file_that_is_no_usable_image_is_one_sentence(limited: Server, content: bytes, sentence: str) -> None:
    assert ask(limited, data(content)) == {"status": "failed", "error": sentence, "output": None}
    assert_a_good_request_succeeds(limited)


def test_unusual_images_are_answered_like_plain_ones(limited: Server) -> None:
    plain = Image.open(EXAMPLES / "pair.jpg").convert("RGB")
    alpha = plain.copy()
    alpha.putalpha(255)
    other = Image.new("RGB", plain.size, "white")
    palette = plain.quantize(64)
    grey = plain.convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise for display
    variants = {
        "CMYK": encoded(plain.convert("CMYK"), "JPEG", quality=95),
        "alpha": encoded(alpha, "PNG"),
        "palette with transparency": encoded(palette, "PNG", transparency=0),
        "animated GIF": encoded(palette, "GIF", save_all=True, append_images=[other.quantize(2)]),
        "animated WebP": encoded(plain, "WEBP", save_all=True, append_images=[other], lossless=True),
        "EXIF": encoded(plain.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=turned),
    }
    for name, content in variants.items():
        assert ask(limited, data(content))["output"] == CAPTION, name
    sixteen = Image.frombytes("I;16", grey.size, b"".join(struct.pack("<H", 257 * v) for v in grey.tobytes()))
    assert ask(limited, data(encoded(sixteen, "PNG"))) == ask(limited, data(encoded(grey, "PNG")))


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_images_of_extreme_shapes_are_answered(limited: Server, size: tuple[int, int]) -> None:
    assert ask(limited, data(encoded(Image.new("RGB", size, "red"), "PNG")))["status"] == "succeeded"


@pytest.mark.parametrize(
    "image",
    [
        *(7, 1.5, None, True, [], ["http://example.org/a.jpg"], {}),
        *("", "a.jpg", "/etc/passwd", "file:///etc/passwd", "ftp://example.org/a.jpg", "javascript:1", "//a/b.jpg"),
        *("http://", "http:///a.jpg", "http://[::1", "http://a:99999/", "http://a\x00b/", "http://a\nb/"),
        *("data:image/jpeg;base64", "data:", "data:image/png;base64,\u2603", "data:;base64,=\ud800"),
    ],
)
def test_what_is_no_address_of_an_image_is_refused(limited: Server, image: object) -> None:
    body = json.dumps({"input": {"image": image}}).encode()
    answer = post(limited, body)
    assert answer["status"] == 422
    assert answer["error"].startswith("image ")
    assert_a_good_request_succeeds(limited)


@pytest.mark.parametrize("content", ["A" * 65_534 + "==" + "AAAA", "@@@@", "AAA", "A", "AAAA=AAA", "%%%%", "AAAA,AAAA"])
def test_damaged_base64_is_one_sentence(limited: Server, content: str) -> None:
    assert ask(limited, f"data:image/jpeg;base64,{content}") == {
        "status": "failed",
        "error": "image is a data address with damaged base64; encode the whole file again.",
        "output": None,
    }


def test_data_addresses_may_be_folded_or_escaped_and_need_no_base64(limited: Server) -> None:
    encoded = base64.encodebytes(PHOTO).decode()
    escaped = base64.b64encode(PHOTO).decode().replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    percent = "".join(f"%{byte:02x}" for byte in PHOTO)
    for image in (f"data:image/jpeg;base64,{encoded}", f"DATA:;base64,{escaped}", f"data:image/jpeg,{percent}"):
        assert ask(limited, image)["output"] == CAPTION


def test_an_image_beyond_the_limit_is_refused_however_it_comes(limited: Server, files: FileServer) -> None:
    too_large = "image is larger than 2 MB; send a smaller file."
    largest = encoded(Image.new("RGB", (8, 8)), "BMP") + bytes(MAX_BYTES)
    assert ask(limited, data(largest[:MAX_BYTES]))["status"] == "succeeded"
    assert ask(limited, data(largest[: MAX_BYTES + 1]))["error"] == too_large
    for path in ("huge", "endless"):
        assert ask(limited, f"{files.url}/{path}") == {"status": "failed", "error": too_large, "output": None}
    for size in (MAX_BYTES * 3 // 2 + 10, 100 * MAX_BYTES):
        answer = post(limited, b'{"input": {"image": "data:;base64,%s"}}' % (b"A" * size))
        assert answer["status"] == 422
        assert answer["error"] in (too_large, "image is too large: the request has more than 3.7 MB; send less.")
    assert_a_good_request_succeeds(limited)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        *(
            (f"status/{status}", f"image could not be downloaded: 127.0.0.1 answered {status}; {fix}.")
            for status, fix in {
                401: "it wants a login, so send the file itself",
                403: "it refuses this server, so send the file itself",
                404: "check that the file is there",
                410: "the file is gone, so send another address",
                418: "check the address",
                429: "it has had too many requests, so try again later",
            }.items()
        ),
        ("status/500", "image could not be downloaded: 127.0.0.1 answered 500; check the address."),
        ("loop", "image could not be downloaded: 127.0.0.1 redirects without end."),
        ("cut", FAILED),
        ("junk", FAILED),
        ("redirect/file:///etc/passwd", FAILED),
        ("gzip", UNKNOWN),
        ("crumbs", "image could not be downloaded: 127.0.0.1 sends it byte by byte."),
    ],
)
def test_a_download_that_fails_is_one_sentence(limited: Server, files: FileServer, path: str, sentence: str) -> None:
    assert ask(limited, f"{files.url}/{path}") == {"status": "failed", "error": sentence, "output": None}
    assert_a_good_request_succeeds(limited)


@pytest.mark.parametrize("path", ["redirect-bomb", "redirect-endless"])
def test_the_body_of_a_redirect_is_not_read(limited: Server, files: FileServer, path: str) -> None:
    """The fixture sees how much memory it took."""
    assert ask(limited, f"{files.url}/{path}")["output"] == CAPTION


def test_a_host_that_is_not_there_is_one_sentence(limited: Server) -> None:
    for host in (f"127.0.0.1:{free_port()}", "nobody.invalid", "a b", "\u2603.invalid", "a" * 300):
        answer = ask(limited, f"http://{host}/a.jpg")
        assert answer["status"] == "failed"
        assert answer["error"].startswith("image could not be downloaded: the connection to ")


def test_downloads_that_never_end_are_given_up_and_hold_up_nobody(limited: Server, files: FileServer) -> None:
    with ThreadPoolExecutor(16) as pool:
        slow = [pool.submit(ask, limited, f"{files.url}/{path}") for path in ("drip", "drip-headers") * 8]
        assert ask(limited, f"{files.url}/pair.jpg")["output"] == CAPTION
        assert not any(answer.done() for answer in slow)
        sentence = "image could not be downloaded from 127.0.0.1 within 30 s; send the file itself."
        assert [answer.result()["error"] for answer in slow] == [sentence] * 16
    assert_a_good_request_succeeds(limited)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"imgae": PAIR}, "image is missing; send it."),
        ({"image": PAIR, "capton": "a"}, "capton is not an input; the inputs are image, task, question, caption."),
        ({"image": PAIR, "a\ud800": "a"}, "input is not usable: Input should be a valid string, unable to parse"),
        (
            {"image": PAIR, "task": "translation"},
            "task must be 'image_captioning', 'visual_question_answering' or 'image_text_matching'.",
        ),
        ({"image": PAIR, "task": None}, "task must be "),
        ({"image": PAIR, "question": 7}, "question is not usable: Input should be a valid string."),
        ({"image": PAIR, "caption": ["a"]}, "caption is not usable: Input should be a valid string."),
        ({"image": PAIR, "question": "\ud800"}, "question has half of a surrogate pair"),
    ],
)
def test_inputs_that_do_not_fit_are_one_sentence_each(limited: Server, inputs: dict[str, Any], sentence: str) -> None:
    answer = requests.post(
        f"{limited.url}/predictions",
        data=json.dumps({"input": inputs}),
        headers={"Content-Type": "application/json"},
        timeout=DEADLINE,
    )
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["msg"].startswith(sentence)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b"[]", b"7", b"null", b"NaN", b'""', b'{"input": null}', b'{"input": []}', b'{"input": 7}'),
        *(b"not json", b'{"input": \xff}', b'{"input": {"image": NaN}}', b"[" * 100_000, b'{"a":' * 100_000),
        b'{"id": "\\ud800", "input": {"image": "data:,a"}}',
        b'{"context": {"a": "\\ud800"}, "input": {"image": "data:,a"}}',
    ],
)
def test_a_body_that_is_no_request_is_one_sentence(limited: Server, body: bytes) -> None:
    answer = post(limited, body)
    assert answer["status"] == 422
    assert "\n" not in answer["error"]
    assert_a_good_request_succeeds(limited)


def test_a_body_that_is_not_called_json_is_one_sentence(limited: Server) -> None:
    answer = post(limited, json.dumps({"input": {"image": PAIR}}).encode(), "text/plain")
    assert answer["error"] == "the body must be a JSON object; send one with Content-Type: application/json."


@pytest.mark.parametrize(
    "text", ["why " * 10_000, "\u0000", "\u0001\u0007\u001b[31m", "\u202e\u200b", "日本語 ☃ 🎈 é́́", "?!.", "a" * 100_000]
)
def test_texts_of_any_kind_are_answered(limited: Server, text: str) -> None:
    for task, name in (("visual_question_answering", "question"), ("image_text_matching", "caption")):
        assert ask(limited, PAIR, task=task, **{name: text})["status"] == "succeeded"


def test_long_texts_of_many_clients_at_a_time_are_answered(limited: Server) -> None:
    """Above 16 KiB what several threads send to the worker process could get mixed up."""
    with ThreadPoolExecutor(16) as pool:
        inputs = {"task": "visual_question_answering", "question": "what color is the circle? " * 3000}
        answers = list(pool.map(lambda _: ask(limited, PAIR, **inputs)["status"], range(160)))
    assert answers == ["succeeded"] * 160


@pytest.mark.parametrize("task", ["visual_question_answering", "image_text_matching"])
def test_many_combining_characters_keep_nobody_waiting(limited: Server, task: str) -> None:
    """Sorting them takes time that grows with the square of their number."""
    text = "a" + "\u0301" * 49_999 + "\u0323" * 49_999
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, limited, PAIR, task=task, question=text, caption=text)
        statuses = set()
        while not answer.done():
            statuses.add(limited.health()["status"])
    assert answer.result()["status"] == "succeeded"
    assert statuses <= {"READY", "BUSY"}


@pytest.mark.parametrize("letters", ["\u0301" * 40_000 + "\u0323" * 40_000, "a" * 4096])
def test_addresses_beyond_all_measure_are_refused(limited: Server, letters: str) -> None:
    address = f"http://{letters}.invalid/a.jpg"
    sentence = "is an address of more than 4096 characters;"
    assert ask(limited, address) == {"status": 422, "error": f"image {sentence} send the file itself."}
    refused = limited.predict(input={"image": PAIR}, webhook=address)
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["msg"] == f"webhook {sentence} set a shorter one."


def test_ids_beyond_all_measure_are_refused_and_not_logged(limited: Server) -> None:
    body = {"input": {"image": PAIR}}
    for answer in (
        limited.predict(id="x" * 100_000, **body),
        requests.put(f"{limited.url}/predictions/{'x' * 10_000}", json=body, timeout=DEADLINE),
    ):
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["msg"] == "id has more than 1000 characters; send fewer."
    assert "x" * 101 not in limited.log()


def test_data_addresses_are_read_as_browsers_read_them(limited: Server) -> None:
    spaced = PAIR.replace(";base64", "; base64")
    url_safe = PAIR.partition(",")[0] + "," + PAIR.partition(",")[2].translate(str.maketrans("+/", "-_"))
    assert url_safe != PAIR
    for image in (spaced, url_safe):
        assert ask(limited, image)["output"] == CAPTION


def test_a_cookie_that_a_redirect_sets_is_sent_on(limited: Server, files: FileServer) -> None:
    assert ask(limited, f"{files.url}/cookie/pair.jpg")["output"] == CAPTION


def test_a_download_says_who_asks(limited: Server, files: FileServer) -> None:
    """Hosts refuse the names of libraries."""
    assert ask(limited, f"{files.url}/redirect//pair.jpg")["output"] == CAPTION
    assert files.agents == {f"blip/{__version__}"}


def test_an_idle_connection_stays_open_longer_than_stock_keeps_it(limited: Server) -> None:
    with contextlib.closing(limited.connect()) as connection:
        assert connection.health() == "READY"
        time.sleep(7)  # stock closes it after five
        connection.request("GET", "/health-check")  # raises an error where the connection was closed
        assert connection.getresponse().status == 200


@pytest.mark.parametrize("name", ["question", "caption"])
def test_a_text_beyond_all_measure_is_refused(limited: Server, name: str) -> None:
    assert ask(limited, PAIR, **{name: "a" * 100_001}) == {
        "status": 422,
        "error": f"{name} has more than 100000 characters; send fewer.",
    }


def test_headers_and_addresses_without_end_are_refused(limited: Server) -> None:
    for start, more in ((b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 10_000), (b"GET /", b"a" * 60_000)):
        with socket.create_connection(("127.0.0.1", limited.port)) as client, contextlib.suppress(ConnectionError):
            client.settimeout(DEADLINE)
            client.sendall(start)
            for _ in range(1000):
                client.sendall(more)
            pytest.fail("the server reads on")
    assert_a_good_request_succeeds(limited)


def test_large_bodies_that_do_not_come_leave_room_for_the_others(limited: Server) -> None:
    size = MAX_BYTES * 4 // 3 + 1_000_000
    head = f"POST /predictions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    with contextlib.ExitStack() as open_until_the_end:
        for _ in range(8):
            client = open_until_the_end.enter_context(socket.create_connection(("127.0.0.1", limited.port)))
            client.sendall(head.encode() + b" " * (size - 200))
        assert_a_good_request_succeeds(limited)


@pytest.mark.parametrize("kind", [b"application/json", b"multipart/form-data; boundary=a"])
def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch, kind: bytes) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    sent: list[Message] = []

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    files = Files()
    limit = bodies.BodyLimit(
        FastAPI(),
        Room(500, 0),
        ContextVar("current"),
        ContextVar("texts"),
        files,
        max_body=100,
        max_image=100,
        refusal=lambda _: None,
    )
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/predictions", "client": None}
    asyncio.run(limit({**scope, "headers": [(b"content-type", kind)]}, never, send))
    files.close()
    assert sent[0]["status"] == 408


def test_large_bodies_in_parallel_take_bounded_memory_and_health_answers() -> None:
    largest = 66_000_000
    bodies = [
        b'{"input": {"image": "data:;base64,%s"}}' % (b"AA " * (largest // 3)),
        b'{"input": {"image": "data:,%s"}}' % (b"%41" * (largest // 3)),
        b'{"input": {"image": "data:;base64,%s"}}' % (b"A" * largest),
        b'{"input": {"image": "data:,", "question": "%s"}}' % (b"a" * largest),
        b'{"input": [%s1]}' % (b"1," * (largest // 2)),
    ]
    with Server() as server:
        server.wait_for("READY")
        before = server.peak_memory()
        with ThreadPoolExecutor(10) as pool:
            url, headers = f"{server.url}/predictions", {"Content-Type": "application/json"}
            answers = [pool.submit(requests.post, url, body, headers=headers, timeout=DEADLINE) for body in bodies * 2]
            while not all(answer.done() for answer in answers):
                assert server.health()["status"] in ("READY", "BUSY")
        assert {answer.result().status_code for answer in answers} <= {200, 409, 422}
        # Four bodies, each several times: as bytes, as text, and in the answer, which repeats its input.
        assert server.peak_memory()[0] - before[0] < 4 * 6 * largest
        assert_a_good_request_succeeds(server)


def test_the_id_of_a_running_prediction_is_refused_and_disturbs_nobody(limited: Server, files: FileServer) -> None:
    held: dict[str, Any] = {"id": "twice", "input": {"image": f"{files.url}/held/pair.jpg"}}
    assert limited.predict(headers={"Prefer": "respond-async"}, **held).status_code == 202
    assert limited.predict(**held).status_code == 409
    assert_a_good_request_succeeds(limited)
    files.release.set()


def test_a_prediction_can_be_cancelled_while_its_image_is_fetched(limited: Server, files: FileServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(limited.predict, id="fetching", input={"image": f"{files.url}/held/pair.jpg"})
        url = f"{limited.url}/predictions/fetching/cancel"
        wait_until(lambda: requests.post(url, timeout=DEADLINE).status_code == 200, "the prediction")
        files.release.set()
        assert held.result().json()["status"] == "canceled"


def test_predictions_that_are_cancelled_at_once_all_end(limited: Server) -> None:
    def cancelled(number: int) -> str:
        name = f"at once {number}"
        body = {"id": name, "input": {"image": PAIR}}
        with requests.Session() as session, ThreadPoolExecutor(1) as pool:
            running = pool.submit(session.post, f"{limited.url}/predictions", json=body, timeout=DEADLINE)
            while not running.done():
                requests.post(f"{limited.url}/predictions/{name}/cancel", timeout=DEADLINE)
            return str(running.result().json()["status"])

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(cancelled, range(200))) <= {"canceled", "succeeded"}


def test_no_input_ends_up_in_the_error_with_a_path_or_a_traceback(limited: Server, tmp_path: Path) -> None:
    for image in (data(b"hello"), data(PHOTO[:100]), "data:;base64,A", "http://127.0.0.1:1/"):
        error = ask(limited, image)["error"]
        assert error.count("\n") == 0
        assert "Traceback" not in error
        assert "/tmp" not in error
        assert str(tmp_path.parent) not in error
