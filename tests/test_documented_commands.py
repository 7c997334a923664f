"""Every command of the documents that can run offline works, in a copy of this repository, with a large picture too."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, free_port, wait_until
from tests.documents import DOCUMENTS, Block, blocks
from tests.peers import FileServer

ARGUMENT = 128 * 1024  # bytes that Linux lets one argument of a program have
#: Blocks that do not run here, by how they begin, and why.
ELSEWHERE = {
    r"scripts/serve$": "the fixture runs it",
    r"scripts/serve --weights pretrained|scripts/download_models": "fetches 6 GB",
    r"scripts/bundle make": "fetches 2 GB; tests/weights/test_make.py makes the same of small models",
    r"scripts/test$": "runs this test",
    r"docker |BLIP_IMAGE=blip docker ": "needs Docker; scripts/test_container does the same with podman",
    r"cog ": "needs the cog CLI and Docker; scripts/test_container repeats its steps with podman",
    r"kubectl ": "needs a cluster; tests/deploy checks the files against Kubernetes's schemas",
    r"export SALAD_API_KEY|curl .*//api\.salad\.com": "asks SaladCloud; tests/deploy asks a stand-in for it",
    r"scripts/probe ready\|live\|started": "is a pattern; tests/deploy/test_probe.py runs it",
    r"scripts/test_container": "are long tests of their own",
    r"python3.11 -m venv": "fetches 4 GB; tests/test_lock.py and tests/test_library.py have its parts",
    r"from standardwebhooks": "is a part of a receiver; tests/server/test_webhooks.py is a whole one",
}
PROGRAMS = {"sh": ("bash", "-euo", "pipefail"), "python": (sys.executable,), "mjs": ("node",)}
CODE = [block for path in DOCUMENTS for block in blocks(path) if block.language in PROGRAMS]
HERE = [block for block in CODE if not any(re.match(start, block.code) for start in ELSEWHERE)]
CASES = [(block, "small") for block in HERE] + [(block, "large") for block in HERE if "examples/pair.jpg" in block.code]


@dataclass
class Served:
    """What `scripts/serve` serves.

    Attributes:
        folders: two copies of this repository, by the size of their examples/pair.jpg.
        port: where it listens.
        files: stands for https://example.org.
        printed: what scripts/serve said.
    """

    folders: dict[str, Path]
    port: int
    files: FileServer
    printed: str

    def run(self, block: Block, size: str) -> str:
        """Run a block as a stranger would, but with this port and this peer; what it prints."""
        code = block.code.replace("127.0.0.1:5000", f"127.0.0.1:{self.port}")
        code = code.replace("https://example.org/photo.jpg", f"{self.files.url}/pair.jpg")
        code = code.replace("https://YOUR-GROUP.salad.cloud", f"http://127.0.0.1:{self.port}")  # without its gateway
        code = code.replace("$SALAD_API_KEY", "key")
        code = re.sub(r"(scripts/client .*)", rf"\1 --url http://127.0.0.1:{self.port}", code)
        code = re.sub(r"\bfirst\b", size, code)  # the id of a prediction
        script = self.folders[size] / f"block.{block.language}"
        script.write_text(code)
        ended = subprocess.run(
            [*PROGRAMS[block.language], script.name],
            cwd=script.parent,
            env={**os.environ, "BLIP_DEVICE": "cpu"},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folders = {}
    for size in ("small", "large"):
        folders[size] = tmp_path_factory.mktemp(size) / "blip"
        shutil.copytree(
            ROOT,
            folders[size],
            ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", ".hypothesis"),
        )
        (folders[size] / ".venv").symlink_to(sys.prefix)
    pair = np.array(Image.open(EXAMPLES / "pair.jpg").resize((1600, 1200)), np.int16)
    noise = np.random.default_rng(0).integers(-20, 20, pair.shape)
    large = folders["large"] / "examples" / "pair.jpg"
    Image.fromarray(np.clip(pair + noise, 0, 255).astype(np.uint8)).save(large, quality=95)
    assert large.stat().st_size > 2 * ARGUMENT

    port, files = free_port(), FileServer()
    log = tmp_path_factory.mktemp("log") / "serve.log"
    environment = {**os.environ, "PORT": str(port), "BLIP_DEVICE": "cpu"}
    with log.open("w") as out:
        serving = subprocess.Popen(
            ["scripts/serve"],
            cwd=folders["small"],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: serving.poll() is not None or "Stop it with Ctrl-C." in log.read_text(), "scripts/serve")
        assert serving.poll() is None, log.read_text()
        yield Served(folders, port, files, log.read_text())
        os.killpg(serving.pid, signal.SIGINT)  # as Ctrl-C does
        assert serving.wait(DEADLINE) == 0
    finally:
        if serving.poll() is None:
            os.killpg(serving.pid, signal.SIGKILL)
            serving.wait()
        files.close()


def documents_of(printed: str) -> list[dict[str, object]]:
    """The JSON objects that were printed one after another; none where something else was."""
    found, decoder = [], json.JSONDecoder()
    while printed := printed.strip():
        try:
            document, end = decoder.raw_decode(printed)
        except ValueError:
            return []
        if not isinstance(document, dict):
            return []
        found.append(document)
        printed = printed[end:]
    return found


@pytest.mark.parametrize(("block", "size"), CASES, ids=lambda part: getattr(part, "place", part))
def test_a_documented_command_works(served: Served, block: Block, size: str) -> None:
    if block.language == "mjs" and not shutil.which("node"):
        pytest.skip("needs node; scripts/need nodejs installs it")
    printed = served.run(block, size)
    answers = documents_of(printed)
    for answer in answers:
        assert answer.get("status") in ("starting", "processing", "succeeded"), answer
    if size == "small" and block.shown:
        outputs = "\n".join(str(answer["output"]) for answer in answers) or printed
        shown = re.findall(r'"output": "(.*?)"', block.shown) or block.shown.splitlines()
        assert [line for line in map(roughly, shown) if line not in map(roughly, outputs.splitlines())] == []


def roughly(line: str) -> str:
    """The line with numbers as other processors have them too: to three places."""
    return re.sub(r"(\d\.\d{3})\d+", r"\1", line)


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_commands_that_serve_prints_work(served: Served, size: str) -> None:
    commands = re.findall(r"^  (curl (?:.*\\\n)*.*)$", served.printed, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        (answer,) = documents_of(served.run(Block("scripts/serve", "sh", command, ""), size))
        assert answer["status"] == "succeeded"


def test_each_block_that_does_not_run_here_is_there() -> None:
    for start in ELSEWHERE:
        assert any(re.match(start, block.code) for block in CODE), start


def test_all_code_is_in_fenced_blocks_that_name_their_language() -> None:
    for path in DOCUMENTS:
        assert {block.language for block in blocks(path)} <= {*PROGRAMS, "json", "text", "mermaid", "dockerfile"}
        outside = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert "\n\n    " not in outside, path
