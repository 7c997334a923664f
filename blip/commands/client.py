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

ADDRESSES = ("http://", "https://", "data:")
BUSY = (409, 503)  # statuses that say when to come back
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


def predict(url: str, image: str, headers: dict[str, str], **fields: str) -> str:
    """One prediction's output; a server that is busy is asked again for a while.

    Raises:
        OSError: there is no such file, or no such server.
        RuntimeError: the server refused the request or the prediction failed; the message says why.
    """
    body, kind = form(image, fields)
    request = urllib.request.Request(f"{url}/predictions", body, {**headers, "Content-Type": kind})
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(request) as answer:
                prediction = json.load(answer)
            break
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if error.code not in BUSY or time.monotonic() > end:
                raise RuntimeError(_sentence(error.code, said)) from error
            time.sleep(float(error.headers.get("Retry-After", 1)))
    if prediction["status"] != "succeeded":
        raise RuntimeError(prediction.get("error") or f"the prediction {prediction['status']}")
    output = prediction["output"]
    return output if isinstance(output, str) else "".join(output)


def _sentence(status: int, said: str) -> str:
    """What an error says; a gateway may not speak JSON."""
    try:
        detail = json.loads(said)["detail"]
        return detail if isinstance(detail, str) else " ".join(item["msg"] for item in detail)
    except (ValueError, LookupError, TypeError):
        return f"the server answered {status}: {said}"


def ask(image: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What is found for a picture, by name: its caption, or what else was asked for."""
    headers = dict(options.header)
    if options.question is None and options.match is None:
        yield "caption", predict(options.url, image, headers).removeprefix("Caption: ")
    if options.question is not None:
        fields = {"task": "visual_question_answering", "question": options.question}
        yield "answer", predict(options.url, image, headers, **fields).removeprefix("Answer: ")
    if options.match is not None:
        fields = {"task": "image_text_matching", "caption": options.match}
        said = predict(options.url, image, headers, **fields)
        probability, similarity = map(float, re.findall(r"-?\d+\.\d+", said))
        yield "match", {"probability": round(probability / 100, 6), "similarity": similarity}


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
        except (OSError, RuntimeError) as error:
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
