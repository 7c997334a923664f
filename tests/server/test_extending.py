"""What the extended server does about a Cog that is not the one it extends."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest

from benchmarks.harness import DEADLINE, ROOT, free_port

INSTALLED = Path(str(distribution("cog").locate_file("cog")))


def remove(file: str, line: str, replacement: str) -> Callable[[Path], None]:
    def change(cog: Path) -> None:
        text = (cog / file).read_text()
        assert line in text
        (cog / file).write_text(text.replace(line, replacement))

    return change


def another_release(cog: Path) -> None:
    about = cog.parent / "cog-0.17.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: cog\nVersion: 0.17.0\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_release, "this is cog 0.17.0"),
        (remove("server/http.py", '"/shutdown")', '"/stop")'), "its app has 0 routes /shutdown"),
        (
            remove("server/worker.py", "def _start_prediction(", "def _begin_prediction("),
            "Worker has no _start_prediction",
        ),
        (
            remove("server/worker.py", "class _ChildWorker(", "class _Child("),
            "module 'cog.server.worker' has no attribute '_ChildWorker'",
        ),
        (
            remove("server/webhook.py", "def webhook_caller(", "def hook_caller("),
            "cog.server.webhook has no webhook_caller",
        ),
        (remove("types.py", "def convert(", "def turn("), "URLPath has no convert"),
        (remove("server/connection.py", "async def recv(self)", "async def get(self)"), "AsyncConnection has no recv"),
        (remove("config.py", "def _predictor_code(", "def _code("), "Config has no _predictor_code"),
    ],
    ids=["release", "route", "method", "class", "function", "image", "connection", "loader"],
)
def test_another_cog_does_not_start_and_says_which_part_is_missing(
    tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    shutil.copytree(INSTALLED, tmp_path / "cog", ignore=shutil.ignore_patterns("__pycache__"))
    change(tmp_path / "cog")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "PORT": str(free_port()), "BLIP_WEIGHTS": "demo"}
    ended = subprocess.run(
        [sys.executable, "-m", "cog.server.http"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 1
    line = json.loads(ended.stderr.splitlines()[-1])
    assert line["message"] == f"blip.server extends cog 0.16.12, and {said}; install the lock."
