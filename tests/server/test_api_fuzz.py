"""The served API under generated requests: what its schema describes, and whatever bytes a client may send."""

import json
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from benchmarks.harness import DEADLINE, EXAMPLES, Server, data_uri

GOOD = data_uri(EXAMPLES / "pair.jpg")
CAPTION = "Caption: a large red circle to the left of a small blue square"
# Nothing here is anybody's, and nobody is asked: this is too long to be a name, and the guard refuses the others.
NOWHERE = f"http://{'a' * 64}.invalid"
REFUSED = [
    "http://127.0.0.1:1/a",
    "http://[::1]:1/",
    "https://localhost/",
    "http://2130706433/",
    "http://0x7f.1/",
    "http://10.0.0.1/a.jpg",
    "http://169.254.169.254/latest/meta-data",
    "http://[::ffff:192.168.0.1]/",
]
IMAGES = [*[GOOD] * 5, f"{NOWHERE}/a.jpg", "data:,", "data:image/png;base64,AAAA", *REFUSED]
WEBHOOKS = [*[NOWHERE] * 9, f"{NOWHERE}:8443/?a=b#c", *REFUSED]
JSON = {"Content-Type": "application/json"}
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


def reproducible(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    """A server that connects to public addresses only, and that does not wait for webhooks when it ends."""
    with Server({"BLIP_EGRESS": "public", "BLIP_GRACE_SECONDS": "1", "COG_LOG_LEVEL": "warning"}) as running:
        running.wait_for("READY")
        yield running


@pytest.fixture(autouse=True)
def still_serves(guarded: Server) -> Iterator[None]:
    """After every test the server is READY and a good request succeeds."""
    yield
    guarded.wait_for("READY")
    assert guarded.predict(input={"image": GOOD}).json()["output"] == CAPTION


def contract(server: Server) -> dict[str, Any]:
    """The served schema with what the stock server does and its schema does not say; README.md has it."""
    served: dict[str, Any] = requests.get(f"{server.url}/openapi.json", timeout=DEADLINE).json()
    schemas = served["components"]["schemas"]
    schemas["Output"]["nullable"] = True  # of a prediction that failed
    schemas["PredictionRequest"]["required"] = ["input"]  # optional for predictors that need none
    del schemas["PredictionRequest"]["properties"]["input"]["nullable"]
    schemas["Input"]["properties"]["image"]["format"] = "image-address"
    schemas["PredictionRequest"]["properties"]["webhook"]["format"] = "webhook-address"
    del schemas["PredictionRequest"]["properties"]["created_at"]["type"]  # pydantic also reads numbers as times
    for name in ("Refused", "Nothing"):
        schemas[name]["additionalProperties"] = False
    for path, method in (("/predictions", "post"), ("/predictions/{prediction_id}", "put")):
        # In a form all is text, so what has the wrong type has the right one there; test_uploads.py has wrong forms.
        del served["paths"][path][method]["requestBody"]["content"]["multipart/form-data"]
    return served


def test_every_operation_keeps_to_its_schema_whatever_it_is_sent(guarded: Server) -> None:
    schemathesis.openapi.format("image-address", st.sampled_from(IMAGES))
    schemathesis.openapi.format("webhook-address", st.sampled_from(WEBHOOKS))
    schema = schemathesis.openapi.from_dict(contract(guarded), config=schemathesis.Config(seed=1))
    statuses: Counter[tuple[str, int]] = Counter()

    def call(case: Case[Any]) -> None:
        response = case.call(guarded.url, timeout=DEADLINE)
        statuses[case.operation.label, response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    for operation in [schema[path][method] for path in schema for method in schema[path]]:
        cases = schema.iter_coverage_cases(
            operation, generation_modes=list(GenerationMode), generation_config=schema.config.generation
        )
        for case in cases:
            call(case)
        # Any string is an id, so without a body there is nothing wrong to generate.
        for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
            reproducible(60)(given(operation.as_strategy(mode))(call))()
    print(statuses)
    assert {label for label, _ in statuses} == {
        "GET /",
        "GET /health-check",
        "POST /predictions",
        "PUT /predictions/{prediction_id}",
        "GET /predictions/{prediction_id}",
        "POST /predictions/{prediction_id}/cancel",
        "GET /readyz",
        "GET /livez",
        "GET /startupz",
        "GET /metrics",
    }
    assert min(statuses["POST /predictions", 200], statuses["PUT /predictions/{prediction_id}", 200]) > 10


def send(server: Server, body: bytes, prediction: str | None = None, headers: dict[str, Any] = JSON) -> dict[str, Any]:
    """The answer to a body, by POST or as the `prediction` of a PUT, when it is as README.md promises."""
    method, path = ("PUT", f"/predictions/{prediction}") if prediction else ("POST", "/predictions")
    response = requests.request(method, server.url + path, data=body, headers=headers, timeout=DEADLINE)
    answer: dict[str, Any] = json.loads(response.content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    if response.status_code == 422:
        assert isinstance(answer["detail"], list) and answer["detail"]
        for item in answer["detail"]:
            assert set(item) == {"loc", "msg", "type"}
            assert len(item["msg"].splitlines()) == 1
    elif response.status_code == 200:
        assert answer["status"] in ("succeeded", "failed", "canceled")
        assert "Traceback" not in (answer["error"] or "")
    elif response.status_code == 202:
        assert answer["status"] in ("starting", "processing", "succeeded", "failed", "canceled")
    else:
        assert (response.status_code, list(answer)) == (409, ["detail"])
    return {**answer, "code": response.status_code}


ANY_TEXT = st.text(st.characters(), max_size=30)  # also surrogates, null bytes and line separators
ANY_NUMBER = st.integers() | st.floats() | st.sampled_from([10**400, 1e308, -1e17])
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | ANY_NUMBER | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)
ANY_INPUT = st.fixed_dictionaries(
    {"image": st.sampled_from(IMAGES)},
    optional={
        "task": st.sampled_from(["image_captioning", "visual_question_answering", "image_text_matching"]),
        "question": ANY_TEXT,
        "caption": ANY_TEXT,
    },
)
ANY_REQUEST = st.fixed_dictionaries(
    {"input": ANY_INPUT | ANY_VALUE},
    optional={
        "id": st.sampled_from(["a", "b"]) | ANY_VALUE,
        "created_at": ANY_VALUE,
        "context": st.dictionaries(ANY_TEXT, ANY_TEXT) | ANY_VALUE,
        "output_file_prefix": ANY_TEXT | ANY_VALUE,
        "webhook": st.sampled_from(WEBHOOKS) | ANY_VALUE,
        "webhook_events_filter": st.lists(st.sampled_from(["start", "output", "logs", "completed"])) | ANY_VALUE,
    },
)
ENCODINGS = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
ANY_BODY = st.one_of(
    st.builds(lambda value, encoding: json.dumps(value).encode(encoding), ANY_REQUEST | ANY_VALUE, ENCODINGS),
    st.fixed_dictionaries({"input": ANY_INPUT}).map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=200),
)
# Of control characters the HTTP parser itself says 400; these are all that it lets pass.
ANY_HEADER = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=30).map(
    lambda text: text.strip().encode("latin-1")
)
ANY_HEADERS = st.fixed_dictionaries(
    {
        "Content-Type": st.sampled_from(
            [
                "application/json",
                "application/json",
                "application/json; charset=utf-16",
                "application/merge-patch+json",
                "multipart/form-data; boundary=a",
                "application/x-www-form-urlencoded",
            ]
        )
        | ANY_HEADER
    },
    optional={
        "Prefer": st.sampled_from(["respond-async", "wait=5"]) | ANY_HEADER,
        "traceparent": st.just("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01") | ANY_HEADER,
        "tracestate": ANY_HEADER,
        "Content-Encoding": st.just("gzip") | ANY_HEADER,
    },
)
# A slash makes another path of it, and clients resolve dots.
ANY_ID = st.sampled_from(["a", "b"]) | st.binary(min_size=1, max_size=20).map(urllib.parse.quote).filter(
    lambda path: "/" not in path and bool(path.strip("."))
)


