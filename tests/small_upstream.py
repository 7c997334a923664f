"""What upstream publishes, with small dimensions, on a real HTTP server that can misbehave."""

import base64
import hashlib
import http.server
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.checkpoints import write_checkpoint
from blip.download import File
from blip.models import make_tokenizer
from blip.pretrained import Upstream

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a picture of the dog".split()]
NAMES = {"caption": "small_caption.pth", "answer": "small_vqa.pth", "match": "small_retrieval.pth"}
LEGACY = ("answer",)


def configs() -> dict[str, dict[str, Any]]:
    """The three config.json, for models of a few thousand parameters."""
    text = {
        "hidden_size": 32,
        "encoder_width": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "vocab_size": len(VOCABULARY) + 2,
        "add_type_embeddings": False,
        "add_cross_attention": True,
    }
    common = {
        "image_size": 16,
        "max_txt_len": 12,
        "vision": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        "text": text,
    }
    generation = {"num_beams": 3, "max_length": 10, "min_length": 1}
    return {
        "caption": {**common, **generation, "prompt": "a picture of "},
        "answer": {**common, **generation},
        "match": {**common, "embed_dim": 16},
    }


def write_upstream(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Write the vocabulary and the three checkpoints; returns the needed parameters by task, fp32."""
    directory.mkdir(exist_ok=True)
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("".join(f"{token}\n" for token in VOCABULARY))
    tokenizer = make_tokenizer(vocabulary)
    return {
        task: write_checkpoint(directory / NAMES[task], task, config, tokenizer, legacy=task in LEGACY, queue=64)
        for task, config in configs().items()
    }


def upstream(directory: Path, url: str) -> Upstream:
    """The files of `directory` as published below `url`."""

    def file(name: str) -> File:
        return File(f"{url}/{name}", (directory / name).stat().st_size)

    return Upstream(file("vocab.txt"), {task: file(name) for task, name in NAMES.items()}, configs())


class Mirror:
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
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.answer(self)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
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

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
