"""The log of a server: from its first line to its last each is a JSON object, and each request has one."""

import functools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, Server, data_uri, wait_until
from blip.config import DEMO
from blip.server.logs import as_entry, shown

PAIR = data_uri(EXAMPLES / "pair.jpg")
STUB = {"COG_PREDICT_TYPE_STUB": "tests/server/dying_predict.py:Predictor"}
MISSING = {"image": PAIR, "task": "visual_question_answering"}


def messages(server: Server) -> list[str]:
    return [entry["message"] for entry in server.entries()]


def lines_of(server: Server, name: str) -> list[dict[str, Any]]:
    """The lines about the prediction of this id."""
    return [entry for entry in server.entries() if name in (entry.get("id"), entry.get("prediction_id"))]


def is_told(server: Server, name: str) -> bool:
    return bool(lines_of(server, name))


def test_every_line_is_json_from_the_start_to_the_end() -> None:
    with Server() as server:
        server.wait_for("READY")
        assert server.predict(id="good", input={"image": PAIR}).json()["status"] == "succeeded"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE) == 0
        assert server.log().endswith("}\n")
        said = messages(server)
        assert any(message.startswith("Weights: demo") for message in said), "the worker prints it"
        assert f"running on http://0.0.0.0:{server.port} and http://[::]:{server.port}" in said
        assert "Application startup complete." in said, "uvicorn says it"
        assert "waiting for work in flight" in said
        assert len(lines_of(server, "good")) == 1
        assert {"logger", "message", "severity", "timestamp"} <= set.intersection(*map(set, server.entries()))


def test_each_request_has_one_line_with_what_became_of_it(server: Server) -> None:
    body = server.predict(id="told", input={"image": PAIR}).json()
    wait_until(lambda: is_told(server, "told"), "the line")
    (line,) = lines_of(server, "told")
    assert line["message"] == "prediction succeeded"
    assert (line["task"], line["status"], line["http_status"]) == ("image_captioning", "succeeded", 200)
    assert (line["client"], line["batch_size"]) == ("127.0.0.1", body["metrics"]["batch_size"])
    assert line["bytes_in"] > len(PAIR)
    assert line["bytes_out"] > len(PAIR)
    for name in ("queue", "device", "decode"):
        assert line[f"{name}_seconds"] == round(body["metrics"][f"{name}_time"], 4)
    assert line["seconds"] >= line["device_seconds"]


def test_a_refused_request_has_one_line_with_the_reason(server: Server) -> None:
    before = len(server.entries())
    assert server.predict(input={"image": "ftp://example.org/a.jpg"}).status_code == 422

    def refused() -> list[dict[str, Any]]:
        return [entry for entry in server.entries()[before:] if entry["message"] == "request refused"]

    wait_until(lambda: bool(refused()), "the line")
    (line,) = refused()
    assert (line["http_status"], line["reason"], line["severity"]) == (422, "invalid", "INFO")


def test_what_a_user_did_leaves_no_traceback(server: Server) -> None:
    before = len(server.entries())
    body = server.predict(id="mistaken", input=MISSING).json()
    assert body["logs"] == "question is required for visual_question_answering\n"
    wait_until(lambda: is_told(server, "mistaken"), "the line")
    assert all("exception" not in entry for entry in server.entries()[before:])
    assert lines_of(server, "mistaken")[0]["error"] == "question is required for visual_question_answering"


def test_any_other_error_is_one_line_with_its_traceback() -> None:
    with Server(STUB) as server:
        server.wait_for("READY")
        body = server.predict(input={**MISSING, "question": "break"}).json()
        assert "Traceback" in body["logs"]
        wait_until(lambda: server.process.poll() is not None, "its end")
        found = [entry for entry in server.entries() if entry["logger"] == "blip.predictor"]
        assert [entry["severity"] for entry in found] == ["ERROR"]
        assert "illegal memory access" in found[0]["message"]
        assert found[0]["exception"].startswith("Traceback")


def test_a_mistake_of_who_started_it_leaves_no_traceback(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(DEMO, tmp_path / "bundle"))
    (bundle / "manifest.json").write_text("{}")
    for environment in ({"BLIP_WEIGHTS": str(bundle)}, {"BLIP_DEVICE": "tpu"}):
        with Server(environment) as server:
            assert server.process.wait(DEADLINE) != 0
            assert "Traceback" not in server.log()
            (failed,) = [entry for entry in server.entries() if entry["message"] == "the setup failed"]
            assert (str(bundle) if "BLIP_WEIGHTS" in environment else "BLIP_DEVICE=tpu is not known") in failed["error"]


def test_debug_has_what_cog_says_and_ids_are_cut_in_either_case(server: Server) -> None:
    long = "long" * 200
    with Server({"COG_LOG_LEVEL": "debug", "BLIP_LOG_CLIENTS": "off"}) as verbose:
        verbose.wait_for("READY")
        for one in (server, verbose):
            requests.put(f"{one.url}/predictions/{long}", json={"input": {"image": PAIR}}, timeout=DEADLINE)
            wait_until(functools.partial(is_told, one, str(shown(long))), "the line")
            assert long not in one.log()
        assert "starting prediction" in messages(verbose)
        assert "starting prediction" not in messages(server)
        assert not any("client" in entry for entry in verbose.entries())


def test_lines_for_people_are_as_they_were() -> None:
    with Server({"LOG_FORMAT": "development"}) as server:
        server.wait_for("READY")
        assert "\nWeights: demo" in server.log()


@pytest.mark.parametrize("line", [b"text", b"{broken}", b"\xff", b'["list"]', b"7"])
def test_what_is_no_json_object_becomes_one(line: bytes) -> None:
    entry = json.loads(as_entry(line, "stderr", "WARNING"))
    assert (entry["message"], entry["severity"]) == (line.decode(errors="replace"), "WARNING")
    assert as_entry(json.dumps(entry).encode(), "stderr", "WARNING") == json.dumps(entry).encode()
