"""Post the three tasks for one image and print the answers. Standard library only."""

import argparse
import base64
import json
import mimetypes
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path


def as_input(image: str) -> str:
    """An http(s) address as it is; a file as a data URI."""
    if image.startswith(("http://", "https://", "data:")):
        return image
    kind = mimetypes.guess_type(image)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"


def predict(url: str, **inputs: str) -> str:
    """One prediction's output.

    Raises:
        RuntimeError: the server refused the request or the prediction failed; the message says why.
    """
    body = json.dumps({"input": inputs}).encode()
    request = urllib.request.Request(f"{url}/predictions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            prediction = json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"the server answered {error.code}: {error.read().decode(errors='replace')}") from error
    if prediction["status"] != "succeeded":
        raise RuntimeError(f"the prediction {prediction['status']}: {prediction.get('error')}")
    output = prediction["output"]
    return output if isinstance(output, str) else "".join(output)


def main(given: Sequence[str]) -> int:
    """Print the caption, the answer and the match of one image."""
    parser = argparse.ArgumentParser("client", description="Post the three tasks for one image and print the answers.")
    parser.add_argument("image", help="a file or an http(s) address")
    parser.add_argument("--question", default="how many objects are there?")
    parser.add_argument("--caption", help="the text to match (default: the caption the server gives)")
    parser.add_argument("--url", default="http://127.0.0.1:5000")
    arguments = parser.parse_args(given)
    try:
        image = as_input(arguments.image)
        caption = predict(arguments.url, image=image)
        print(caption)
        print(f"Question: {arguments.question}")
        question = {"task": "visual_question_answering", "question": arguments.question}
        print(predict(arguments.url, image=image, **question))
        text = arguments.caption or caption.removeprefix("Caption: ")
        print(f"Text: {text}")
        print(predict(arguments.url, image=image, task="image_text_matching", caption=text))
    except (OSError, RuntimeError) as error:
        print(f"scripts/client: {error}", file=sys.stderr)
        return 1
    return 0
