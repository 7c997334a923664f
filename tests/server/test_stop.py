"""How a server ends: told to by an orchestrator, and when its worker, its batching thread or its device is lost."""

import contextlib
import ctypes
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.harness import DEADLINE, EXAMPLES, Server, data_uri, wait_until
from tests.peers import FileServer, Receiver

#: Stock answers 500 to what is in flight five seconds after SIGTERM.
STOCK_SECONDS = 6.0
STUB = {"COG_PREDICT_TYPE_STUB": "tests/server/dying_predict.py:Predictor"}


def refuses(server: Server) -> bool:
    return bool(server.health()["status"] == "no answer")


def question(text: str) -> dict[str, dict[str, str]]:
    return {
        "input": {
            "image": data_uri(EXAMPLES / "pair.jpg"),
            "task": "visual_question_answering",
            "question": text,
        }
    }


def is_gone(server: Server) -> bool:
    """Whether the server and all that it started have ended."""
    try:
        os.killpg(server.process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_signal_to_the_whole_group_lets_work_in_flight_finish(receiver: Receiver, tmp_path: Path) -> None:
    """systemd, GNU timeout and `tini -g` signal the worker's process too; new connections are refused meanwhile."""
    thinking = tmp_path / "thinking"
    with Server({**STUB, "BLIP_TEST_THINKING": str(thinking)}) as server:
        server.wait_for("READY")
        expected = server.predict(**question("what color is the circle?")).json()["output"]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.predict, **question("think"))
            wait_until(thinking.exists, "its start")
            later = server.predict(
                headers={"Prefer": "respond-async"}, webhook=receiver.url, **question("what color is the circle?")
            )
            assert later.status_code == 202
            with contextlib.closing(Receiver()) as cancelled:
                waiting = question("what color is the circle?")
                server.predict(id="waiting", headers={"Prefer": "respond-async"}, webhook=cancelled.url, **waiting)
                requests.post(f"{server.url}/predictions/waiting/cancel", timeout=DEADLINE)
                assert cancelled.until_completed()[-1]["status"] == "canceled"
            os.killpg(server.process.pid, signal.SIGTERM)
            wait_until(lambda: refuses(server), "new connections to be refused")
            time.sleep(STOCK_SECONDS)
            assert not answer.done()
            thinking.unlink()
            assert answer.result().json()["status"] == "succeeded"
        assert receiver.until_completed()[-1]["output"] == expected
        assert server.process.wait(DEADLINE) == 0


def test_a_signal_to_another_thread_is_noticed_and_the_log_is_clean() -> None:
    """Python handles signals in the main thread, which sleeps; the kernel may give them to another one."""
    with Server() as server:
        server.wait_for("READY")
        others = {int(thread.name) for thread in Path(f"/proc/{server.process.pid}/task").iterdir()}
        ctypes.CDLL(None).tgkill(server.process.pid, min(others - {server.process.pid}), signal.SIGTERM)
        assert server.process.wait(DEADLINE) == 0
        wait_until(lambda: is_gone(server), "its other processes")
        said = [line for line in ("fast loader", "coglet", "leaked", "Traceback") if line in server.log()]
        assert said == []


def test_after_the_grace_period_the_server_ends_whatever_still_runs(files: FileServer) -> None:
    with Server({"BLIP_GRACE_SECONDS": "1"}) as server, contextlib.closing(Receiver(held=True)) as receiver:
        server.wait_for("READY")
        server.predict(**question("what color is the circle?"), webhook=receiver.url)
        with ThreadPoolExecutor(1) as pool:
            dripping = {"input": {"image": f"{files.url}/drip"}}
            answer = pool.submit(server.predict, **dripping)
            wait_until(lambda: files.requests > 0, "the download")
            server.process.send_signal(signal.SIGTERM)
            assert answer.result().json()["error"] == (
                "the server was stopped, and it took longer than 1 s; send it again."
            )
        assert server.process.wait(DEADLINE) == 1


def test_a_prediction_that_is_cut_off_ends_with_a_final_event(
    files: FileServer, receiver: Receiver, tmp_path: Path
) -> None:
    """Also one that began after the signal, and in whatever state; the status is 1 and no file is left."""
    with Server({**STUB, "BLIP_GRACE_SECONDS": "2", "BLIP_TEST_THINKING": str(tmp_path / "thinking")}) as server:
        server.wait_for("READY")
        for name, inputs in (("fetched", {"input": {"image": f"{files.url}/drip"}}), ("run", question("think"))):
            hook: dict[str, Any] = {"webhook": receiver.url, "webhook_events_filter": ["completed"]}
            assert server.predict(id=name, headers={"Prefer": "respond-async"}, **hook, **inputs).status_code == 202
        wait_until((tmp_path / "thinking").exists, "its start")
        server.process.send_signal(signal.SIGTERM)
        ended = {event["id"]: event for event in (receiver.until_completed()[-1] for _ in range(2))}
        assert {event["status"] for event in ended.values()} == {"failed"}
        sentence = "the server was stopped, and it took longer than 2 s; send it again."
        assert [ended[name]["error"] for name in ("fetched", "run")] == [sentence] * 2
        assert server.process.wait(DEADLINE) == 1


def test_a_final_event_that_nobody_takes_until_the_end_is_in_the_log() -> None:
    with Server({"BLIP_GRACE_SECONDS": "1"}) as server, contextlib.closing(Receiver(*[503] * 100)) as refusing:
        server.wait_for("READY")
        hook: dict[str, Any] = {"webhook": refusing.url.replace("//", "//name:secret@") + "?key=secret"}
        server.predict(id="pending", **hook, **question("what color is the circle?"))
        refusing.until_completed()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE) == 1
        assert f"the server has ended; lost the final event of prediction pending for {refusing.url}" in server.log()
        assert "secret" not in server.log()


