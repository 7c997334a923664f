"""The clients of hostile.py: each kind does one thing to a server that it must bear, again and again.

Every kind comes from a network of its own (127.0.K.0/24), as clients do that do not know of each other.
"""

import contextlib
import io
import itertools
import json
import math
import random
import socket
import struct
import time
import zlib
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException

from PIL import Image

from benchmarks.harness import EXAMPLES, TIMEOUT, Peer, Request, data_uri

JSON = {"Content-Type": "application/json"}
HEAD = "POST /predictions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
HELD = 10.0  # seconds that clients keep what they hold, and pictures take that never come
SILENT_HOSTS = 160  # receivers that never answer, each in a network of its own
PAUSE = 0.1  # seconds after what took no time, so that clients leave the server some of the processor

_prepared: list["Hostility"] = []  # from `prepare` to `run`, in the clients' process


@dataclass(frozen=True)
class Kind:
    """Something that clients do.

    Attributes:
        name: of it.
        clients: how many do it at the same time.
        act: does it once, from the address it is given; returns what the server said of it.
    """

    name: str
    clients: int
    act: Callable[[str], str]


def prepare(port: int, scale: int) -> None:
    """Make what the clients send to the server at `port`: files smaller than they may be by `scale`."""
    _prepared.append(Hostility(port, scale))


def run(end: float) -> dict[str, Counter[str]]:
    """Let all kinds act at once until `end`, of the monotonic clock; what they were told, by kind."""
    hostility = _prepared.pop()
    hostility.peer.end = end
    kinds = hostility.kinds()
    jobs = [(number, kind, client) for number, kind in enumerate(kinds, 1) for client in range(kind.clients)]

    def work(job: tuple[int, Kind, int]) -> tuple[str, Counter[str]]:
        number, kind, client = job
        told: Counter[str] = Counter()
        while time.monotonic() < end:
            try:
                told[kind.act(f"127.0.{number}.{client + 1}")] += 1
            except (OSError, HTTPException):
                told["closed"] += 1
            time.sleep(PAUSE)
        return kind.name, told

    counts: dict[str, Counter[str]] = {kind.name: Counter() for kind in kinds}
    with ThreadPoolExecutor(len(jobs)) as pool:
        for name, told in pool.map(work, jobs):
            counts[name] += told
    return counts


class Slow(Peer):
    """A web server whose pictures never come to an end, and which takes events only after `end`."""

    end = math.inf  # on the monotonic clock

    def get(self, request: Request) -> None:
        """Send a byte at a time."""
        request.send_response(200)
        request.send_header("Content-Length", "1000000")
        request.end_headers()
        for _ in range(round(HELD / 0.2)):
            request.wfile.write(b"x")
            time.sleep(0.2)

    def post(self, request: Request, _: object) -> None:
        """Ask to come back later."""
        if time.monotonic() < self.end:
            request.answer(503, Retry_After=str(round(HELD)))
        else:
            request.answer(200)


