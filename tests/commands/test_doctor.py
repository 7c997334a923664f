"""What a report of a fault says, and what the log of a start does."""

import os
import subprocess
import sys

import pytest

import blip
from benchmarks.harness import DEADLINE, ROOT, Server

SECRET = "whsec_" + "c2VjcmV0" * 6


def doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "blip", "doctor"],
        cwd=ROOT,
        env={**os.environ, "BLIP_WEIGHTS": "demo", "BLIP_DEVICE": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def test_the_doctor_says_what_runs_and_where() -> None:
    ended = doctor()
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines())
    assert (lines["blip"], lines["cog"], lines["torch"].partition("+")[0]) == (blip.__version__, "0.16.12", "2.8.0")
    assert lines["device"] == "cpu"
    assert lines["precisions"].startswith("float32")
    assert lines["weights"] == f"demo (float16) at {ROOT / 'weights' / 'demo'}, whole"
    assert lines["settings"].startswith("BLIP_DEVICE=cpu, BLIP_WEIGHTS=demo")


def test_no_secret_is_shown() -> None:
    mirror = "https://me:hunter2@example.org/files"
    said = doctor(BLIP_WEBHOOK_SECRET=SECRET, WEBHOOK_AUTH_TOKEN="hunter2", BLIP_MIRROR=mirror).stdout
    assert "hunter2" not in said
    assert SECRET not in said
    assert "BLIP_MIRROR=https://(hidden)@example.org/files" in said
    assert "BLIP_WEBHOOK_SECRET=(set)" in said
    assert "WEBHOOK_AUTH_TOKEN=(set)" in said


@pytest.mark.parametrize("setting", ["BLIP_DEVICE", "BLIP_WEIGHTS", "BLIP_EGRESS", "COG_MAX_CONCURRENCY"])
def test_what_keeps_the_server_from_starting_is_said_last(setting: str) -> None:
    ended = doctor(**{setting: "nonsense"})
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1].startswith(f"{setting}=nonsense is ")
    assert ended.stdout.startswith("blip ")


def test_a_replica_logs_the_same_when_it_starts() -> None:
    with Server({"WEBHOOK_AUTH_TOKEN": "hunter2"}) as server:
        server.wait_for("READY")
        (said,) = [line["message"] for line in server.entries() if line["message"].startswith("blip ")]
        assert said.startswith(f"blip {blip.__version__}; python ")
        assert "cog 0.16.12; " in said
        assert "hunter2" not in server.log()
        assert server.health()["version"] == blip.__version__