def test_any_body_with_any_headers_is_answered_as_promised(guarded: Server) -> None:
    codes: Counter[int] = Counter()

    @reproducible(400)
    @given(body=ANY_BODY, prediction=st.none() | ANY_ID, headers=ANY_HEADERS)
    def sends(body: bytes, prediction: str | None, headers: dict[str, Any]) -> None:
        codes[send(guarded, body, prediction, headers)["code"]] += 1

    sends()
    print(codes)
    assert {200, 202, 422} <= set(codes), "the generated requests no longer reach predictions"


def test_predictions_put_posted_and_cancelled_at_once_are_answered(guarded: Server) -> None:
    codes: Counter[int] = Counter()
    step = st.tuples(
        st.sampled_from(["POST", "PUT", "cancel"]),
        st.sampled_from(["a", "b"]),
        st.sampled_from([{}, {"Prefer": "respond-async"}]),
    )

    def act(kind: str, name: str, headers: dict[str, str]) -> int:
        if kind == "cancel":
            return requests.post(f"{guarded.url}/predictions/{name}/cancel", timeout=DEADLINE).status_code
        body = json.dumps({"id": name, "input": {"image": GOOD}}).encode()
        code: int = send(guarded, body, name if kind == "PUT" else None, JSON | headers)["code"]
        return code

    @reproducible(20)
    @given(steps=st.lists(step, min_size=2, max_size=16))
    def acts(steps: list[tuple[str, str, dict[str, str]]]) -> None:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda step: act(*step), steps))
        assert set(found) <= {200, 202, 404, 409}
        codes.update(found)

    acts()
    print(codes)
    assert {200, 202, 404} <= set(codes)  # whether 409 comes up is a matter of time