class Hostility:
    """All kinds, and what they send."""

    def __init__(self, port: int, scale: int) -> None:
        self._port, self._scale = port, scale
        self.peer = Slow()
        silent = [socket.create_server((f"127.1.{number}.1", 0)) for number in range(SILENT_HOSTS)]
        self._receivers = itertools.cycle(silent)  # the kernel accepts their connections
        self._pictures = itertools.cycle([as_request(file) for file in files(scale)])
        self._texts = itertools.cycle(list(texts()))
        self._large = as_request(bytes(49_000_000 // scale))
        self._numbers = itertools.count()

    def kinds(self) -> Sequence[Kind]:
        """What is done, and by how many."""
        return (
            Kind("pictures that take time or memory", 8, lambda source: self._post(source, next(self._pictures))),
            Kind("texts and addresses that take time", 4, lambda source: self._post(source, next(self._texts))),
            Kind("answers that are not read", 12, self._unread),
            Kind("bodies that never end", 200, self._unfinished),
            Kind("connections that say nothing", 200, self._say_nothing),
            Kind("clients that hang up", 16, self._hang_up),
            Kind("predictions that are cancelled", 4, self._cancel),
            Kind("receivers that say nothing", 4, self._name_a_silent_receiver),
            Kind("large events that are refused", 2, self._name_a_busy_receiver),
            Kind("states of a large prediction, not read", 8, self._ask_again),
            Kind("requests that are none", 4, self._send_noise),
        )

    def _connect(self, source: str) -> socket.socket:
        """A connection that takes little at a time."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(TIMEOUT)
        client.bind((source, 0))
        client.connect(("127.0.0.1", self._port))
        return client

    def _ask(self, source: str, method: str, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=2 * TIMEOUT, source_address=(source, 0))
        with contextlib.closing(connection):
            connection.request(method, path, body, {**JSON, **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def _post(self, source: str, body: bytes) -> str:
        status, answer = self._ask(source, "POST", "/predictions", body)
        return f"{status} {json.loads(answer).get('status', '')}".strip() if status == 200 else str(status)

    def _hold(self, source: str, data: bytes) -> str:
        """Send, read a few bytes, and nothing after that."""
        with self._connect(source) as client:
            client.sendall(data)
            status = client.recv(12)[-3:].decode()
            time.sleep(HELD)
            return status or "closed"

    def _unread(self, source: str) -> str:
        return self._hold(source, HEAD.format(len(self._large)).encode() + self._large)

    def _unfinished(self, source: str) -> str:
        with self._connect(source) as client:
            client.settimeout(2 * HELD)
            client.sendall(HEAD.format(999_999).encode() + b" " * (990_000 // self._scale))
            return client.recv(12)[-3:].decode() or "closed"

    def _say_nothing(self, source: str) -> str:
        with self._connect(source) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Half: "[: random.randrange(36)])
            client.settimeout(2 * HELD)
            return client.recv(12)[-3:].decode() or "closed"

    def _hang_up(self, source: str) -> str:
        body = request(f"{self.peer.url}/a.jpg")
        with self._connect(source) as client:
            client.sendall(HEAD.format(len(body)).encode() + body)
            time.sleep(1)
        return "hung up"

    def _cancel(self, source: str) -> str:
        name = f"cancelled-{next(self._numbers)}"
        body = json.dumps({"id": name, "input": {"image": f"{self.peer.url}/a.jpg"}}).encode()
        status, _ = self._ask(source, "POST", "/predictions", body, Prefer="respond-async")
        if status == 202:
            time.sleep(1)
            status, _ = self._ask(source, "POST", f"/predictions/{name}/cancel", b"")
        return str(status)

    def _name_a_silent_receiver(self, source: str) -> str:
        host, receiver_port = next(self._receivers).getsockname()
        webhook = f"http://{host}:{receiver_port}/hook"
        return self._post(source, request(data_uri(EXAMPLES / "pair.jpg"), webhook=webhook))

    def _name_a_busy_receiver(self, source: str) -> str:
        body = self._large[:-1] + f', "webhook": "{self.peer.url}/hook"}}'.encode()
        return self._post(source, body)

    def _ask_again(self, source: str) -> str:
        name = f"again-{next(self._numbers)}"
        context = {str(part): "x" * 90_000 for part in range(10)}
        body = {"id": name, "input": {"image": f"{self.peer.url}/a.jpg"}, "context": context}
        path, data = f"/predictions/{name}", json.dumps(body).encode()
        status, _ = self._ask(source, "PUT", path, data, Prefer="respond-async")
        if status != 202:
            return str(status)
        return self._hold(source, HEAD.replace("POST /predictions", f"PUT {path}").format(len(data)).encode() + data)

    def _send_noise(self, source: str) -> str:
        smuggled = (HEAD.format(6)[:-2] + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n").encode()
        with self._connect(source) as client:
            client.sendall(random.choice([smuggled, random.randbytes(50_000), b"GET /" + b"a" * 200_000]))
            return client.recv(12)[-3:].decode() or "closed"


def request(image: str, webhook: str | None = None, **inputs: str) -> bytes:
    """The body of a prediction."""
    return json.dumps({"input": {"image": image, **inputs}, **({"webhook": webhook} if webhook else {})}).encode()


def as_request(file: bytes) -> bytes:
    """The body of a prediction of a file."""
    return b'{"input": {"image": "data:;base64,' + b64encode(file) + b'"}}'


def texts() -> Iterator[bytes]:
    """Texts for which some algorithm takes quadratic time."""
    combining = "a" + "\u0301" * 49_000 + "\u0323" * 49_000
    pair = data_uri(EXAMPLES / "pair.jpg")
    yield request(pair, task="visual_question_answering", question=combining)
    yield request(pair, task="image_text_matching", caption=combining)
    yield request(pair, task="visual_question_answering", question="is there a red circle? " * 4000)
    yield request(f"http://{combining}/a.jpg")
    yield request(pair, webhook=f"http://{combining}/hook")
    yield json.dumps({"id": "x" * 100_000, "input": {"image": pair}}).encode()


def files(scale: int) -> Iterator[bytes]:
    """Pictures, and files that say they are, which take as much time or memory as they can."""
    red = Image.new("RGB", (32, 32), "red")
    jpeg, gif, png = (encoded(red, form) for form in ("JPEG", "GIF", "PNG"))
    at = gif.index(b",")
    profile = zlib.compress(bytes(1_000_000))
    chunk = b"iCCPa\0\0" + profile
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    yield jpeg[:2] + b"\xff\xe1\0\x09Exif\0\0x" * (1_300_000 // scale) + jpeg[2:]
    yield gif[:at] + b"!\xfe\x01x\0" * (9_000_000 // scale) + gif[at:]
    yield png[:33] + chunk * (30_000 // scale) + png[33:]
    side = round(8000 / scale**0.5)
    large = Image.effect_noise((side, side), 20)
    yield encoded(Image.merge("RGB", [large] * 3).resize((side // 2, side // 2)), "BMP")
    yield encoded(large, "JPEG", quality=60, progressive=True)
    yield encoded(Image.new("RGBA", (side, side), "red"), "WEBP", lossless=True, quality=0, method=0)
    yield encoded(large, "JPEG", quality=60)[: -side * 100]
    yield encoded(large.point(lambda value: value & 128).convert("1"), "TIFF", compression="group4")
    avif = encoded(red, "AVIF")
    size = avif.index(b"ispe") + 8
    yield avif[:size] + struct.pack(">II", 17_000, 17_000) + avif[size + 8 :]
    yield random.Random(0).randbytes(20_000_000 // scale)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
