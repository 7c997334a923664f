"""Temporary files when the disk is full, or the directory is not to be used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import ROOT
from blip.errors import ConfigError, FetchError
from blip.server.files import Files, Writer


def test_a_server_whose_disk_is_full_says_so_and_goes_on(tmp_path: Path) -> None:
    """Runs full_disk.py where it may mount a file system."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    unshare = shutil.which("unshare")
    assert unshare, "util-linux is missing"
    inner = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/inner"]
    ended = subprocess.run(
        [*sudo, unshare, "--mount", *inner, str(ROOT / "tests" / "server" / "full_disk.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout


def test_no_place_for_files_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"^TMPDIR has no room for a directory \(No such file or directory\); "):
        Files()


def test_a_file_that_cannot_be_made_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = Files()
    path = files.new()
    files.close()
    with pytest.raises(FetchError, match=r"^image could not be stored by the server \(No such file or directory\); "):
        Writer(path)


def test_only_directories_of_servers_that_do_not_live_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    living = Files()
    (tmp_path / "blip-server-dead").mkdir()
    (tmp_path / "blip-server-dead" / "file").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "blip-server-link").symlink_to(tmp_path / "elsewhere")
    other = Files()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {living.new().parent.name, other.new().parent.name, "elsewhere", "blip-server-link"}
    living.close()
    other.close()