def test_a_final_event_waits_no_longer_when_the_server_ends() -> None:
    """The receiver asks for an hour; it gets a last attempt, takes it, and nothing is lost."""
    with (
        Server({"BLIP_GRACE_SECONDS": "1"}) as server,
        contextlib.closing(Receiver(503, Retry_After="3600")) as receiver,
    ):
        server.wait_for("READY")
        hook: dict[str, Any] = {"webhook": receiver.url, "webhook_events_filter": ["completed"]}
        server.predict(**hook, **question("what color is the circle?"))
        receiver.until_completed()
        server.process.send_signal(signal.SIGTERM)
        receiver.until_completed()
        assert server.process.wait(DEADLINE) == 0


def test_the_files_of_a_server_that_was_killed_are_removed_at_the_next_start(files: FileServer, tmp_path: Path) -> None:
    with Server({"TMPDIR": str(tmp_path)}) as living, Server({"TMPDIR": str(tmp_path)}) as killed:
        living.wait_for("READY")
        killed.wait_for("READY")
        killed.predict(headers={"Prefer": "respond-async"}, input={"image": f"{files.url}/drip"})
        wait_until(lambda: any(path.is_file() for path in tmp_path.rglob("*")), "the download")
        os.killpg(killed.process.pid, signal.SIGKILL)
        killed.process.wait()
        with Server({"TMPDIR": str(tmp_path)}) as another:
            another.wait_for("READY")
            assert not any(path.is_file() for path in tmp_path.rglob("*"))
            assert len(list(tmp_path.iterdir())) == 2
            asked = question("what color is the circle?")
            assert living.predict(**asked).json()["status"] == "succeeded", "it has its directory"
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_starting_can_be_stopped() -> None:
    with Server() as server:
        server.wait_for("STARTING")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE) == 0


@pytest.mark.parametrize("grace", ["soon", "1 min"])
def test_a_grace_period_that_is_no_number_is_found_at_the_start(grace: str) -> None:
    with Server({"BLIP_GRACE_SECONDS": grace}) as server:
        assert server.process.wait(DEADLINE) != 0
        (line,) = server.entries()
        assert (line["severity"], line["message"]) == (
            "ERROR",
            f"BLIP_GRACE_SECONDS={grace} is not a number of seconds; set it to a number from 1 to 86400.",
        )


def test_an_interval_that_cog_reads_before_all_else_is_one_sentence_too() -> None:
    with Server({"COG_THROTTLE_RESPONSE_INTERVAL": "fast"}) as server:
        assert server.process.wait(DEADLINE) == 1
        sentence = "COG_THROTTLE_RESPONSE_INTERVAL=fast is not a number of seconds; set it to a number from 0 to 86400."
        assert [line["message"] for line in server.entries()] == [sentence]


def wait_for_the_end(server: Server) -> None:
    wait_until(lambda: server.health()["status"] in ("UNHEALTHY", "DEFUNCT", "no answer"), "the loss to show")
    assert server.process.wait(DEADLINE) == 1


def test_a_worker_that_hangs_shows_in_the_health_and_one_that_goes_on_too() -> None:
    with Server() as server:
        server.wait_for("READY")
        _, worker = server.processes
        os.kill(worker, signal.SIGSTOP)
        try:
            wait_until(lambda: server.health()["status"] == "UNHEALTHY", "the worker's silence to show")
        finally:
            os.kill(worker, signal.SIGCONT)
        wait_until(lambda: server.health()["status"] == "READY", "the worker's answer")


def test_when_the_worker_is_killed_clients_get_an_error(files: FileServer, receiver: Receiver) -> None:
    held = {"input": {"image": f"{files.url}/held/pair.jpg"}}
    with Server() as server:
        server.wait_for("READY")
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(server.predict, **held) for _ in range(2)]
            server.predict(headers={"Prefer": "respond-async"}, webhook=receiver.url, **held)
            wait_until(lambda: files.requests == 3, "the downloads")
            os.kill(server.processes[1], signal.SIGKILL)
            assert [answer.result().status_code for answer in answers] == [500, 500]
        completed = receiver.until_completed()[-1]
        assert (completed["status"], completed["error"]) == (
            "failed",
            "Prediction failed for an unknown reason. It might have run out of memory? (exitcode -9)",
        )
        wait_for_the_end(server)


def test_a_worker_that_is_killed_while_idle_ends_the_server_too() -> None:
    with Server() as server:
        server.wait_for("READY")
        os.kill(server.processes[1], signal.SIGKILL)
        assert server.process.wait(DEADLINE) == 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("die", "the batching thread has died: injected"),
        ("break", "the batching thread has died: CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_lost_thread_or_device_leaves_nobody_waiting(fault: str, error: str) -> None:
    with Server(STUB) as server:
        server.wait_for("READY")
        image = data_uri(EXAMPLES / "pair.jpg")
        with ThreadPoolExecutor(4) as pool:
            answers = [
                pool.submit(
                    server.predict, input={"image": image, "task": "visual_question_answering", "question": text}
                )
                for text in ("a", "b", fault, "c")
            ]
        found = [answer.result() for answer in answers]
        # A prediction that was not yet with the thread may get another error, or be refused, as the process has ended.
        errors = [one.json()["error"] for one in found if one.status_code == 200]
        assert error in errors
        assert set(errors) <= {error, None}
        assert {one.status_code for one in found} <= {200, 500, 503}
        wait_for_the_end(server)
        (told,) = [entry for entry in server.entries() if entry["severity"] == "CRITICAL"]
        assert told["exception"].startswith("Traceback")
        assert not [entry for entry in server.entries() if "Traceback" in entry["message"]]
