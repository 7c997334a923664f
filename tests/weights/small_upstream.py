"""Small upstream files on a real HTTP server that can misbehave."""

import base64
import hashlib
import time
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.harness import Peer, Request


class Mirror(Peer):
    """Serves a directory with ranges and entity tags, and with the faults that are asked for.

    Attributes:
        faults: by file name, what happens to the next requests for it, one each: an HTTP status, or
            "drop" (the connection breaks after half of what was asked for), "short" (a body without a
            declared length ends there), "wrong" (a byte of the body is changed).
        requests: how often each file was asked for.
        sent: how many bytes of each file were sent.
        ranges: whether Range is honoured.
        hashes: whether the MD5 is declared as Google's storage does.
        delay: seconds between two blocks of 16 KiB.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.ranges = self.hashes = True
        self.delay = 0.0
        super().__init__()

    def get(self, request: Request) -> None:
        """One GET."""
        name = request.path.rpartition("/")[2]
        self.requests[name] += 1
        fault = self.faults[name].pop(0) if self.faults[name] else None
        path = self.directory / name
        if isinstance(fault, int) or not path.is_file():
            request.send_error(fault if isinstance(fault, int) else 404)
            return
        body = path.read_bytes()
        md5 = hashlib.md5(body).digest()
        tag = f'"{md5.hex()}"'
        start = 0
        wanted = request.headers.get("Range")
        if wanted and self.ranges and request.headers["If-Range"] == tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            request.send_response(200)
        if fault != "short":
            request.send_header("Content-Length", str(len(body) - start))
        request.send_header("ETag", tag)
        if self.hashes:
            request.send_header("x-goog-hash", f"crc32c=AAAAAA==, md5={base64.b64encode(md5).decode()}")
        request.end_headers()
        body = body[start:]
        if fault == "wrong":
            body = body[:-200] + bytes([body[-200] ^ 1]) + body[-199:]
        if fault in ("drop", "short"):
            body = body[: len(body) // 2]
        try:
            for offset in range(0, len(body), 1 << 14):
                self.sent[name] += request.wfile.write(body[offset : offset + (1 << 14)])
                time.sleep(self.delay)
        except ConnectionError:
            pass  # the client was killed
