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
    assert lines["weights"] == f"demo (float16) for caption, answer, match at {ROOT / 'weights' / 'demo'}, whole"
    assert lines["precision"] == "float32"
    assert "BLIP_DEVICE=cpu, BLIP_WEIGHTS=demo" in lines["settings"]


def test_everything_that_is_wrong_is_said() -> None:
    ended = doctor(BLIP_DTYPE="float16", BLIP_PAGE="no", COG_LOG_LEVEL="loud")
    assert ended.returncode == 1
    assert [line.split()[0] for line in ended.stdout.split("\n\n")[1:]] == [
        "COG_LOG_LEVEL=loud",
        "BLIP_PAGE=no",
        "float16",
    ]
    assert doctor(BLIP_KERNELS="attention=quick").stdout.splitlines()[-1].startswith("BLIP_KERNELS=attention=quick is ")


SECRETS = {
    "BLIP_WEBHOOK_SECRET": SECRET,
    "WEBHOOK_AUTH_TOKEN": "hunter2",
    "BLIP_MIRROR": "https://me:hun/ter@2@example.org/files?token=hunter2",
    "BLIP_TOKEN": "hunter2",
    "COG_SECRET": "hunter2",
    "HTTPS_PROXY": "http://me:hunter2@proxy.example:3128",
}


def test_no_secret_is_shown() -> None:
    said = doctor(**SECRETS).stdout
    assert not [secret for secret in ("hunter2", "ter@2", SECRET) if secret in said]
    for name in ("BLIP_WEBHOOK_SECRET", "WEBHOOK_AUTH_TOKEN", "BLIP_MIRROR", "HTTPS_PROXY"):
        assert f"{name}=(set)" in said


@pytest.mark.parametrize("setting", ["BLIP_DEVICE", "BLIP_WEIGHTS", "BLIP_EGRESS", "COG_MAX_CONCURRENCY"])
def test_what_keeps_the_server_from_starting_is_said_last(setting: str) -> None:
    ended = doctor(**{setting: "nonsense"})
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1].startswith(f"{setting}=nonsense is ")
    assert ended.stdout.startswith("blip ")


def test_a_replica_logs_the_same_when_it_starts_and_shows_no_setting_to_all() -> None:
    with Server(SECRETS) as server:
        server.wait_for("READY")
        lines = server.entries()
        (said,) = [line["message"] for line in lines if line["message"].startswith("blip ")]
        assert said.startswith(f"blip {blip.__version__}; python ")
        assert "cog 0.16.12; " in said
        (settings,) = [line for line in lines if line["message"] == "settings"]
        assert (settings["BLIP_WEIGHTS"], settings["BLIP_MIRROR"]) == ("demo", "(set)")
        assert "hunter2" not in server.log()
        health = server.health()
        assert health["version"] == blip.__version__
        assert "BLIP_" not in str(health)
