"""Pictures uploaded in a form, as curl -F and browsers send them."""

import json
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, Server, data_uri, wait_until
from tests.peers import FileServer, Receiver

PAIR = EXAMPLES / "pair.jpg"
TASKS: tuple[dict[str, str], ...] = (
    {},
    {"task": "visual_question_answering", "question": "what color is the circle?"},
    {"task": "image_text_matching", "caption": "a large red circle"},
)
BOUNDARY = "x-y"
TYPE = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
LIMIT = 2_000_000  # bytes of a picture


class Watched:
    """A server whose temporary files can be seen."""

    def __init__(self, server: Server, temporary: Path) -> None:
        self.server, self.temporary = server, temporary

    def is_clean(self) -> bool:
        """Whether no file is left."""
        return not [path for path in self.temporary.rglob("*") if path.is_file()]

    def post(self, body: bytes, headers: dict[str, str] | None = None) -> requests.Response:
        url = f"{self.server.url}/predictions"
        return requests.post(url, body, headers=TYPE if headers is None else headers, timeout=DEADLINE)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    temporary = tmp_path_factory.mktemp("temporary")
    with Server({"TMPDIR": str(temporary), "BLIP_MAX_IMAGE_BYTES": str(LIMIT), "COG_MAX_CONCURRENCY": "4"}) as server:
        server.wait_for("READY")
        yield Watched(server, temporary)


def part(name: str, content: bytes, more: str = "") -> bytes:
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def picture(content: bytes = PAIR.read_bytes(), name: str = "image") -> bytes:
    return part(name, content, '; filename="pair.jpg"')


@pytest.mark.parametrize("fields", TASKS)
def test_a_form_is_answered_as_json_is(watched: Watched, fields: dict[str, str]) -> None:
    with PAIR.open("rb") as file:
        url = f"{watched.server.url}/predictions"
        uploaded = requests.post(url, data=fields, files={"image": file}, timeout=DEADLINE).json()
    sent = watched.server.predict(input={"image": data_uri(PAIR), **fields}).json()
    assert uploaded["output"] == sent["output"]
    assert uploaded["input"].pop("image") == "pair.jpg"
    assert sent["input"].pop("image") == data_uri(PAIR)
    assert uploaded["input"] == sent["input"]
    kept = requests.get(f"{watched.server.url}/predictions/{uploaded['id']}", timeout=DEADLINE).json()
    assert "image" not in kept["input"]
    wait_until(watched.is_clean, "the removal of the file")


def test_curl_can_send_a_photo_and_so_can_put(watched: Watched) -> None:
    url = f"{watched.server.url}/predictions/mine"
    command = ["curl", "-s", "-X", "PUT", "-F", f"image=@{PAIR};filename=C:\\a\\ein Bild.jpg", "-F", "id=mine", url]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=DEADLINE).stdout)
    assert (answer["status"], answer["id"], answer["input"]["image"]) == ("succeeded", "mine", "ein Bild.jpg")


def test_a_form_may_have_an_address_and_a_webhook(watched: Watched, files: FileServer, receiver: Receiver) -> None:
    fields: dict[str, Any] = {
        "image": f"{files.url}/pair.jpg",
        "id": "named",
        "webhook": receiver.url,
        "webhook_events_filter": ["start", "completed"],
    }
    url = f"{watched.server.url}/predictions"
    later = {"Prefer": "respond-async"}
    answer = requests.post(url, data=fields, files={"x": b""}, headers=later, timeout=DEADLINE)
    assert answer.status_code == 422
    boundary = {**TYPE, **later}
    parts = [part(name, str(value).encode()) for name, value in fields.items() if name != "webhook_events_filter"]
    events = [part("webhook_events_filter", name.encode()) for name in ("start", "completed")]
    answer = watched.post(form(*parts, *events), boundary)
    assert (answer.status_code, answer.json()["id"]) == (202, "named")
    assert [body["status"] for body in receiver.until_completed()] == ["processing", "succeeded"]


