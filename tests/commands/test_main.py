"""The command line, python -m blip, and the scripts that stand for its commands."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import DEADLINE, EXAMPLES, ROOT, Server
from blip.__main__ import COMMANDS
from tests.deploy.refusing import refusing_port


def run(*command: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=DEADLINE, check=False)


def blip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "blip", *arguments)


def script(name: str, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return run(str(ROOT / "scripts" / name), *arguments, directory=directory)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_commands_are_listed(arguments: tuple[str, ...]) -> None:
    ended = blip(*arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    listed = [line.split()[0] for line in ended.stdout.splitlines() if line.startswith("  ")]
    assert listed == ["client", "caption", "watch", "download", "bundle", "doctor", "verify"]


def test_an_unknown_command_is_one_sentence() -> None:
    ended = blip("paint")
    commands = "client, caption, watch, download, bundle, doctor, verify"
    sentence = f"python -m blip: there is no command paint; choose one of {commands}.\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", sentence)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_own_help(command: str) -> None:
    ended = blip(command, "--help")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("usage: ")


@pytest.mark.parametrize("command", ["client", "watch"])
def test_client_and_watch_need_no_package(command: str) -> None:
    without_packages = (sys.executable, "-S", "-m", "blip", command, "--help")
    assert run(*without_packages).returncode == 0


CAPTION = "a large red circle to the left of a small blue square"


def test_the_client_prints_only_the_caption_of_a_relative_path(server: Server, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "pair.jpg", tmp_path / 'my "pair" für.jpg')
    (tmp_path / "blip.py").write_text("raise SystemExit('a module of the directory that the caller is in')\n")
    ended = script("client", 'my "pair" für.jpg', "--url", server.url, directory=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{CAPTION}\n", "")


def test_the_client_asks_about_several_pictures_and_goes_on_after_a_bad_one(server: Server, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "pair.jpg", tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    images = ("bad.png", "none.png", "pair.jpg")
    ended = script("client", *images, "--url", server.url, directory=tmp_path)
    assert (ended.returncode, ended.stdout) == (1, f"pair.jpg: {CAPTION}\n")
    assert [line.split(": ")[1] for line in ended.stderr.splitlines()] == ["bad.png", "none.png"]
    assert ended.stderr.splitlines()[1] == "scripts/client: none.png: No such file or directory"


def test_the_client_answers_and_matches_and_prints_json(server: Server) -> None:
    picture = str(EXAMPLES / "pair.jpg")
    asked = ("--question", "how many objects are there?", "--match", "a red circle", "--url", server.url)
    ended = blip("client", picture, *asked)
    assert ended.stdout.startswith("2; 99.")
    found = json.loads(blip("client", picture, "--json", "--header", "X-Key: secret", *asked).stdout)
    assert (found["image"], found["answer"], "caption" in found) == (picture, "2", False)
    assert 0.99 < found["match"]["probability"] < 1
    assert -1 < found["match"]["similarity"] < 1
    assert json.loads(blip("client", "none.jpg", "--json").stdout) == {
        "image": "none.jpg",
        "error": "No such file or directory",
    }


def test_the_client_says_in_one_sentence_what_failed(server: Server, tmp_path: Path) -> None:
    picture = str(EXAMPLES / "pair.jpg")
    with refusing_port() as port:
        ended = script("client", picture, "--url", f"http://127.0.0.1:{port}", directory=tmp_path)
    assert (ended.returncode, ended.stderr) == (1, f"scripts/client: {picture}: Connection refused\n")
    ended = script("client", picture, "--question", " ", "--url", server.url, directory=tmp_path)
    assert ended.stderr == f"scripts/client: {picture}: question is required for visual_question_answering\n"
    assert blip("client", picture, "--header", "nothing").returncode == 2


def test_the_watch_ends_when_the_server_is_ready(server: Server, tmp_path: Path) -> None:
    ended = script("watch_health", "--until-ready", str(server.process.pid), server.url, directory=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.endswith(" s  READY\n")


def test_the_watch_ends_when_the_process_has_ended(tmp_path: Path) -> None:
    nobody = int(Path("/proc/sys/kernel/pid_max").read_text())  # the numbers of processes are below it
    with refusing_port() as port:
        url = f"http://127.0.0.1:{port}"
        ended = script("watch_health", "--until-ready", str(nobody), url, directory=tmp_path)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.endswith(" s  no answer\n")
