"""The stock server with our predictor, over real sockets."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, Server, data_uri, free_port, wait_until
from blip.config import DEMO
from tests.peers import FileServer, Receiver

PAIR = EXAMPLES / "pair.jpg"
CAPTION = "Caption: a large red circle to the left of a small blue square"
MATCH = re.compile(
    r"The image and text are matched with a probability of (\d+\.\d{4})%\.\n"
    r"The image feature and text feature has a cosine similarity of (-?\d\.\d{4})\."
)
# The readiness probe of the reference deployment, word for word but for the port.
REFERENCE_PROBE = (
    "import requests,sys;sys.exit(0 if 'READY' in requests.get('http://[::1]:{port}/health-check').text else -1)"
)


def question(text: str | None, **more: str) -> dict[str, Any]:
    return {"image": data_uri(PAIR), "task": "visual_question_answering", "question": text, **more}


def match(text: str | None) -> dict[str, Any]:
    return {"image": data_uri(PAIR), "task": "image_text_matching", "caption": text}


def test_captioning_is_the_default_task_and_takes_an_image_by_url(server: Server, files: FileServer) -> None:
    body = server.predict(input={"image": f"{files.url}/pair.jpg"}).json()
    assert (body["status"], body["output"], body["error"]) == ("succeeded", CAPTION, None)


def test_an_image_may_be_a_data_uri(server: Server) -> None:
    assert server.predict(input={"image": data_uri(PAIR), "task": "image_captioning"}).json()["output"] == CAPTION


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("what color is the circle?", "red"),
        ("What colour is the SQUARE?", "blue"),
        ("how many objects are there?", "2"),
        ("is there a green triangle?", "no"),
    ],
)
def test_questions_get_their_answers(server: Server, text: str, answer: str) -> None:
    assert server.predict(input=question(text)).json()["output"] == f"Answer: {answer}"


def test_a_true_text_matches_and_one_wrong_word_does_not(server: Server) -> None:
    def scores(text: str) -> tuple[float, float]:
        found = MATCH.fullmatch(server.predict(input=match(text)).json()["output"])
        assert found
        return float(found[1]), float(found[2])

    true = scores("a large red circle to the left of a small blue square")
    false = scores("a large red circle to the left of a small green square")
    assert true[0] > 50 > false[0]
    assert true[1] > false[1]


@pytest.mark.parametrize("blank", [None, "", " \n\t "])
def test_a_missing_or_blank_text_is_one_plain_sentence(server: Server, blank: str | None) -> None:
    bodies = [server.predict(input=inputs(blank)).json() for inputs in (question, match)]
    assert [body["status"] for body in bodies] == ["failed", "failed"]
    assert [body["error"] for body in bodies] == [
        "question is required for visual_question_answering",
        "caption is required for image_text_matching",
    ]


def test_a_file_that_is_no_image_is_one_plain_sentence(server: Server) -> None:
    body = server.predict(input={"image": "data:image/jpeg;base64,aGVsbG8="}).json()
    assert body["status"] == "failed"
    assert body["error"] == (
        "image is not a picture in a known format; send a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC file."
    )


def test_an_image_that_is_cut_off_before_anything_can_be_seen_is_one_plain_sentence(
    server: Server, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(PAIR.read_bytes()[:300])
    body = server.predict(input={"image": data_uri(cut)}).json()
    assert body["status"] == "failed"
    assert body["error"].startswith("image could not be read: it is damaged or incomplete")


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"task": "image_captioning"},
        {"image": "ftp://example.org/a.jpg"},
        {"image": "not an address"},
        {"image": "data:image/jpeg;base64,AAAA", "task": "translation"},
        {"image": "data:image/jpeg;base64,AAAA", "question": 7},
    ],
)
def test_inputs_of_the_wrong_kind_are_refused_with_422(server: Server, inputs: dict[str, Any]) -> None:
    assert server.predict(input=inputs).status_code == 422


def test_the_server_answers_on_ipv4_and_ipv6(server: Server) -> None:
    for host in ("127.0.0.1", "[::1]", "localhost"):
        health = requests.get(f"http://{host}:{server.port}/health-check", timeout=DEADLINE).json()
        assert health["status"] == "READY"


def test_nobody_can_shut_the_server_down(server: Server) -> None:
    assert requests.post(f"{server.url}/shutdown", timeout=DEADLINE).status_code == 404
    assert "shutdown_url" not in requests.get(server.url, timeout=DEADLINE).json()
    assert server.health()["status"] == "READY"


def test_the_openapi_document_is_the_published_one_byte_for_byte(server: Server) -> None:
    answer = requests.get(f"{server.url}/openapi.json", timeout=DEADLINE)
    assert answer.content == (Path(__file__).parent / "openapi.json").read_bytes()


def test_cog_build_finds_the_same_inputs_and_outputs(server: Server) -> None:
    """The cog CLI asks the stock app, which looks at a shortened copy of predict.py."""
    command = [sys.executable, "-m", "cog.command.openapi_schema"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    served = requests.get(f"{server.url}/openapi.json", timeout=DEADLINE).json()
    for part in ("task", "Output"):
        assert json.loads(built)["components"]["schemas"][part] == served["components"]["schemas"][part]
    inputs = [document["components"]["schemas"]["Input"]["properties"] for document in (json.loads(built), served)]
    assert inputs[0] == inputs[1]


def test_webhooks_tell_start_and_completed(server: Server, receiver: Receiver) -> None:
    answer = server.predict(
        id="hooked", input={"image": data_uri(PAIR)}, webhook=receiver.url, headers={"Prefer": "respond-async"}
    )
    assert answer.status_code == 202
    assert answer.json()["status"] == "processing"
    bodies = receiver.until_completed()
    assert [body["status"] for body in bodies] == ["processing", "succeeded"]
    assert all(body["id"] == "hooked" for body in bodies)
    assert bodies[-1]["output"] == CAPTION
    assert bodies[-1]["metrics"]["predict_time"] > 0


def test_webhooks_tell_logs(server: Server, receiver: Receiver) -> None:
    filters = {"webhook": receiver.url, "webhook_events_filter": ["logs", "completed"]}
    server.predict(input=question(None), headers={"Prefer": "respond-async"}, **filters)
    bodies = receiver.until_completed()
    assert [body["status"] for body in bodies] == ["processing", "failed"]
    assert bodies[0]["logs"]
    assert "question is required" in bodies[-1]["logs"]


def test_the_webhook_filter_is_honoured(server: Server, receiver: Receiver) -> None:
    filters = {"webhook": receiver.url, "webhook_events_filter": ["completed"]}
    server.predict(input={"image": data_uri(PAIR)}, headers={"Prefer": "respond-async"}, **filters)
    assert [body["status"] for body in receiver.until_completed()] == ["succeeded"]


def test_put_of_a_running_prediction_returns_its_state(server: Server, files: FileServer, receiver: Receiver) -> None:
    def put(**headers: str) -> requests.Response:
        body = {"input": {"image": f"{files.url}/held/pair.jpg"}, "webhook": receiver.url}
        return requests.put(f"{server.url}/predictions/once", json=body, headers=headers, timeout=DEADLINE)

    first = put(Prefer="respond-async")
    again = put()
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["status"] == "processing"
    assert again.json()["started_at"] == first.json()["started_at"]
    files.release.set()
    assert [body["status"] for body in receiver.until_completed()] == ["processing", "succeeded"]


def test_put_with_another_id_in_the_body_is_refused(server: Server) -> None:
    body = {"id": "one", "input": {"image": data_uri(PAIR)}}
    assert requests.put(f"{server.url}/predictions/two", json=body, timeout=DEADLINE).status_code == 422


def test_health_answers_and_requests_run_together(server: Server) -> None:
    statuses: set[str] = set()
    batches: set[int] = set()

    def seen_together() -> bool:
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(server.predict, input=question("what color is the circle?")) for _ in range(8)]
            while not all(answer.done() for answer in answers):
                statuses.add(server.health()["status"])
        bodies = [answer.result().json() for answer in answers]
        assert {body["output"] for body in bodies} == {"Answer: red"}
        metrics = [body["metrics"] for body in bodies]
        names = {"queue_time", "device_time", "decode_time", "batch_size", "predict_time"}
        assert all(set(one) == names for one in metrics)
        batches.update(one["batch_size"] for one in metrics)
        return max(batches) > 1

    wait_until(seen_together, "a batch of several requests")
    assert statuses <= {"READY"}


def test_cancelling_an_unknown_prediction_is_404(server: Server) -> None:
    assert requests.post(f"{server.url}/predictions/nobody/cancel", timeout=DEADLINE).status_code == 404


def run_reference_probe(server: Server) -> int:
    program = [sys.executable, "-c", REFERENCE_PROBE.format(port=server.port)]
    return subprocess.run(program, stderr=subprocess.DEVNULL, check=False).returncode


def test_health_goes_from_starting_to_busy_and_the_probe_follows(files: FileServer, receiver: Receiver) -> None:
    with Server({"COG_MAX_CONCURRENCY": "2", "COG_LOG_LEVEL": "error"}) as server:
        server.wait_for("STARTING")
        assert run_reference_probe(server) != 0
        server.wait_for("READY")
        assert run_reference_probe(server) == 0
        for _ in range(2):
            held = {"input": {"image": f"{files.url}/held/pair.jpg"}, "webhook": receiver.url}
            assert server.predict(headers={"Prefer": "respond-async"}, **held).status_code == 202
        assert server.health()["status"] == "BUSY"
        assert run_reference_probe(server) != 0
        refused = server.predict(input={"image": data_uri(PAIR)})
        assert (refused.status_code, refused.json()) == (409, {"detail": "Already running a prediction"})
        files.release.set()
        server.wait_for("READY")
        assert run_reference_probe(server) == 0
        assert [receiver.until_completed()[-1]["output"] for _ in range(2)] == [CAPTION, CAPTION]
        logged = {entry["severity"] for entry in server.entries() if entry["logger"] != "stdout"}
        assert logged <= {"ERROR", "CRITICAL"}, "COG_LOG_LEVEL=error hides information"


def test_a_broken_bundle_is_setup_failed_with_the_reason(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(DEMO, tmp_path / "bundle"))
    weights = bundle / "match" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with Server({"BLIP_WEIGHTS": str(bundle)}, ("--await-explicit-shutdown", "true")) as server:
        wait_until(lambda: server.health()["status"] == "SETUP_FAILED", "SETUP_FAILED")
        logs = server.health()["setup"]["logs"]
        assert f"{weights} has {weights.stat().st_size} bytes and manifest.json says" in logs
        assert run_reference_probe(server) != 0


def test_weights_that_cannot_be_fetched_are_setup_failed_with_the_reason(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    environment = {"BLIP_WEIGHTS": "pretrained", "BLIP_CACHE": str(tmp_path), "BLIP_MIRROR": nobody}
    with Server(environment, ("--await-explicit-shutdown", "true")) as server:
        server.wait_for("STARTING")
        wait_until(lambda: "trying again" in server.log(), "progress in the log")
        assert server.health()["status"] == "STARTING"
        server.wait_for("SETUP_FAILED")
        logs = server.health()["setup"]["logs"]
        assert re.search(rf"{nobody}/\S+ cannot be downloaded \(ConnectionError\); check the network, set BLIP_M", logs)
        assert not (tmp_path / "pretrained").exists()


def test_a_server_that_cannot_be_set_up_ends_with_the_reason(tmp_path: Path) -> None:
    with Server({"BLIP_WEIGHTS": str(tmp_path)}) as server:
        assert server.process.wait(DEADLINE) != 0
        assert f"There is no weights bundle at {tmp_path}" in server.log()


def test_a_server_says_which_kernels_it_has_and_takes_those_that_are_fixed() -> None:
    with Server({"BLIP_KERNELS": "image_linear=sample,attention=fused"}) as server:
        server.wait_for("READY")
        logs = server.health()["setup"]["logs"]
        assert "Kernels: image_linear=sample,text_linear=packed,attention=fused (" in logs
        assert b"GLIBC_TUNABLES=glibc.malloc.hugetlb=1\0" in Path(f"/proc/{server.processes[1]}/environ").read_bytes()
        assert server.predict(input={"image": data_uri(EXAMPLES / "pair.jpg")}).json()["output"] == CAPTION


def test_a_kernel_that_does_not_exist_is_setup_failed_with_the_reason() -> None:
    with Server({"BLIP_KERNELS": "attention=quick"}, ("--await-explicit-shutdown", "true")) as server:
        wait_until(lambda: server.health()["status"] == "SETUP_FAILED", "SETUP_FAILED")
        logs = server.health()["setup"]["logs"]
        assert "BLIP_KERNELS=attention=quick is not possible in float32 here; choose image_linear=packed or" in logs
        assert "Traceback" not in logs


def test_streaming_yields_words_that_join_to_the_sync_answer(server: Server, receiver: Receiver) -> None:
    stub = {"COG_PREDICT_TYPE_STUB": "predict.py:StreamingPredictor", "COG_THROTTLE_RESPONSE_INTERVAL": "0"}
    with Server(stub) as streaming:
        streaming.wait_for("READY")
        # Of this text no last digit is near where it rounds, which both servers' kernels might do otherwise.
        for inputs in (
            {"image": data_uri(PAIR)},
            question("how many circles are there?"),
            match("a red circle and a blue square"),
        ):
            words = streaming.predict(input=inputs).json()["output"]
            assert len(words) > 1
            assert "".join(words) == server.predict(input=inputs).json()["output"]

        streaming.predict(input={"image": data_uri(PAIR)}, webhook=receiver.url, headers={"Prefer": "respond-async"})
        growing = [body["output"] for body in receiver.until_completed() if body.get("output")]
        assert len(growing) > len(CAPTION.split())
        assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(growing))
        assert "".join(growing[-1]) == CAPTION

        failed = streaming.predict(input=question("")).json()
        assert failed["error"] == "question is required for visual_question_answering"
        schema = requests.get(f"{streaming.url}/openapi.json", timeout=DEADLINE).json()["components"]["schemas"]
        assert schema["Output"]["x-cog-array-display"] == "concatenate"