def test_an_upload_stays_until_its_prediction_has_ended(watched: Watched, receiver: Receiver) -> None:
    body = form(picture(), part("webhook", receiver.url.encode()), part("webhook_events_filter", b"completed"))
    for _ in range(8):
        answer = watched.post(body, {**TYPE, "Prefer": "respond-async"})
        assert answer.status_code == 202
        (ended,) = receiver.until_completed()
        assert ended["status"] == "succeeded"
        assert ended["input"]["image"] == "pair.jpg"
    wait_until(watched.is_clean, "the removal of the files")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (form(part("task", b"image_captioning")), "image is missing; send it."),
        (form(part("image", b"", '; filename=""')), "image is missing; send it."),
        (form(), "image is missing; send it."),
        (picture(), "the body is not the form that its Content-Type says; send it as curl -F does."),
        (form(picture())[:-40], "the body is not the form that its Content-Type says; send it as curl -F does."),
        (b'{"input": {}}', "the body is not the form that its Content-Type says; send it as curl -F does."),
        (b"", "the body is not the form that its Content-Type says; send it as curl -F does."),
        (form(picture(), picture()), "image is there twice; send it once."),
        (form(picture(), part("image", b"http://a/b")), "image is there twice; send it once."),
        (form(part("image", b"http://a/b"), picture()), "image is there twice; send it once."),
        (form(picture(), part("task", b"a"), part("task", b"b")), "task is there twice; send it once."),
        (
            form(picture(name="photo")),
            "photo is a file; send the picture as image, and all else as text.",
        ),
        (
            form(picture(), part("quesion", b"why?")),
            "quesion is not an input; the inputs are image, task, question, caption.",
        ),
        (form(picture(), part("question", b"\xff")), "question is not UTF-8; send Unicode text."),
        (form(picture(), part("question", b"x" * 100_001)), "question has more than 100000 characters; send fewer."),
        (
            form(picture(), part("question", b"x" * 1_000_001)),
            "the body has more than 1000000 characters beside its image; send fewer.",
        ),
        (
            form(*(part(f"a{number}", b"") for number in range(51))),
            "the form has more than 50 parts; send one image and its texts.",
        ),
        (form(picture(bytes(LIMIT + 1))), "image is larger than 2 MB; send a smaller file."),
        (
            form(picture(bytes(LIMIT + 1_100_000))),
            "image is larger than 2 MB; send a smaller file.",
        ),
    ],
)
def test_a_form_that_cannot_be_served_is_refused_in_one_sentence(watched: Watched, body: bytes, sentence: str) -> None:
    answer = watched.post(body)
    assert (answer.status_code, [item["msg"] for item in answer.json()["detail"]]) == (422, [sentence])
    wait_until(watched.is_clean, "the removal of the file")


def test_a_form_without_a_boundary_is_refused(watched: Watched) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=", "Multipart/Form-Data;boundary"):
        answer = watched.post(form(picture()), {"Content-Type": kind})
        assert answer.status_code == 422, kind
        assert "send it as curl -F does" in answer.text


def test_what_is_no_picture_fails_like_any_other(watched: Watched) -> None:
    answer = watched.post(form(picture(b"no picture"))).json()
    sent = watched.server.predict(input={"image": "data:;base64,bm8gcGljdHVyZQ=="}).json()
    assert (answer["status"], answer["error"]) == (sent["status"], sent["error"])
    wait_until(watched.is_clean, "the removal of the file")


def test_an_upload_that_breaks_off_leaves_nothing(watched: Watched) -> None:
    for size in (0, 100, 300_000, 1_000_000):
        with socket.create_connection(("127.0.0.1", watched.server.port)) as connection:
            head = "POST /predictions HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\nContent-Type: "
            connection.sendall(f"{head}{TYPE['Content-Type']}\r\n\r\n".encode() + picture(bytes(1_000_000))[:size])
    wait_until(watched.is_clean, "the removal of the files")
    assert watched.post(form(picture())).json()["status"] == "succeeded"


def test_mutated_forms_are_answered_and_leave_nothing(watched: Watched) -> None:
    whole = form(part("task", b"image_captioning"), picture(b"no picture"), part("question", "für".encode()))
    for seed in range(300):
        rng = random.Random(seed)
        body = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(body))
            body[at : at + rng.randint(0, 3)] = rng.choice(
                [b"", b"\r\n", b"--", b'"', b";", b"\x00", bytes([rng.randrange(256)])]
            )
        answer = watched.post(bytes(body))
        assert answer.status_code in (200, 422), (seed, answer.status_code)
        if answer.status_code == 422:
            assert all("\n" not in item["msg"] for item in answer.json()["detail"]), seed
    wait_until(watched.is_clean, "the removal of the files")
    assert watched.server.health()["status"] == "READY"


def test_the_document_describes_the_form(watched: Watched) -> None:
    document = requests.get(f"{watched.server.url}/openapi.json", timeout=DEADLINE).json()
    for path, method in (("/predictions", "post"), ("/predictions/{prediction_id}", "put")):
        content = document["paths"][path][method]["requestBody"]["content"]
        assert content.keys() == {"application/json", "multipart/form-data"}
        described = content["multipart/form-data"]["schema"]
        assert described["required"] == ["image"]
        assert described["properties"]["image"]["format"] == "binary"
        assert {"task", "question", "caption", "id", "webhook"} <= described["properties"].keys()
