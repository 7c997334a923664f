"""Temporary files when the disk is full, or the directory is not to be used."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from blip.errors import ConfigError, FetchError
from blip.server.files import Files, Writer
from tests.namespaces import assert_passes


def test_a_server_whose_disk_is_full_says_so_and_goes_on(tmp_path: Path) -> None:
    """Runs full_disk.py where it may mount a file system."""
    assert_passes("full_disk.py", ("mount",), tmp_path)


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


def test_a_directory_that_another_server_removes_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make, made = tempfile.mkdtemp, list[Path]()

    def made_beside_another(**where: Any) -> str:
        """The other has the first locked, and has removed the second."""
        made.append(Path(make(**where)))
        if len(made) == 1:
            fcntl.flock(os.open(made[0], os.O_RDONLY), fcntl.LOCK_EX)
        elif len(made) == 2:
            shutil.rmtree(made[1])
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", made_beside_another)
    files = Files()
    assert files.new().parent == made[2]
    files.close()