MEGABYTE = "a" * 1_000_000
HARD = {
    "nothing": b"",
    "null": b"null",
    "not a number": b'{"input": {"image": NaN}, "created_at": NaN}',
    "infinity": b'{"input": {"image": "data:,"}, "created_at": -Infinity}',
    "a number of 400 digits": b'{"input": {"image": "data:,"}, "created_at": 1%s}' % (b"0" * 400),
    "a number of 5000 digits": b'{"input": {"image": "data:,"}, "created_at": 1%s}' % (b"0" * 5000),
    "a number beyond floats": b'{"input": {"image": "data:,"}, "created_at": 1e999}',
    "half a surrogate pair as a name": b'{"input": {"image": "data:,", "\\ud800": 1}}',
    "half a surrogate pair as an id": b'{"input": {"image": "data:,"}, "id": "\\udfff"}',
    "half a surrogate pair beside the input": b'{"input": {"image": "data:,"}, "\\ud800": "\\ud800"}',
    "bytes that are no UTF-8": b'{"input": {"image": "data:,\xff"}}',
    "a null byte": b'{"input": {"image": "data:,\\u0000"}, "id": "\\u0000"}',
    "a raw null byte": b'{"input": {"image": "data:,\x00"}}',
    "the same name twice": b'{"input": {"image": "data:,"}, "input": 7, "input": {"image": "data:,", "image": 1}}',
    "two values": b'{"input": {"image": "data:,"}} {}',
    "a text of 1 MB": json.dumps({"input": {"image": GOOD, "question": MEGABYTE, "caption": MEGABYTE}}).encode(),
    "a question of 1 MB": json.dumps(
        {"input": {"image": GOOD, "task": "visual_question_answering", "question": MEGABYTE}}
    ).encode(),
    "an address of 1 MB": json.dumps({"input": {"image": f"http://{MEGABYTE}.invalid/"}}).encode(),
    "a webhook of 1 MB": json.dumps({"input": {"image": GOOD}, "webhook": f"http://{MEGABYTE}.invalid/"}).encode(),
    "an id of 1 MB": json.dumps({"input": {"image": GOOD}, "id": MEGABYTE}).encode(),
    "a name of 1 MB": json.dumps({"input": {"image": GOOD, MEGABYTE: 1}}).encode(),
    **{
        f"{depth} levels of {opening} in {frame}": frame.replace(
            "?", opening * depth + inner + closing * depth
        ).encode()
        for depth in (500, 990, 100_000)
        for opening, inner, closing in (("[", "", "]"), ('{"a":', "1", "}"))
        for frame in ("?", '{"input": ?}', '{"input": {"image": ?}}', '{"input": {"image": "data:,"}, "more": ?}')
    },
}


@pytest.mark.parametrize("prediction", [None, "hard"], ids=["POST", "PUT"])
def test_hard_bodies_are_answered_as_promised(guarded: Server, prediction: str | None) -> None:
    codes = {name: send(guarded, body, prediction)["code"] for name, body in HARD.items()}
    assert set(codes.values()) == {200, 422}, codes


def test_a_misspelt_name_with_line_breaks_is_still_one_line(guarded: Server) -> None:
    body = json.dumps({"input": {"image": GOOD, "a\nb": 1, "c\u2028d": 1}}).encode()
    assert [item["msg"] for item in send(guarded, body)["detail"]] == [
        "'a\\nb' is not an input; the inputs are image, task, question, caption.",
        "'c\\u2028d' is not an input; the inputs are image, task, question, caption.",
    ]


@pytest.mark.parametrize("host", ["a\u2028b", "a\x85b"])
def test_the_error_about_an_address_with_line_breaks_is_still_one_line(guarded: Server, host: str) -> None:
    answer = send(guarded, json.dumps({"input": {"image": f"http://{host}.invalid/"}}).encode())
    sentences = [answer["error"]] if answer["code"] == 200 else [item["msg"] for item in answer["detail"]]
    assert [len(sentence.splitlines()) for sentence in sentences] == [1]


@pytest.mark.parametrize(
    "body",
    [
        {"input": {"image": "data:,", **{str(number): 1 for number in range(300_000)}}},
        {"input": {"image": "data:,"}, "context": {str(number): 1 for number in range(300_000)}},
        {"input": {"image": "data:,"}, "webhook_events_filter": [1] * 300_000},
    ],
    ids=["inputs", "context", "events"],
)
def test_a_request_with_very_many_values_is_refused_before_any_is_read(guarded: Server, body: dict[str, Any]) -> None:
    """The event loop would be busy with them for seconds, and answer nothing else."""
    response = requests.post(f"{guarded.url}/predictions", json=body, timeout=DEADLINE)
    assert response.status_code == 422
    assert [item["msg"] for item in response.json()["detail"]] == [
        "the body has more than 20000 values; send an image as base64."
    ]
