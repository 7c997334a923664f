"""Ask a server about pictures, one after another, and print what it says. Standard library only."""

import argparse
import json
import re
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip.errors import UserError
from blip.folder.outputs import Row
from blip.folder.questions import BUSY, Question, output_of

ADDRESSES = ("http://", "https://", "data:")
PATIENCE = 60.0  # seconds to come back for


def form(image: str, fields: dict[str, str]) -> tuple[bytes, str]:
    """A body and its Content-Type: `image`, a file or an address, and the texts.

    Raises:
        OSError: the file cannot be read.
    """
    boundary = uuid.uuid4().hex
    content, name = image.encode(), ""
    if not image.startswith(ADDRESSES):
        content = Path(image).read_bytes()
        shown = re.sub(r'["\\\x00-\x1f]', "_", Path(image).name)
        name = f'; filename="{shown}"'
    parts = [("image", name, content), *((field, "", text.encode()) for field, text in fields.items())]
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"{more}\r\n\r\n'.encode() + content + b"\r\n"
        for field, more, content in parts
    )
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def predict(url: str, image: str, headers: dict[str, str], question: Question) -> Row:
    """What is found; a server that is busy is asked again for a while.

    Raises:
        OSError: there is no such file, or no such server.
        UserError: the server refused the request or the prediction failed.
    """
    body, kind = form(image, question.inputs)
    request = urllib.request.Request(f"{url}/predictions", body, {**headers, "Content-Type": kind})
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(request) as answer:
                return question.row(output_of(answer.status, answer.read().decode(errors="replace")))
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if error.code not in BUSY or time.monotonic() > end:
                return question.row(output_of(error.code, said))
            time.sleep(float(error.headers.get("Retry-After", 1)))


def ask(image: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What is found for a picture, by name: its caption, or what else was asked for."""
    headers = dict(options.header)
    if options.question is None and options.match is None:
        yield from predict(options.url, image, headers, Question("image_captioning")).items()
    if options.question is not None:
        question = Question("visual_question_answering", options.question)
        yield from predict(options.url, image, headers, question).items()
    if options.match is not None:
        yield "match", predict(options.url, image, headers, Question("image_text_matching", options.match))


def header(text: str) -> tuple[str, str]:
    """A header's name and value.

    Raises:
        argparse.ArgumentTypeError: there is no colon.
    """
    name, colon, value = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text} is not NAME: VALUE")
    return name.strip(), value.strip()


def main(given: Sequence[str]) -> int:
    """Print a line for each picture; a picture that fails is told of, and the others go on."""
    parser = argparse.ArgumentParser("client", description="Caption pictures, or ask something about them.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file or an http(s) address")
    parser.add_argument("--question", help="answer it, in place of captioning")
    parser.add_argument("--match", metavar="TEXT", help="how well TEXT goes with a picture, in place of captioning")
    parser.add_argument("--json", action="store_true", help="print an object a line")
    parser.add_argument("--url", default="http://127.0.0.1:5000", help="the server (default %(default)s)")
    parser.add_argument(
        "--header", type=header, action="append", default=[], metavar="NAME:VALUE", help="for a gateway in front"
    )
    options = parser.parse_args(given)
    failed = False
    for image in options.images:
        try:
            found = dict(ask(image, options))
        except (OSError, UserError) as error:
            failed = True
            reason = getattr(error, "reason", error)  # of an address that cannot be reached
            sentence = getattr(reason, "strerror", None) or str(reason)
            print(f"scripts/client: {image}: {sentence}", file=sys.stderr)
            if options.json:
                print(json.dumps({"image": image, "error": sentence}, ensure_ascii=False), flush=True)
            continue
        if options.json:
            print(json.dumps({"image": image, **found}, ensure_ascii=False), flush=True)
        else:
            said = "; ".join(map(_plain, found.values()))
            print(f"{image}: {said}" if len(options.images) > 1 else said, flush=True)
    return int(failed)


def _plain(found: Any) -> str:
    if isinstance(found, dict):
        return f"{found['probability']:.1%} match, similarity {found['similarity']:.4f}"
    return str(found)
