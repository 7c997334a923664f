"""The long strings of a request stay as they came, and are read in pieces."""

import asyncio
import base64
import contextlib
import json
import random
from typing import Any

import pytest
import requests
from fastapi import HTTPException
from hypothesis import given, settings
from hypothesis import strategies as some

from benchmarks.harness import DEADLINE, EXAMPLES, Server, data_uri
from blip.server import long_text
from blip.server.answers import as_json
from blip.server.long_text import REST_BYTES, SHORTEST, LongText, NotPlainError, cut

PAIR = data_uri(EXAMPLES / "pair.jpg")
CAPTION = "Caption: a large red circle to the left of a small blue square"
#: The picture with so many bytes after its end that its address is long.
LONG = "data:image/jpeg;base64," + base64.b64encode((EXAMPLES / "pair.jpg").read_bytes() + bytes(SHORTEST)).decode()


def parsed(body: bytes) -> Any:
    """What a request means, read in both steps."""
    short, texts = asyncio.run(cut(bytearray(body)))
    document = json.loads(short)

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {whole(name): whole(one) for name, one in value.items()}
        if isinstance(value, list):
            return [whole(one) for one in value]
        return "".join(texts[value].pieces()) if isinstance(value, str) and value in texts else value

    return whole(document)


json_values = some.recursive(
    some.none() | some.booleans() | some.integers() | some.text(alphabet='ab"\\/\u00e9\u0301\U0001f388\n', max_size=60),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(value=json_values, ascii_only=some.booleans(), indent=some.sampled_from([None, 2]))
def test_a_request_means_what_it_means_to_the_json_module(value: Any, ascii_only: bool, indent: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "SHORTEST", 20)
        patch.setattr(long_text, "PIECE", 16)
        body = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
        with contextlib.suppress(NotPlainError):  # more escapes in a row than a piece of 16 bytes has room for
            assert parsed(body) == value


def test_slashes_may_be_escaped_and_any_character_may(server: Server) -> None:
    for image in (LONG, LONG.replace("/", "\\/"), LONG.replace("b", "\\u0062", 1)):
        body = f'{{"input": {{"image": "{image}"}}}}'.encode()
        headers = {"Content-Type": "application/json"}
        answer = requests.post(f"{server.url}/predictions", body, headers=headers, timeout=DEADLINE).json()
        assert answer["output"] == CAPTION
        assert answer["input"]["image"] == LONG


@pytest.mark.parametrize("inside", ["\n", "\\x", "\x00", '", "b": "\\'])
def test_a_long_string_that_is_not_json_is_refused(server: Server, inside: str) -> None:
    middle = len(LONG) // 2
    body = f'{{"input": {{"image": "{LONG[:middle]}{inside}{LONG[middle:]}"}}}}'.encode()
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{server.url}/predictions", body, headers=headers, timeout=DEADLINE)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["msg"] == "the body is not valid JSON; send a JSON object."


@pytest.mark.parametrize("name", ["question", "caption"])
def test_a_long_string_elsewhere_than_in_the_image_is_refused(server: Server, name: str) -> None:
    answer = server.predict(input={"image": PAIR, name: "x" * SHORTEST})
    assert answer.status_code == 422
    sentence = "the body has more than 1000000 characters beside its image; send fewer."
    assert answer.json()["detail"][0]["msg"] == sentence
    answer = server.predict(input={"image": PAIR}, context={"a": "x" * SHORTEST})
    assert answer.json()["detail"][0]["msg"] == sentence


def test_a_long_string_that_is_no_ascii_or_no_address_is_refused(server: Server) -> None:
    for letters in ("\u00e9", "\u00e9" * 5_000):
        accented = server.predict(input={"image": LONG[:-500_000] + letters + LONG[-500_000:]})
        assert accented.json()["detail"][0]["msg"].startswith("image is a malformed data address;")
    other = server.predict(input={"image": "http://" + "a" * SHORTEST})
    assert other.json()["detail"][0]["msg"].startswith("image is an address of more than 4096 characters;")


@pytest.mark.parametrize(
    "body",
    [
        '{"a": "' + '\\"' * 2_000_000,
        '{"a": "' + "\\" * 5_000_000 + '"}',
        '"' * 5_000_000,
        '{"a": "\\' + "x" * 5_000_000 + '"}',
    ],
    ids=["escaped quotes", "backslashes", "quotes", "an unknown escape"],
)
def test_a_body_that_takes_many_steps_lets_others_have_their_turns(body: str) -> None:
    async def count_turns() -> int:
        cutting = asyncio.ensure_future(cut(bytearray(body.encode())))
        turns = 0
        while not cutting.done():
            await asyncio.sleep(0)
            turns += 1
        assert cutting.exception() or not any(text.is_ascii for text in cutting.result()[1].values())
        return turns

    assert asyncio.run(count_turns()) >= 1


def test_what_is_beside_long_strings_is_bounded() -> None:
    with pytest.raises(HTTPException) as refused:
        asyncio.run(cut(bytearray(b"{" + b" " * REST_BYTES + b"}")))
    assert refused.value.status_code == 422


def test_an_answer_has_the_long_text_again() -> None:
    content = bytes(random.Random(0).choices(long_text.PLAIN, k=1000))
    text = LongText("stands-for-it")
    text.content = memoryview(content)
    assert json.loads(b"".join(as_json({"input": {"image": text, "question": "é"}}))) == {
        "input": {"image": content.decode(), "question": "é"}
    }
